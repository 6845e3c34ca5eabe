"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

import itertools
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

    def paint(self, owner: NDArray[Any]) -> None:
        """Write the row (from 1) of each box over the voxels it covers, so that the last one stays."""
        corners = zip(self.lows.tolist(), self.highs.tolist(), strict=True)
        for row, ((d, h, w), (to_d, to_h, to_w)) in enumerate(corners, start=1):
            owner[d:to_d, h:to_h, w:to_w] = row


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
    sides = _sides(geometry, counts, shape, offsets)
    owners = np.zeros((len(sides), *shape), dtype=np.int32)
    for boxes, owner in zip(sides, owners, strict=True):
        boxes.paint(owner)
    of_outputs, of_labels = torch.from_numpy(owners).chunk(2)
    return of_outputs, of_labels > 0


def _views(pair: list[_Boxes], shape: list[int], window: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The owners of the voxels of both sides of a sample, seen through the window that begins at each voxel."""
    # Bytes where they do, and cleared only where they are looked at: touching memory is what takes time.
    owners = [np.empty(shape + window, dtype=np.min_scalar_type(len(boxes.lows))) for boxes in pair]
    # (NumPy's own function for windows costs as much as the rest)
    views = [np.lib.stride_tricks.as_strided(owner, (*shape, *window), owner.strides * 2) for owner in owners]
    for view, boxes in itertools.product(views, pair):
        view[tuple(boxes.lows.T)] = 0
    for owner, boxes in zip(owners, pair, strict=True):
        boxes.paint(owner)
    return views


def center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Operator `center_overlaps` (ops.py)."""
    sides, batch = _sides(geometry, counts, shape, offsets), counts.shape[1]
    # Each box is seen through a window as large as a whole box, for which there is room wherever a box begins.
    window = np.minimum(2 * np.array(offsets) + 1, shape)
    at_once = max(1, VOXELS_AT_ONCE // math.prod(window.tolist()))
    owned = np.zeros((*geometry.shape[:2], 2), dtype=np.int64)
    for sample in range(batch):
        pair = sides[sample::batch]
        views = _views(pair, shape, window)
        for boxes, owner, other, table in zip(pair, views, views[::-1], owned[sample::batch], strict=True):
            for start in range(0, len(boxes.lows), at_once):
                corners = tuple(boxes.lows[start : start + at_once].T)
                rows = np.arange(start, start + len(corners[0]))
                mine = owner[corners] == rows[:, None, None, None] + 1
                inside = (mine & (other[corners] > 0)).sum((1, 2, 3))
                table[rows] = np.stack((mine.sum((1, 2, 3)) - inside, inside), axis=1)
    return torch.from_numpy(owned)
