"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py.

The centre of an instance is its mean coordinate, rounded up, in integers. With the offset o of an axis its box covers
[centre - o - 1, centre + o), clipped to the volume. A voxel in several boxes of one side belongs to the largest row.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, KEPT, SIZE
from . import compiled
from .activation import Indices, Rows

_SUMS = COORDINATE_SUMS.start


@compiled
def _paint(table: Indices, count: int, offsets: Indices, owner: NDArray[Any], clear: bool) -> Indices:
    """Write the row (from 1) of each box over the voxels that it covers, so that the last one stays; or zeros.

    Returns the boxes: where they begin along each axis, and where they end.
    """
    boxes = np.empty((count, 6), np.int64)
    for row in range(count):
        box, line = boxes[row], table[row]
        for axis in range(3):
            center = -(-line[_SUMS + axis] // line[SIZE])
            box[axis] = max(center - offsets[axis] - 1, 0)
            box[3 + axis] = min(center + offsets[axis], owner.shape[axis])
        for d in range(box[0], box[3]):
            for h in range(box[1], box[4]):
                for w in range(box[2], box[5]):
                    owner[d, h, w] = 0 if clear else row + 1
    return boxes


@compiled
def _overlaps(geometry: Indices, used: Rows, offsets: Indices, owners: NDArray[Any], owned: Indices) -> None:
    """Paint the boxes of both sides of each sample, and count."""
    batch = used.shape[1]
    for sample in range(batch):
        # Owners are cleared only where they are looked at: touching memory is what takes time.
        for boxes in range(2):
            for side in range(2):
                _paint(geometry[boxes * batch + sample], used[boxes, sample], offsets, owners[side], True)
        painted = [_paint(geometry[k * batch + sample], used[k, sample], offsets, owners[k], False) for k in range(2)]
        for side in range(2):
            owner, other = owners[side], owners[1 - side]
            for row in range(used[side, sample]):
                box = painted[side][row]
                for d in range(box[0], box[3]):
                    for h in range(box[1], box[4]):
                        for w in range(box[2], box[5]):
                            if owner[d, h, w] == row + 1:
                                owned[side * batch + sample, row, 1 if other[d, h, w] > 0 else 0] += 1


def center_volumes(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    used, tables = counts[KEPT:].flatten().tolist(), geometry.numpy()
    owners = np.zeros((len(tables), *shape), dtype=np.int32)
    for table, count, owner in zip(tables, used, owners, strict=True):
        _paint(table, count, np.array(offsets), owner, False)
    of_outputs, of_labels = torch.from_numpy(owners).chunk(2)
    return of_outputs, of_labels > 0


def center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Operator `center_overlaps` (ops.py)."""
    owned = np.zeros((*geometry.shape[:2], 2), dtype=np.int64)
    # (touching new memory is what takes time, so it is as little as rows fit in)
    owners = np.empty((2, *shape), dtype=np.int16 if len(owned[0]) < 2**15 else np.int32)
    _overlaps(geometry.numpy(), counts[KEPT:].numpy(), np.array(offsets), owners, owned)
    return torch.from_numpy(owned)
