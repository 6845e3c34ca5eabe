"""Labelling, numbering and measuring on the CPU: `components`, `find_instances` and `number_instances` of ops.py.

The foreground is cut into *runs*, voxels in a row along the last axis. Runs are some times fewer than voxels, and what
touches, how large an instance is and where it lies follows from their ends.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import GEOMETRY_COLUMNS, HIGHS, LOWS, SIZE

Indices = NDArray[np.int64]

# Up to this foreground fraction, joining runs beats a pass of scipy.ndimage.label over the whole volume.
SPARSE_FRACTION = 1 / 16
_NO_LOW, _NO_HIGH = 2**31 - 1, -1


class _Runs(NamedTuple):
    """The foreground of a batch of volumes, and the runs it is made of, both in the order of linear indices."""

    voxels: Indices
    first: Indices  # first voxel of each run
    last: Indices  # last voxel of each run
    at: tuple[Indices, Indices, Indices, Indices]  # sample and coordinates d, h, w of the first voxel of each run

    def spread(self, values: Indices) -> Indices:
        """From a value a run to one a voxel."""
        return np.repeat(values, self.last - self.first + 1)


def _cut(voxels: Indices, shape: tuple[int, ...], ids: NDArray[Any] | None = None) -> _Runs:
    """Cut voxels into runs, of one id if ids are given."""
    _, depth, height, width = shape
    line = voxels // width
    begins = np.ones(len(voxels), dtype=bool)
    begins[1:] = (voxels[1:] - voxels[:-1] != 1) | (line[1:] != line[:-1])
    if ids is not None:
        begins[1:] |= ids[1:] != ids[:-1]
    begin = np.flatnonzero(begins)
    first, line = voxels[begin], line[begin]
    last = voxels[np.append(begin[1:], len(voxels)) - 1] if len(voxels) else voxels
    plane = line // height
    sample = plane // depth
    return _Runs(voxels, first, last, (sample, plane - sample * depth, line - plane * height, first - line * width))


def fill(shape: tuple[int, ...], voxels: Indices, values: NDArray[Any]) -> Tensor:
    """Make a volume (int32) that holds the values of its voxels, 0 elsewhere."""
    volume = np.zeros(shape, dtype=np.int32)
    volume.reshape(-1)[voxels] = values
    return torch.from_numpy(volume)


def components(mask: Tensor, num_iterations: int) -> Tensor:
    """Operator `components` (ops.py)."""
    voxels, shape = np.flatnonzero(mask.numpy()), tuple(mask.shape)
    return fill(shape, voxels, find_ids(voxels, shape, num_iterations))


def find_instances(mask: Tensor, num_iterations: int, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `find_instances` (ops.py)."""
    voxels, shape = np.flatnonzero(mask.numpy()), tuple(mask.shape)
    rows, counts, geometry = find_rows(voxels, shape, num_iterations, min_size, capacity)
    return fill(shape, voxels, rows), counts, geometry


