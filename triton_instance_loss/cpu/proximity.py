"""Distances between extended boxes on the CPU: `proximity_minima` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import HIGHS, KEPT, LOWS

BOXES_AT_ONCE = 256  # output boxes compared with all label boxes in one go: bounds the memory of the distances

Numbers = NDArray[np.float64]
Boxes = tuple[Numbers, Numbers, Numbers]  # low, high (exclusive) and centre, each (axes, boxes)


def proximity_minima(geometry: Tensor, counts: Tensor, shape: list[int], planar: bool) -> Tensor:
    """Operator `proximity_minima` (ops.py)."""
    minima = np.zeros(geometry.shape[:2])
    axes = slice(1, 3) if planar else slice(0, 3)
    batch = counts.shape[1]
    for sample, (kept, num_labels) in enumerate(counts[KEPT:].T.tolist()):
        out = _extended_boxes(geometry[sample], kept, shape, axes)
        lab = _extended_boxes(geometry[batch + sample], num_labels, shape, axes)
        count = out[0].shape[1]
        of_outputs, of_labels = minima[sample], minima[batch + sample, : lab[0].shape[1]]
        of_labels.fill(np.inf)
        for start in range(0, count, BOXES_AT_ONCE):
            part = slice(start, min(start + BOXES_AT_ONCE, count))
            distances = _distances((out[0][:, part], out[1][:, part], out[2][:, part]), lab)
            of_outputs[part] = distances.min(1)
            np.minimum(of_labels, distances.min(0), out=of_labels)
    return torch.from_numpy(minima)


def _extended_boxes(geometry: Tensor, count: int, shape: list[int], axes: slice) -> Boxes:
    """The extended boxes of the first `count` instances; without any, one box in the middle of the volume."""
    dims = np.array(shape, dtype=np.float64)[axes, None]
    if count == 0:
        middle = np.floor(dims / 2)
        return middle - 1, middle + 1, middle
    used = geometry[:count].numpy().T
    lows, highs = (used[bounds][axes].astype(np.float64) for bounds in (LOWS, HIGHS))
    extent = np.maximum(highs - lows, 1)
    low = np.maximum(lows - extent - 1, 0)
    high = np.minimum(highs + extent, dims)
    return low, high, low + np.ceil((high - low) / 2)


def _distances(out: Boxes, lab: Boxes) -> Numbers:
    """DIoU between each output box (rows) and each label box (columns)."""
    # Axis by axis, so that everything is a matrix.
    shared: Numbers | float = 1.0
    apart: Numbers | float = 0.0
    diagonal: Numbers | float = 1e-7
    for axis in range(len(out[0])):
        low, high, center = (corner[axis][:, None] for corner in out)
        lows, highs, centers = (corner[axis] for corner in lab)
        shared = shared * np.maximum(np.minimum(high, highs) - np.maximum(low, lows), 0.0)
        apart = apart + (center - centers) ** 2
        diagonal = diagonal + (np.maximum(high, highs) - np.minimum(low, lows)) ** 2
    volumes = (out[1] - out[0]).prod(0)[:, None] + (lab[1] - lab[0]).prod(0)
    distances: Numbers = 1.0 - shared / (volumes - shared) + apart / diagonal
    return distances
