"""The cells of instances on the CPU: `cells` of ops.py, the instance that is nearest to each voxel.

Squared distances are sums over axes, so one axis follows the other. Along lines of the last, two sweeps find the
nearest voxel of an instance. Then, along each other axis, a line looks at those before and after it, one step further
each time, until the step alone is longer than all that it has found: a line of voxels at once, which vectorises. Of
equal distances the larger row wins, at each step and so in the end.

Memory: the answer, one distance a voxel, and the lines of one slab.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import compiled
from .activation import Rows

Distances = NDArray[Any]
LARGEST_EXACT = 2**24  # whole numbers up to here are exact in float32


@compiled
def _sweep(rows: Rows, step: float, near: Rows, far: Distances) -> bool:
    """Nearest row and squared distance along the last axis of (lines, W); whether there is any row at all."""
    found, width = False, rows.shape[1]
    for line in range(len(rows)):
        row, since = np.int32(0), 0
        for voxel in range(width):
            since += 1
            if rows[line, voxel] > 0:
                row, since = rows[line, voxel], 0
            near[line, voxel] = row
            far[line, voxel] = since if row > 0 else np.inf
        if row > 0:
            found = True
            row, since = np.int32(0), 0
            for voxel in range(width - 1, -1, -1):
                since += 1
                if rows[line, voxel] > 0:
                    row, since = rows[line, voxel], 0
                nearest = far[line, voxel]
                if row > 0 and (since < nearest or (since == nearest and row > near[line, voxel])):
                    near[line, voxel], nearest = row, since
                far[line, voxel] = (nearest * step) * (nearest * step)
    return found


@compiled
def _take_nearer(best: Distances, chosen: Rows, far: Distances, near: Rows, more: Any) -> None:
    """What another line offers, `more` further away; without branches, so that it vectorises."""
    for voxel in range(len(best)):
        distance, row = far[voxel] + more, near[voxel]
        better = (distance < best[voxel]) | ((distance == best[voxel]) & (row > chosen[voxel]))
        best[voxel] = distance if better else best[voxel]
        chosen[voxel] = row if better else chosen[voxel]


@compiled
def _any_beyond(best: Distances, more: Any) -> bool:
    """Whether any distance is at least `more` (counted, since that vectorises)."""
    count = 0
    for voxel in range(len(best)):
        count += best[voxel] >= more
    return count > 0


@compiled
def _search(near: Rows, far: Distances, step: float) -> None:
    """Along the first axis of (n, W): the nearest of all lines, in place."""
    count, width = near.shape
    # Copies lie close together, whichever axis this is.
    near_before, far_before = near.copy(), far.copy()
    best, chosen = np.empty(width, far.dtype), np.empty(width, near.dtype)
    for line in range(count):
        best[:], chosen[:] = far_before[line], near_before[line]
        for apart in range(1, max(line, count - 1 - line) + 1):
            more = far.dtype.type((apart * step) * (apart * step))
            if not _any_beyond(best, more):
                break
            # A line that has none at its first voxel has none at all.
            if line >= apart and near_before[line - apart, 0] > 0:
                _take_nearer(best, chosen, far_before[line - apart], near_before[line - apart], more)
            if line + apart < count and near_before[line + apart, 0] > 0:
                _take_nearer(best, chosen, far_before[line + apart], near_before[line + apart], more)
        far[line], near[line] = best, chosen


@compiled
def _find_cells(rows: Rows, steps: NDArray[np.float64], near: Rows, far: Distances) -> None:
    """The cells of one sample (D, H, W); zeros if it has no instance."""
    depth, height, width = rows.shape
    lines = (depth * height, width)
    if not _sweep(rows.reshape(lines), steps[2], near.reshape(lines), far.reshape(lines)):
        return
    for d in range(depth):
        _search(near[d], far[d], steps[1])
    if depth > 1:
        for h in range(height):
            _search(near[:, h], far[:, h], steps[0])


def cells(rows: Tensor, spacing: list[float]) -> Tensor:
    """Operator `cells` (ops.py)."""
    shape, near = rows.shape[1:], np.empty(rows.shape, dtype=np.int32)
    # Where all axes are alike, distances count voxels, and are exact.
    alike = len({step for step, length in zip(spacing, shape, strict=True) if length > 1}) <= 1
    exact = alike and sum(length * length for length in shape) < LARGEST_EXACT
    steps = np.ones(3) if alike else np.array(spacing, dtype=np.float64)
    far = np.empty(shape, dtype=np.float32 if exact else np.float64)
    for sample, into in zip(rows.numpy(), near, strict=True):
        _find_cells(sample, steps, into, far)
    return torch.from_numpy(near)