def number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `number_instances` (ops.py)."""
    voxels, shape = np.flatnonzero(ids.numpy() != 0), tuple(ids.shape)
    rows, counts, geometry = number_rows(voxels, ids.numpy().reshape(-1)[voxels], shape, min_size, capacity)
    return fill(shape, voxels, rows), counts, geometry


def find_ids(voxels: Indices, shape: tuple[int, ...], num_iterations: int) -> Indices:
    """The id of the component of each voxel of a foreground."""
    runs = _cut(voxels, shape)
    names = _label(runs, shape)
    ids = runs.spread((_largest_voxel(runs, names) % math.prod(shape[1:]) + 1)[names])
    return _propagate(runs, names, ids, shape, num_iterations) if num_iterations > 0 else ids


def find_rows(
    voxels: Indices, shape: tuple[int, ...], num_iterations: int, min_size: int, capacity: int
) -> tuple[Indices, Tensor, Tensor]:
    """Row of the instance of each voxel of a foreground; counts and geometry of the instances."""
    if num_iterations > 0:
        return number_rows(voxels, find_ids(voxels, shape, num_iterations), shape, min_size, capacity)
    runs = _cut(voxels, shape)
    names = _label(runs, shape)
    largest = _largest_voxel(runs, names)
    return _number(runs, names, largest, largest // math.prod(shape[1:]), shape, min_size, capacity)


def number_rows(
    voxels: Indices, ids: NDArray[Any], shape: tuple[int, ...], min_size: int, capacity: int
) -> tuple[Indices, Tensor, Tensor]:
    """The same, of given ids."""
    runs = _cut(voxels, shape, ids)
    of_run = ids[np.searchsorted(voxels, runs.first)].astype(np.int64)
    keys = np.stack((runs.at[0], of_run))
    keys, names = np.unique(keys, axis=1, return_inverse=True)  # in the order of (sample, id)
    order = np.arange(keys.shape[1])
    return _number(runs, names.reshape(-1), order, keys[0], shape, min_size, capacity)


def _label(runs: _Runs, shape: tuple[int, ...]) -> Indices:
    """Name the component of each run, 0..n-1 in any order."""
    if len(runs.voxels) <= SPARSE_FRACTION * math.prod(shape):
        return _join(runs, shape)
    from scipy import ndimage

    mask = np.zeros(shape, dtype=bool)
    mask.reshape(-1)[runs.voxels] = True
    labelled = np.empty(shape, dtype=np.int32)
    count = 0
    for sample, output in zip(mask, labelled, strict=True):
        found = ndimage.label(sample, structure=np.ones((3, 3, 3)), output=output)
        output += count
        count += found
    return labelled.reshape(-1)[runs.first].astype(np.int64) - 1


def _join(runs: _Runs, shape: tuple[int, ...]) -> Indices:
    """Name the components of runs."""
    _, depth, height, width = shape
    sample, d, h, w = runs.at
    # With free places behind each line, plane and volume, a run that is moved or widened never reaches around an end.
    first = ((sample * (depth + 1) + d) * (height + 1) + h) * (width + 2) + w
    last = first + (runs.last - runs.first)
    firsts, lasts = np.append(first, np.iinfo(np.int64).max), np.append(last, -1)  # beyond both ends: touches nothing

    heads, tails = [], []
    for dd, dh in ((0, 1), (1, -1), (1, 0), (1, 1)):
        shift = (dd * (height + 1) + dh) * (width + 2)
        reach_from, reach_to = first + (shift - 1), last + (shift + 1)
        # In the line beside it, a run touches the last one that begins before its reach, if that goes on into it, ...
        after = np.searchsorted(first, reach_from)
        head = np.flatnonzero(lasts[after - 1] >= reach_from)
        heads.append(head)
        tails.append(after[head] - 1)
        # ... and all that begin within.
        head = np.flatnonzero(firsts[after] <= reach_to)
        tail = after[head]
        while len(head):
            heads.append(head)
            tails.append(tail)
            more = firsts[tail + 1] <= reach_to[head]
            head, tail = head[more], tail[more] + 1
    root = _roots(np.concatenate(heads), np.concatenate(tails), len(first))
    is_root = root == np.arange(len(root))
    return (np.cumsum(is_root) - 1)[root]


def _roots(low: Indices, high: Indices, count: int) -> Indices:
    """One of each component of a graph of `count` nodes, by node, from edges between a lower and a higher node."""
    root = np.arange(count)
    while len(low):
        # Each node takes a higher neighbour, of several the last one named, then what that leads to in the end.
        root[low] = high
        while not np.array_equal(further := root[root], root):
            root = further
        # Edges between those that are left, by their higher end: that no node stays alone for many rounds.
        one, other = root[low], root[high]
        apart = np.flatnonzero(one != other)
        one, other = one[apart], other[apart]
        low, high = np.minimum(one, other), np.maximum(one, other)
        order = np.argsort(high, kind="stable")
        low, high = low[order], high[order]
    return root


def _largest_voxel(runs: _Runs, names: Indices) -> Indices:
    """The largest voxel of each component: what orders components, and their id less one."""
    largest = np.zeros(names.max(initial=-1) + 1, dtype=np.int64)
    largest[names] = runs.last  # voxels ascend, and of several values for one name the last stays
    return largest


def _propagate(runs: _Runs, names: Indices, ids: Indices, shape: tuple[int, ...], rounds: int) -> Indices:
    """What `rounds` of 3x3x3 max-pooling of the linear indices (from 1) leave of components called `ids`."""
    from scipy import ndimage

    sizes = np.bincount(names, weights=runs.last - runs.first + 1)
    named = fill(shape, runs.voxels, runs.spread(names + 1)).numpy()
    pooled = fill(shape, runs.voxels, ids).numpy()
    index = np.arange(1, math.prod(shape[1:]) + 1, dtype=np.int32).reshape(1, *shape[1:])
    for name, box in enumerate(ndimage.find_objects(named)):
        # A component of at most rounds + 1 voxels is no wider than `rounds` steps, and stays whole.
        if sizes[name] > rounds + 1:
            inside = named[box] == name + 1
            pooled[box][inside] = _pool(index[0][box[1:]][None], inside, rounds)[inside]
    return pooled.reshape(-1)[runs.voxels].astype(np.int64)


def _pool(values: NDArray[np.int32], inside: NDArray[np.bool_], rounds: int) -> NDArray[np.int32]:
    """Rounds of 3x3x3 max-pooling of positive `values` where `inside`, until nothing changes."""
    current = np.where(inside, values, 0)
    for _ in range(rounds):
        pooled = current
        for axis in (1, 2, 3):  # the largest of a cube is the largest of lines of largest
            line = np.moveaxis(pooled, axis, 0)
            pooled = pooled.copy()
            widened = np.moveaxis(pooled, axis, 0)
            np.maximum(widened[1:], line[:-1], out=widened[1:])
            np.maximum(widened[:-1], line[1:], out=widened[:-1])
        pooled *= inside
        if np.array_equal(pooled, current):
            break
        current = pooled
    return current


def _number(
    runs: _Runs,
    names: Indices,
    order: Indices,
    samples: Indices,
    shape: tuple[int, ...],
    min_size: int,
    capacity: int,
) -> tuple[Indices, Tensor, Tensor]:
    """Rows of voxels, counts and geometry of named runs; names (of `samples`) are numbered by `order`."""
    sizes = np.bincount(names, weights=runs.last - runs.first + 1, minlength=len(order))
    large = sizes > min_size
    counts = np.bincount(samples[large], minlength=shape[0])
    ranked = np.argsort(order)
    ranked = ranked[large[ranked]]
    row_of_name = np.zeros(len(order), dtype=np.int64)
    row_of_name[ranked] = np.arange(len(ranked)) - (np.cumsum(counts) - counts)[samples[ranked]] + 1
    rows = row_of_name[names]
    geometry = _measure(runs, rows, shape[0], capacity or max(1, int(counts.max())))
    return runs.spread(rows), torch.from_numpy(counts.astype(np.int32)), torch.from_numpy(geometry)


def _measure(runs: _Runs, rows: Indices, batch: int, capacity: int) -> NDArray[np.int64]:
    """Size, coordinate sums and bounds of each instance."""
    used = rows > 0
    length, (sample, d, h, w) = runs.last - runs.first + 1, runs.at
    if not used.all():
        rows, length, sample, d, h, w = (each[used] for each in (rows, length, sample, d, h, w))
    at = sample * capacity + rows - 1
    table = np.zeros((batch * capacity, GEOMETRY_COLUMNS), dtype=np.int64)
    table[:, LOWS], table[:, HIGHS] = _NO_LOW, _NO_HIGH
    # Coordinates are below 2^31 and their sums below 2^53: exact in float64.
    table[:, SIZE] = np.bincount(at, weights=length, minlength=len(table))
    sums = (d * length, h * length, w * length + length * (length - 1) // 2)
    for axis, (total, low, high) in enumerate(zip(sums, (d, h, w), (d, h, w + length - 1), strict=True)):
        table[:, 1 + axis] = np.bincount(at, weights=total, minlength=len(table))
        np.minimum.at(table[:, 4 + axis], at, low)
        np.maximum.at(table[:, 7 + axis], at, high)
    return table.reshape(batch, capacity, GEOMETRY_COLUMNS)
