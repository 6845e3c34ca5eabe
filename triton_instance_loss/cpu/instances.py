"""The instances of both sides on the CPU: `find` and `row_maps` of ops.py.

Their *sites* are the voxels of either foreground, and the few *groups* they belong to: what the sums and the gradient
ask about a voxel (sample, rows of its instances, what is there) is the same for all of a group.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import GROUP_LINES
from .activation import Foreground, Indices, find_foreground, pixel_sums
from .components import fill, find_rows, number_rows

OUT, LAB, FRACTION = 1, 2, 4  # bits of a group: a is foreground, y is, the label is neither 0 nor 1


class Sites(NamedTuple):
    """Voxels, ascending, and their groups."""

    voxels: Indices
    group: Indices  # of each voxel
    sample: Indices  # of each group, like all that follows
    out: Indices  # row of the output instance from 1, 0 = none
    lab: Indices
    bits: Indices
    size: Indices  # how many voxels it has

    @classmethod
    def read(cls, sites: list[Tensor]) -> "Sites":
        """From the tensors, without the columns at their ends that are not used."""
        voxels, groups = (each.numpy() for each in sites)
        return cls(*voxels[:, : _used(voxels[0] >= 0)], *groups[:, : _used(groups[-1] > 0)])


def _used(columns: NDArray[np.bool_]) -> int:
    """How many columns there are before the first that is not used."""
    return len(columns) if columns.all() else int(np.argmin(columns))


def find(
    x: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    activation: int,
    threshold: float,
    pixel: int,
    pixel_quantity: int,
    num_iterations: int,
    min_size: int,
    max_kept: int,
    too_many: float,
    capacity: int,
    rest: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Operator `find` (ops.py)."""
    foreground = find_foreground(x, labels, activation, threshold)
    (batch, *shape), search = x.shape, (num_iterations, min_size, capacity)
    is_out, is_lab = np.flatnonzero(foreground.out), np.flatnonzero(foreground.lab)
    outputs, truths = foreground.voxels[is_out], foreground.voxels[is_lab]
    if ids is None:
        # One labelling for both sides: outputs first, then labels.
        both = np.concatenate((outputs, truths + x.numel()))
        rows, found, geometry = find_rows(both, (2 * batch, *shape), *search)
        out_rows, lab_rows = np.split(rows, [len(outputs)])
    else:
        out_rows, out_found, out_geometry = find_rows(outputs, (batch, *shape), *search)
        given = ids.numpy().reshape(-1)[truths]
        is_lab, truths, given = is_lab[given != 0], truths[given != 0], given[given != 0]
        lab_rows, lab_found, lab_geometry = number_rows(truths, given, (batch, *shape), min_size, capacity)
        found = torch.cat((out_found, lab_found))
        geometry = torch.nn.utils.rnn.pad_sequence([*out_geometry, *lab_geometry], batch_first=True)
    sums, health = pixel_sums(x, foreground, activation, pixel, pixel_quantity)
    out, lab = np.zeros((2, len(foreground.voxels)), dtype=np.int64)
    out[is_out], lab[is_lab] = out_rows, lab_rows
    sites = _group(foreground, out, lab, x[0].numel())
    if capacity:
        sites = [torch.nn.functional.pad(each, (0, x.numel() - each.shape[1]), value=-1) for each in sites]
    return sites, sums, health, _count(found.numpy(), max_kept, too_many), geometry


def _count(found: NDArray[np.int32], max_kept: int, too_many: float) -> Tensor:
    """Outputs, kept outputs and labels of each sample."""
    outputs, labels = np.split(found, 2)
    kept = np.minimum(outputs, max_kept) if max_kept else outputs
    return torch.from_numpy(
        np.stack((outputs, np.where((labels > 0) & (outputs > labels * too_many), 0, kept), labels))
    )


def _group(foreground: Foreground, out: Indices, lab: Indices, volume: int) -> list[Tensor]:
    """The sites: voxels that differ in nothing that is asked have the same key."""
    voxels = foreground.voxels
    bits = ((foreground.labels != 0) & (foreground.labels != 1)) * np.uint8(FRACTION)
    bits |= foreground.out.view(np.uint8) | foreground.lab.view(np.uint8) * np.uint8(LAB)  # True is OUT
    # How many samples, rows and bits there are: a key holds one of each, the last one running fastest.
    of_key = (
        int(voxels[-1]) // volume + 1 if len(voxels) else 1,
        int(out.max(initial=0)) + 1,
        int(lab.max(initial=0)) + 1,
        8,
    )
    key = (out * of_key[2] + lab) * of_key[3] + bits
    if of_key[0] > 1:
        key += voxels // volume * (of_key[1] * of_key[2] * of_key[3])
    if math.prod(of_key) <= len(key):
        sizes = np.bincount(key)
        keys = np.flatnonzero(sizes)
        name_of = np.empty(len(sizes), dtype=np.int64)
        name_of[keys] = np.arange(len(keys))
        group, size = name_of[key], sizes[keys]
    else:
        keys, group, size = np.unique(key, return_inverse=True, return_counts=True)
    groups = np.empty((GROUP_LINES, len(keys)), dtype=np.int64)
    groups[:-1], groups[-1] = np.unravel_index(keys, of_key), size
    return [torch.from_numpy(np.stack((voxels, group))), torch.from_numpy(groups)]


def row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `row_maps` (ops.py)."""
    read, shape = Sites.read(sites), tuple(x.shape)
    foreground, y = (fill(shape, read.voxels, ((read.bits & bit) != 0)[read.group]).bool() for bit in (OUT, LAB))
    return (
        foreground,
        y,
        fill(shape, read.voxels, read.out[read.group]),
        fill(shape, read.voxels, read.lab[read.group]),
    )
