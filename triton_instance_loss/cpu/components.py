"""Labelling, numbering and measuring on the CPU: `components`, `find_instances` and `number_instances` of ops.py.

The places of a foreground are cut into *runs*, voxels in a row along the last axis. Runs in neighbouring lines are
compared as two sorted lists are merged, and those that touch are united: each points to an earlier one, and the first
of a component to itself. Its last run has its largest voxel, so components follow each other by their last runs.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COORDINATE_SUMS, GEOMETRY_COLUMNS, HIGHS, LOWS, SIZE
from . import compiled
from .activation import Indices, Marks, Rows, collect
from .propagation import propagate

_SUMS, _LOWS, _HIGHS = COORDINATE_SUMS.start, LOWS.start, HIGHS.start


class Instances(NamedTuple):
    """The runs of a foreground, in the order of their voxels, and the instances that they make."""

    begins: Indices  # the first place of each run
    firsts: Indices  # its first voxel, by its index in the batch
    lasts: Indices  # its last voxel
    lines: Indices  # the line it is in, of all of the batch
    rows: Rows  # of its instance, from 1 in each sample; -1: in none
    counts: Rows  # (B,): how many instances there are


@compiled
def _cut(voxels: Indices, values: NDArray[Any], width: int) -> tuple[Indices, Indices, Indices, Indices]:
    """Runs of voxels of one value; those of value 0 are left out."""
    begins, firsts = np.empty(len(voxels) + 1, np.int64), np.empty(len(voxels) + 1, np.int64)
    lasts, lines = np.empty(len(voxels) + 1, np.int64), np.empty(len(voxels) + 1, np.int64)
    runs, line, end_of_line, before, value_before = 0, -1, 0, -2, np.int64(0)
    for place in range(len(voxels)):
        voxel, value = voxels[place], np.int64(values[place])
        goes_on = (voxel == before + 1) & (value == value_before)
        if voxel >= end_of_line:
            line, goes_on = voxel // width, False
            end_of_line = (line + 1) * width
        before, value_before = voxel, value
        if value != 0:
            # The next run, if this is one. (No branch: in noise it would be guessed wrong half of the time.)
            begins[runs], firsts[runs], lines[runs] = place, voxel, line
            runs += not goes_on
            lasts[runs - 1] = voxel
    return begins[:runs], firsts[:runs], lasts[:runs], lines[:runs]


@compiled
def _root(parents: Rows, run: int) -> int:
    """The first run of what a run belongs to so far; the way there is halved."""
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run


@compiled
def _unite_lines(
    parents: Rows, firsts: Indices, lasts: Indices, run: int, after: int, other: int, after_other: int, shift: int
) -> None:
    """Unite runs run..after - 1 with those of other..after_other - 1, `shift` voxels before, that they touch."""
    while run < after and other < after_other:
        low, high = firsts[run] - shift - 1, lasts[run] - shift + 1
        if (firsts[other] <= high) & (lasts[other] >= low) and parents[run] != parents[other]:
            one, another = _root(parents, run), _root(parents, other)
            first = min(one, another)
            parents[one] = parents[another] = parents[run] = parents[other] = first
        # Whichever ends first meets no other one. (No branch: in noise it would be guessed wrong half of the time.)
        ends_first = lasts[other] < high
        other += ends_first
        run += not ends_first


@compiled
def _common(parents: Rows, run: int, after: int) -> int:
    """What runs run..after - 1 belong to, if it is known to be the same; else -1."""
    for other in range(run + 1, after):
        if parents[other] != parents[run]:
            return -1
    return _root(parents, run)


@compiled
def _join(firsts: Indices, lasts: Indices, lines: Indices, shape: tuple[int, ...]) -> tuple[Rows, int]:
    """The component of each run, numbered 0..n-1 in the order of their last runs, and n."""
    batch, depth, height, width = shape
    heads = np.zeros(batch * depth * height + 1, np.int64)  # the first run of each line
    for run in range(len(lines)):
        heads[lines[run] + 1] += 1
    for line in range(batch * depth * height):
        heads[line + 1] += heads[line]
    parents = np.arange(len(lines)).astype(np.int32)
    run = 0
    while run < len(lines):
        line, after = lines[run], heads[lines[run] + 1]
        d, h = line // height % depth, line % height
        for before in range(4):  # one line before this one in its plane, three in the plane before
            dd, dh = (0, -1) if before == 0 else (-1, before - 2)
            if d + dd >= 0 and 0 <= h + dh < height:
                other = line + dd * height + dh
                first, end = heads[other], heads[other + 1]
                if first < end:
                    common = _common(parents, run, after) if before > 0 else -1
                    if common < 0 or common != _common(parents, first, end):  # in noise, two lines join all there is
                        _unite_lines(parents, firsts, lasts, run, after, first, end, (line - other) * width)
        run = after
    last_runs = np.zeros(len(lines), np.int32)
    for run in range(len(lines)):
        parents[run] = parents[parents[run]]  # which comes first, and points to the first of all
        last_runs[parents[run]] = run
    names, count = np.zeros(len(lines), np.int32), 0
    for run in range(len(lines)):
        if last_runs[parents[run]] == run:
            names[parents[run]] = count
            count += 1
    for run in range(len(lines)):
        names[run] = names[parents[run]]
    return names, count


@compiled
def _number(
    firsts: Indices, lasts: Indices, names: Rows, count: int, min_size: int, volume: int, batch: int
) -> tuple[Rows, Rows]:
    """The row of each run's instance, -1 if that is too small, and how many instances each sample has."""
    sizes, some_run, rows = np.zeros(count, np.int64), np.zeros(count, np.int64), np.full(count, -1, np.int32)
    for run in range(len(names)):
        sizes[names[run]] += lasts[run] - firsts[run] + 1
        some_run[names[run]] = run
    counts = np.zeros(batch, np.int32)
    for name in range(count):
        if sizes[name] > min_size:
            sample = firsts[some_run[name]] // volume
            counts[sample] += 1
            rows[name] = counts[sample]
    return rows[names], counts


