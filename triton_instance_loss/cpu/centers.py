"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, KEPT, SIZE

Box = tuple[slice, slice, slice]


def _boxes(geometry: Tensor, count: int, shape: list[int], offsets: list[int]) -> list[Box]:
    """The centre boxes of the first `count` instances of one side of a sample."""
    used = geometry[:count].numpy()
    centers = -(-used[:, COORDINATE_SUMS] // used[:, SIZE, None])  # rounded up
    lows = np.maximum(centers - np.array(offsets) - 1, 0).tolist()
    highs = np.minimum(centers + np.array(offsets), np.array(shape)).tolist()
    return [
        (slice(d, to_d), slice(h, to_h), slice(w, to_w))
        for (d, h, w), (to_d, to_h, to_w) in zip(lows, highs, strict=True)
    ]


def _paint(boxes: list[Box], shape: list[int]) -> NDArray[Any]:
    """Row (from 1) of the last box that covers a voxel, 0 = none."""
    owner = np.zeros(shape, dtype=np.min_scalar_type(len(boxes)))  # bytes where they do: memory is what takes time
    for row, box in enumerate(boxes, start=1):
        owner[box] = row
    return owner


def _sides(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> list[list[Box]]:
    """The boxes of each side of each sample, outputs first."""
    used = counts[KEPT:].flatten().tolist()
    return [_boxes(*side, shape, offsets) for side in zip(geometry, used, strict=True)]


def center_volumes(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    painted = [_paint(boxes, shape) for boxes in _sides(geometry, counts, shape, offsets)]
    batch = counts.shape[1]
    owners = [torch.from_numpy(owner.astype(np.int32)) for owner in painted[:batch]]
    return torch.stack(owners), torch.stack([torch.from_numpy(owner > 0) for owner in painted[batch:]])


def center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Operator `center_overlaps` (ops.py)."""
    sides = _sides(geometry, counts, shape, offsets)
    painted = [_paint(boxes, shape) for boxes in sides]
    owned = np.zeros((*geometry.shape[:2], 2), dtype=np.int64)
    for side, boxes in enumerate(sides):
        owner, other = painted[side], painted[(side + len(sides) // 2) % len(sides)]
        for row, box in enumerate(boxes):
            mine = owner[box] == row + 1
            inside = np.count_nonzero(other[box][mine])
            owned[side, row] = np.count_nonzero(mine) - inside, inside
    return torch.from_numpy(owned)
