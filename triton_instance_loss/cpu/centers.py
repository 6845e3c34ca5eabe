"""Centre boxes on the CPU: `center_volumes` and `center_overlaps` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, SIZE


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


def center_volumes(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    owners, covered = [], []
    for sample in range(len(kept)):
        owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets)
        label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets)
        owners.append(torch.from_numpy(owner.astype(np.int32)))
        covered.append(torch.from_numpy(label > 0))
    return torch.stack(owners), torch.stack(covered)


def center_overlaps(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_overlaps` (ops.py)."""
    rows = out_geometry.shape[1]
    owned = torch.zeros((len(kept), rows, 2), dtype=torch.int64)
    alone = torch.zeros(len(kept), dtype=torch.int64)
    for sample in range(len(kept)):
        owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets).reshape(-1)
        label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets).reshape(-1)
        boxes = np.flatnonzero(owner != 0)  # of bytes it would be several times as slow
        row, inside = owner[boxes].astype(np.int64) - 1, label[boxes] > 0
        counts = np.bincount(2 * row + inside, minlength=2 * rows)
        owned[sample] = torch.from_numpy(counts).view(rows, 2)
        alone[sample] = int(np.count_nonzero(label != 0)) - int(np.count_nonzero(inside))
    return owned, alone
