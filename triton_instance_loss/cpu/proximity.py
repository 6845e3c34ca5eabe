"""Distances between extended boxes on the CPU: `proximity_minima` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import HIGHS, LOWS

BOXES_AT_ONCE = 256  # output boxes compared with all label boxes in one go: bounds the memory of the distances

Numbers = NDArray[np.float64]
Boxes = tuple[Numbers, Numbers, Numbers]  # low, high (exclusive) and centre, each (axes, boxes)


def proximity_minima(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], planar: bool
) -> tuple[Tensor, Tensor]:
    """Operator `proximity_minima` (ops.py)."""
    for_outputs = np.zeros(out_geometry.shape[:2])
    for_labels = np.zeros(lab_geometry.shape[:2])
    axes = slice(1, 3) if planar else slice(0, 3)
    for sample in range(len(kept)):
        out = _extended_boxes(out_geometry[sample], int(kept[sample]), shape, axes)
        lab = _extended_boxes(lab_geometry[sample], int(num_labels[sample]), shape, axes)
        count = out[0].shape[1]
        nearest_output = for_labels[sample, : lab[0].shape[1]]
        nearest_output.fill(np.inf)
        for start in range(0, count, BOXES_AT_ONCE):
            part = slice(start, min(start + BOXES_AT_ONCE, count))
            distances = _distances((out[0][:, part], out[1][:, part], out[2][:, part]), lab)
            for_outputs[sample, part] = distances.min(1)
            np.minimum(nearest_output, distances.min(0), out=nearest_output)
    return torch.from_numpy(for_outputs), torch.from_numpy(for_labels)


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
