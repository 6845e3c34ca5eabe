"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, KEPT, SIZE


def _paint_centers(geometry: Tensor, count: int, shape: list[int], offsets: list[int]) -> NDArray[np.unsignedinteger]:
    """Row (from 1) of the last of the first `count` instances of a sample whose centre box covers a voxel, 0 = none."""
    used = geometry[:count].numpy()
    centers = -(-used[:, COORDINATE_SUMS] // used[:, SIZE, None])  # rounded up
    lows = np.maximum(centers - np.array(offsets) - 1, 0).tolist()
    highs = np.minimum(centers + np.array(offsets), np.array(shape)).tolist()
    owner = np.zeros(shape, dtype=np.min_scalar_type(count))  # bytes where they do: memory is what takes time here
    for row, ((d, h, w), (to_d, to_h, to_w)) in enumerate(zip(lows, highs, strict=True), start=1):
        owner[d:to_d, h:to_h, w:to_w] = row
    return owner


def center_volumes(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    batch = counts.shape[1]
    used = counts[KEPT:].flatten().tolist()
    painted = [_paint_centers(*side, shape, offsets) for side in zip(geometry, used, strict=True)]
    owners = [torch.from_numpy(owner.astype(np.int32)) for owner in painted[:batch]]
    return torch.stack(owners), torch.stack([torch.from_numpy(owner > 0) for owner in painted[batch:]])


def center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Operator `center_overlaps` (ops.py)."""
    sides, rows, _ = geometry.shape
    used = counts[KEPT:].flatten().tolist()
    painted = [_paint_centers(*side, shape, offsets).reshape(-1) for side in zip(geometry, used, strict=True)]
    owned = np.zeros((sides, rows, 2), dtype=np.int64)
    for side, owner in enumerate(painted):
        other = painted[(side + sides // 2) % sides]
        boxes = np.flatnonzero(owner != 0)  # of bytes it would be several times as slow
        row, inside = owner[boxes].astype(np.int64) - 1, other[boxes] > 0
        owned[side] = np.bincount(2 * row + inside, minlength=2 * rows).reshape(rows, 2)
    return torch.from_numpy(owned)