@compiled
def _measure(
    rows: Rows, firsts: Indices, lasts: Indices, lines: Indices, shape: tuple[int, ...], table: Indices
) -> None:
    """Size, coordinate sums and bounds of each instance."""
    _, depth, height, width = shape
    table[:, :, :_LOWS], table[:, :, _LOWS:_HIGHS], table[:, :, _HIGHS:] = 0, 2**31 - 1, -1
    line, sample, d, h = -1, 0, 0, 0
    for run in range(len(rows)):
        if lines[run] != line:
            line = lines[run]
            sample, d, h = line // height // depth, line // height % depth, line % height
        if rows[run] > 0:
            instance, length = table[sample, rows[run] - 1], lasts[run] - firsts[run] + 1
            instance[SIZE] += length
            for axis, low, high in ((0, d, d), (1, h, h), (2, firsts[run] - line * width, lasts[run] - line * width)):
                instance[_SUMS + axis] += length * (low + high) // 2  # of so many terms from low to high
                instance[_LOWS + axis] = min(instance[_LOWS + axis], low)
                instance[_HIGHS + axis] = max(instance[_HIGHS + axis], high)


@compiled
def spread(begins: Indices, firsts: Indices, lasts: Indices, values: NDArray[Any], places: NDArray[Any]) -> None:
    """Write the value of each run to all that it has from its begin on: places, or, from its first voxel, voxels."""
    for run in range(len(begins)):
        for place in range(begins[run], begins[run] + lasts[run] - firsts[run] + 1):
            places[place] = values[run]


