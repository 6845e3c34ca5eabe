"""Distances between extended boxes on the CPU: `proximity_minima` of ops.py.

The boxes, their distance and the box of a side without instances are those of kernels/proximity.py, which says them.
"""

import numpy as np
import torch
from torch import Tensor

from ..ops import HIGHS, KEPT, LOWS
from . import compiled
from .activation import Indices, Numbers, Rows

_LOWS, _HIGHS = LOWS.start, HIGHS.start
# Columns of a box along each axis, and its volume.
LOW, HIGH, MIDDLE, VOLUME = 0, 1, 2, 9


@compiled
def _extended_boxes(table: Indices, count: int, shape: Indices, first_axis: int) -> Numbers:
    """The extended boxes of the first `count` instances, or of none: (boxes, 10)."""
    boxes = np.ones((max(count, 1), VOLUME + 1))
    for row in range(len(boxes)):
        for axis in range(first_axis, 3):
            dim, box = shape[axis], boxes[row, 3 * axis : 3 * axis + 3]
            box[LOW], box[HIGH] = dim // 2 - 1, dim // 2 + 1
            if count > 0:
                low, high = table[row, _LOWS + axis], table[row, _HIGHS + axis]
                extent = max(high - low, 1)
                box[LOW], box[HIGH] = max(low - extent - 1, 0), min(high + extent, dim)
            box[MIDDLE] = box[LOW] + np.ceil((box[HIGH] - box[LOW]) / 2)
            boxes[row, VOLUME] *= box[HIGH] - box[LOW]
    return boxes


@compiled
def _minima(geometry: Indices, used: Rows, shape: Indices, first_axis: int, spacing: Numbers, minima: Numbers) -> None:
    """The smallest distance of each box to one of the other side."""
    batch = used.shape[1]
    for sample in range(batch):
        outputs = _extended_boxes(geometry[sample], used[0, sample], shape, first_axis)
        labels = _extended_boxes(geometry[batch + sample], used[1, sample], shape, first_axis)
        of_outputs, of_labels = minima[sample], minima[batch + sample]
        of_outputs[: len(outputs)], of_labels[: len(labels)] = np.inf, np.inf
        for i in range(len(outputs)):
            for j in range(len(labels)):
                shared, apart, around = 1.0, 0.0, 1e-7
                for axis in range(first_axis, 3):
                    one, other = outputs[i, 3 * axis : 3 * axis + 3], labels[j, 3 * axis : 3 * axis + 3]
                    shared *= max(min(one[HIGH], other[HIGH]) - max(one[LOW], other[LOW]), 0.0)
                    length = max(one[HIGH], other[HIGH]) - min(one[LOW], other[LOW])
                    apart += (spacing[axis] * (one[MIDDLE] - other[MIDDLE])) ** 2
                    around += (spacing[axis] * length) ** 2
                volume = outputs[i, VOLUME] + labels[j, VOLUME] - shared
                distance = 1.0 - shared / volume + apart / around
                of_outputs[i] = min(of_outputs[i], distance)
                of_labels[j] = min(of_labels[j], distance)


def proximity_minima(geometry: Tensor, counts: Tensor, shape: list[int], planar: bool, spacing: list[float]) -> Tensor:
    """Operator `proximity_minima` (ops.py)."""
    minima = np.zeros(geometry.shape[:2])
    _minima(geometry.numpy(), counts[KEPT:].numpy(), np.array(shape), int(planar), np.array(spacing), minima)
    return torch.from_numpy(minima)
