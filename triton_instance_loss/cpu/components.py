"""Labelling, numbering and measuring on the CPU: `components`, `find_instances` and `number_instances` of ops.py."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import GEOMETRY_COLUMNS, HIGHS, LOWS, SIZE

Indices = NDArray[np.int64]

# Up to this foreground fraction, joining runs of voxels beats a pass of scipy.ndimage.label over the whole volume.
SPARSE_FRACTION = 1 / 16
_NO_LOW, _NO_HIGH = 2**31 - 1, -1


def components(mask: Tensor, num_iterations: int) -> Tensor:
    """Operator `components` (ops.py)."""
    if num_iterations > 0:
        return _propagate(mask, num_iterations)
    voxels, names = _label(mask.numpy())
    last = _largest_voxel(voxels, names)
    ids = torch.zeros(mask.shape, dtype=torch.int32)
    ids.numpy().reshape(-1)[voxels] = last[names] % mask[0].numel() + 1
    return ids


def find_instances(mask: Tensor, num_iterations: int, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `find_instances` (ops.py)."""
    if num_iterations > 0:
        return number_instances(_propagate(mask, num_iterations), min_size, capacity)
    voxels, names = _label(mask.numpy())
    return _number(voxels, names, _largest_voxel(voxels, names), mask.shape, min_size, capacity)


def number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `number_instances` (ops.py)."""
    flat = ids.numpy().reshape(-1)
    voxels = np.flatnonzero(flat != 0)
    samples = voxels // ids[0].numel()
    # Names in the order of (sample, id).
    keys, names = np.unique(np.stack((samples, flat[voxels].astype(np.int64))), axis=1, return_inverse=True)
    order = np.arange(keys.shape[1])
    first_voxel_of_sample = keys[0] * ids[0].numel()
    return _number(voxels, names.reshape(-1), order, ids.shape, min_size, capacity, first_voxel_of_sample)


def _label(mask: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Foreground voxels (ascending, over the whole batch) and the component of each, named 0..n-1 in any order."""
    voxels = np.flatnonzero(mask)
    if len(voxels) <= SPARSE_FRACTION * mask.size:
        return voxels, _join_runs(voxels, mask.shape)
    from scipy import ndimage

    names = np.empty(len(voxels), dtype=np.int64)
    done = start = 0
    for sample in mask:
        labelled, count = ndimage.label(sample, structure=np.ones((3, 3, 3)))
        inside = labelled[sample]
        names[done : done + len(inside)] = inside.astype(np.int64) - 1 + start
        done, start = done + len(inside), start + count
    return voxels, names


