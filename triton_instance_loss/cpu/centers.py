"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, SIZE

Box = tuple[slice, slice, slice]


def _paint_centers(
    geometry: Tensor, count: int, shape: list[int], offsets: list[int]
) -> tuple[list[Box], NDArray[np.int32]]:
    """The centre boxes of the first `count` instances of a sample, and the row painted last over each voxel."""
    used = geometry[:count].numpy()
    centers = -(-used[:, COORDINATE_SUMS] // used[:, SIZE, None])  # rounded up
    lows = np.maximum(centers - np.array(offsets) - 1, 0).tolist()
    highs = np.minimum(centers + np.array(offsets), np.array(shape)).tolist()
    boxes: list[Box] = [
        (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
        for low, high in zip(lows, highs, strict=True)
    ]
    owner = np.zeros(shape, dtype=np.int32)
    for row, box in enumerate(boxes, start=1):
        owner[box] = row
    return boxes, owner


def center_volumes(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    owners, covered = [], []
    for sample in range(len(kept)):
        _, owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets)
        _, label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets)
        owners.append(torch.from_numpy(owner))
        covered.append(torch.from_numpy(label > 0))
    return torch.stack(owners), torch.stack(covered)


def center_overlaps(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_overlaps` (ops.py)."""
    owned = torch.zeros((*out_geometry.shape[:2], 2), dtype=torch.int64)
    alone = torch.zeros(len(kept), dtype=torch.int64)
    for sample in range(len(kept)):
        boxes, owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets)
        label_boxes, label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets)
        for row, box in enumerate(boxes):
            mine = owner[box] == row + 1
            inside = int(np.count_nonzero(mine & (label[box] > 0)))
            owned[sample, row, 0] = int(np.count_nonzero(mine)) - inside
            owned[sample, row, 1] = inside
        for row, box in enumerate(label_boxes):
            # A voxel under several label boxes counts in the one painted last.
            alone[sample] += int(np.count_nonzero((label[box] == row + 1) & (owner[box] == 0)))
    return owned, alone
