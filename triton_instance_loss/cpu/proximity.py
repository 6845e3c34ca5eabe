"""Distances between extended boxes on the CPU: `proximity_minima` of ops.py."""

import torch
from torch import Tensor

from ..ops import HIGHS, LOWS

BOXES_AT_ONCE = 256  # output boxes compared with all label boxes in one go: bounds the memory of the distances

Boxes = tuple[Tensor, Tensor, Tensor]  # low, high (exclusive) and centre, each (boxes, axes) float64


def proximity_minima(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], planar: bool
) -> tuple[Tensor, Tensor]:
    """Operator `proximity_minima` (ops.py)."""
    for_outputs = torch.zeros(out_geometry.shape[:2], dtype=torch.float64)
    for_labels = torch.zeros(lab_geometry.shape[:2], dtype=torch.float64)
    axes = slice(1, 3) if planar else slice(0, 3)
    for sample in range(len(kept)):
        out = _extended_boxes(out_geometry[sample], int(kept[sample]), shape, axes)
        lab = _extended_boxes(lab_geometry[sample], int(num_labels[sample]), shape, axes)
        nearest_output = for_labels[sample, : len(lab[0])].fill_(torch.inf)
        for start in range(0, len(out[0]), BOXES_AT_ONCE):
            part = slice(start, start + BOXES_AT_ONCE)
            distances = _distances((out[0][part], out[1][part], out[2][part]), lab)
            for_outputs[sample, part][: len(distances)] = distances.amin(1)
            torch.minimum(nearest_output, distances.amin(0), out=nearest_output)
    return for_outputs, for_labels


def _extended_boxes(geometry: Tensor, count: int, shape: list[int], axes: slice) -> Boxes:
    """The extended boxes of the first `count` instances; without any, one box in the middle of the volume."""
    dims = torch.tensor(shape, dtype=torch.float64)[axes]
    if count == 0:
        middle = torch.floor(dims / 2)[None]
        return middle - 1, middle + 1, middle
    lows = geometry[:count, LOWS].double()[:, axes]
    highs = geometry[:count, HIGHS].double()[:, axes]
    extent = (highs - lows).clamp(min=1)
    low = (lows - extent - 1).clamp(min=0)
    high = torch.minimum(highs + extent, dims)
    return low, high, low + torch.ceil((high - low) / 2)


def _distances(out: Boxes, lab: Boxes) -> Tensor:
    """DIoU between each output box (rows) and each label box (columns)."""
    # Axis by axis, so that everything is a matrix.
    shared: Tensor | float = 1.0
    apart: Tensor | float = 0.0
    diagonal: Tensor | float = 1e-7
    for axis in range(out[0].shape[1]):
        low, high, center = (corner[:, axis, None] for corner in out)
        lows, highs, centers = (corner[:, axis] for corner in lab)
        shared = (torch.minimum(high, highs) - torch.maximum(low, lows)).clamp_(min=0).mul_(shared)
        apart = (center - centers).square_().add_(apart)
        diagonal = (torch.maximum(high, highs) - torch.minimum(low, lows)).square_().add_(diagonal)
    assert isinstance(shared, Tensor)
    volumes = (out[1] - out[0]).prod(1)[:, None] + (lab[1] - lab[0]).prod(1)
    return 1.0 - shared / (volumes - shared) + apart / diagonal