def _find_ids(voxels: Indices, values: NDArray[Any], shape: tuple[int, ...], num_iterations: int) -> Rows:
    """The ids of the components of a foreground, which is where `values` of voxels are not 0, as a volume."""
    begins, firsts, lasts, lines = _cut(voxels, values, shape[-1])
    names, count = _join(firsts, lasts, lines, shape)
    largest, volume = np.zeros(count, dtype=np.int64), np.zeros(shape, dtype=np.int32)
    largest[names] = lasts  # of several values for one name the last stays
    spread(firsts, firsts, lasts, (largest % math.prod(shape[1:]) + 1)[names], volume.reshape(-1))
    if num_iterations > 0:
        # A component of at most rounds + 1 voxels is no wider than `rounds` steps, and stays whole.
        sizes = np.bincount(names, weights=lasts - firsts + 1, minlength=count)
        wide = np.zeros(len(voxels), dtype=np.bool_)
        spread(begins, firsts, lasts, sizes[names] > num_iterations + 1, wide)
        propagate(voxels[wide], volume.reshape(-1), shape, num_iterations)
    return volume


def find_rows(
    voxels: Indices, values: NDArray[Any], shape: tuple[int, ...], num_iterations: int, min_size: int
) -> Instances:
    """The instances of a foreground, which is where `values` of voxels are not 0."""
    if num_iterations > 0:
        ids = _find_ids(voxels, values, shape, num_iterations).reshape(-1)[voxels]
        return number_rows(voxels, ids, shape, min_size)
    runs = _cut(voxels, values, shape[-1])
    names, count = _join(*runs[1:], shape)
    return Instances(*runs, *_number(runs[1], runs[2], names, count, min_size, math.prod(shape[1:]), shape[0]))


def number_rows(voxels: Indices, ids: NDArray[Any], shape: tuple[int, ...], min_size: int) -> Instances:
    """The same, of given ids."""
    runs, volume = _cut(voxels, ids, shape[-1]), math.prod(shape[1:])
    ends = np.searchsorted(runs[1], volume * np.arange(shape[0] + 1)).tolist()
    names, given, count = np.empty(len(runs[0]), dtype=np.int32), ids[runs[0]], 0
    for begin, end in itertools.pairwise(ends):
        different, ranks = np.unique(given[begin:end], return_inverse=True)
        names[begin:end], count = ranks + count, count + len(different)
    return Instances(*runs, *_number(runs[1], runs[2], names, count, min_size, volume, shape[0]))


def measure(sides: list[Instances], shape: tuple[int, ...], capacity: int) -> Tensor:
    """Geometry (sides * B, capacity, 10); capacity 0: as many rows as the largest count."""
    rows = capacity or max(1, *(int(side.counts.max(initial=0)) for side in sides))
    geometry = np.empty((len(sides), shape[0], rows, GEOMETRY_COLUMNS), dtype=np.int64)
    for side, table in zip(sides, geometry, strict=True):
        _measure(side.rows, side.firsts, side.lasts, side.lines, shape, table)
    return torch.from_numpy(geometry).flatten(0, 1)


def _foreground(mask: NDArray[np.bool_]) -> tuple[Indices, Marks]:
    """The voxels of a foreground, and as many values that are not 0."""
    marks = mask.reshape(-1).view(np.uint8)
    return collect(marks, int(np.count_nonzero(marks)))


def components(mask: Tensor, num_iterations: int) -> Tensor:
    """Operator `components` (ops.py)."""
    return torch.from_numpy(_find_ids(*_foreground(mask.numpy()), tuple(mask.shape), num_iterations))


def find_instances(mask: Tensor, num_iterations: int, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `find_instances` (ops.py)."""
    shape = tuple(mask.shape)
    return _answer(find_rows(*_foreground(mask.numpy()), shape, num_iterations, min_size), shape, capacity)


def number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `number_instances` (ops.py)."""
    shape, (voxels, _) = tuple(ids.shape), _foreground(ids.numpy() != 0)
    return _answer(number_rows(voxels, ids.numpy().reshape(-1)[voxels], shape, min_size), shape, capacity)


def _answer(instances: Instances, shape: tuple[int, ...], capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The row map, counts and geometry."""
    volume, (_, firsts, lasts, _, rows, counts) = np.zeros(shape, dtype=np.int32), instances
    spread(firsts, firsts, lasts, np.maximum(rows, 0), volume.reshape(-1))
    return torch.from_numpy(volume), torch.from_numpy(counts), measure([instances], shape, capacity)