def _join_runs(voxels: Indices, shape: tuple[int, ...]) -> Indices:
    """Name the components of a list of voxels: cut it into runs along W, join runs that touch, label that graph."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, depth, height, width = shape
    if len(voxels) == 0:
        return voxels
    line, x = np.divmod(voxels, width)
    begins = np.ones(len(voxels), dtype=bool)
    begins[1:] = (voxels[1:] != voxels[:-1] + 1) | (line[1:] != line[:-1])
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(voxels)) - 1
    run_line = line[firsts]
    # Two free places between lines, so that a run widened by one voxel never reaches into another line.
    first = run_line * (width + 2) + x[firsts]
    last = run_line * (width + 2) + x[lasts]
    h = run_line % height
    d = run_line // height % depth

    heads, tails = [], []
    for dd, dh in ((0, 1), (1, -1), (1, 0), (1, 1)):
        inside = np.flatnonzero((d + dd < depth) & (h + dh >= 0) & (h + dh < height))
        shift = (dd * height + dh) * (width + 2)
        low = np.searchsorted(last, first[inside] + shift - 1, side="left")
        high = np.searchsorted(first, last[inside] + shift + 1, side="right")
        met = np.maximum(high - low, 0)
        heads.append(np.repeat(inside, met))
        within = np.arange(met.sum()) - np.repeat(np.cumsum(met) - met, met)
        tails.append(np.repeat(low, met) + within)
    head, tail = np.concatenate(heads), np.concatenate(tails)
    graph = coo_matrix((np.ones(len(head), dtype=bool), (head, tail)), shape=(len(firsts), len(firsts)))
    _, run_names = connected_components(graph, directed=False)
    return np.repeat(run_names, lasts - firsts + 1).astype(np.int64)


def _largest_voxel(voxels: Indices, names: Indices) -> Indices:
    """The largest voxel of each component: what orders components, and their id less one."""
    largest = np.zeros(names.max(initial=-1) + 1, dtype=np.int64)
    largest[names] = voxels  # voxels ascend, and of several values for one name the last stays
    return largest


def _propagate(mask: Tensor, rounds: int) -> Tensor:
    """`rounds` of 3x3x3 max-pooling of the linear indices (from 1) inside the mask."""
    from scipy import ndimage

    ids = components(mask, 0)
    voxels, names = _label(mask.numpy())
    sizes = np.bincount(names)
    named = np.zeros(mask.shape, dtype=np.int32)
    named.reshape(-1)[voxels] = names + 1
    index = np.arange(1, mask[0].numel() + 1, dtype=np.int32).reshape(1, *mask.shape[1:])
    for name, box in enumerate(ndimage.find_objects(named)):
        # A component of at most rounds + 1 voxels is no wider than `rounds` steps, and stays whole.
        if sizes[name] > rounds + 1:
            inside = named[box] == name + 1
            ids.numpy()[box][inside] = _pool(index[0][box[1:]][None], inside, rounds)[inside]
    return ids


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
    voxels: Indices,
    names: Indices,
    order: Indices,
    shape: tuple[int, ...],
    min_size: int,
    capacity: int,
    voxel_of_name: Indices | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of named voxels; instances are numbered by `order` within their sample."""
    batch, volume = shape[0], int(np.prod(shape[1:]))
    sample_of_name = (order if voxel_of_name is None else voxel_of_name) // volume
    sizes = np.bincount(names, minlength=len(order))
    large = sizes > min_size
    counts = np.bincount(sample_of_name[large], minlength=batch)

    ranked = np.argsort(order)
    ranked = ranked[large[ranked]]
    row_of_name = np.zeros(len(order), dtype=np.int64)
    row_of_name[ranked] = np.arange(len(ranked)) - (np.cumsum(counts) - counts)[sample_of_name[ranked]] + 1

    rows = torch.zeros(shape, dtype=torch.int32)
    row_of_voxel = row_of_name[names]
    rows.numpy().reshape(-1)[voxels] = row_of_voxel
    if min_size > 0:
        present = row_of_voxel > 0
        voxels, row_of_voxel = voxels[present], row_of_voxel[present]
    capacity = capacity or max(1, int(counts.max()))
    geometry = _measure(voxels, row_of_voxel, shape, capacity)
    return rows, torch.from_numpy(counts.astype(np.int32)), torch.from_numpy(geometry)


def _measure(voxels: Indices, rows: Indices, shape: tuple[int, ...], capacity: int) -> NDArray[np.int64]:
    """Size, coordinate sums and bounds of each instance."""
    batch, depth, height, width = shape
    line, w = np.divmod(voxels, width)
    plane, h = np.divmod(line, height)
    sample, d = np.divmod(plane, depth)
    at = sample * capacity + rows - 1
    table = np.zeros((batch * capacity, GEOMETRY_COLUMNS), dtype=np.int64)
    table[:, LOWS], table[:, HIGHS] = _NO_LOW, _NO_HIGH
    table[:, SIZE] = np.bincount(at, minlength=len(table))
    for axis, coordinate in enumerate((d, h, w)):
        # Coordinates are below 2^31 and their sums below 2^53: exact in float64.
        table[:, 1 + axis] = np.bincount(at, weights=coordinate, minlength=len(table))
        np.minimum.at(table[:, 4 + axis], at, coordinate)
        np.maximum.at(table[:, 7 + axis], at, coordinate)
    return table.reshape(batch, capacity, GEOMETRY_COLUMNS)
