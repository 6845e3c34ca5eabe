"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, KEPT, SIZE
from .activation import Indices

VOXELS_AT_ONCE = 2**20  # voxels of boxes that are looked at in one go: bounds the memory


class _Boxes(NamedTuple):
    """The centre boxes of one side of a sample, (boxes, 3) each; the upper end is outside."""

    lows: Indices
    highs: Indices

    def paint(self, shape: Any) -> NDArray[Any]:
        """Row (from 1) of the last box that covers a voxel, 0 = none."""
        # Bytes where they do: memory is what takes time.
        owner = np.zeros(shape, dtype=np.min_scalar_type(len(self.lows)))
        corners = zip(self.lows.tolist(), self.highs.tolist(), strict=True)
        for row, ((d, h, w), (to_d, to_h, to_w)) in enumerate(corners, start=1):
            owner[d:to_d, h:to_h, w:to_w] = row
        return owner


def _sides(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> list[_Boxes]:
    """The boxes of each side of each sample, outputs first."""
    sides = []
    for table, used in zip(geometry.numpy(), counts[KEPT:].flatten().tolist(), strict=True):
        centers = -(-table[:used, COORDINATE_SUMS] // table[:used, SIZE, None])  # rounded up
        lows, highs = np.maximum(centers - offsets - 1, 0), np.minimum(centers + offsets, shape)
        sides.append(_Boxes(lows, highs))
    return sides


def center_volumes(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    painted = [boxes.paint(shape) for boxes in _sides(geometry, counts, shape, offsets)]
    batch = counts.shape[1]
    owners = [torch.from_numpy(owner.astype(np.int32)) for owner in painted[:batch]]
    return torch.stack(owners), torch.stack([torch.from_numpy(owner > 0) for owner in painted[batch:]])


def _windows(owner: NDArray[Any], shape: list[int], window: NDArray[np.int64]) -> NDArray[Any]:
    """The window that begins at each voxel; NumPy's own function for this costs as much as the rest."""
    return np.lib.stride_tricks.as_strided(owner, (*shape, *window), owner.strides * 2, writeable=False)


def center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Operator `center_overlaps` (ops.py)."""
    sides = _sides(geometry, counts, shape, offsets)
    # Each box is seen through a window as large as a whole box, for which there is room wherever a box begins.
    window = np.minimum(2 * np.array(offsets) + 1, shape)
    at_once = max(1, VOXELS_AT_ONCE // math.prod(window.tolist()))
    views = [_windows(boxes.paint(shape + window), shape, window) for boxes in sides]
    owned = np.zeros((*geometry.shape[:2], 2), dtype=np.int64)
    for side, (boxes, owner) in enumerate(zip(sides, views, strict=True)):
        other = views[(side + len(sides) // 2) % len(sides)]
        for start in range(0, len(boxes.lows), at_once):
            corners = tuple(boxes.lows[start : start + at_once].T)
            rows = np.arange(start, start + len(corners[0]))
            mine = owner[corners] == rows[:, None, None, None] + 1
            inside = (mine & (other[corners] > 0)).sum((1, 2, 3))
            owned[side, rows] = np.stack((mine.sum((1, 2, 3)) - inside, inside), axis=1)
    return torch.from_numpy(owned)
