"""The instances of both sides on the CPU: `find` and `row_maps` of ops.py.

Their *sites* are the places, voxels in the order of their indices, and what is there of each side: the row of its
instance from 1, 0 where it is background, and -1 where the foreground belongs to no instance because that is too small
or, of given ids, has none.
"""

import numpy as np
import torch
from torch import Tensor

from .activation import LAB, OUT, Indices, Rows, find_foreground, gather, pixel_sums
from .components import find_rows, measure, number_rows, spread


def read_sites(sites: list[Tensor]) -> tuple[Indices, Rows, Rows]:
    """Voxels, and rows of both sides, without what fills them up."""
    (voxels,), rows = (each.numpy() for each in sites)
    used = int(np.argmin(voxels)) if len(voxels) and voxels[-1] < 0 else len(voxels)
    return voxels[:used], rows[0, :used], rows[1, :used]


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
    voxels, marks, healthy = find_foreground(x, labels, activation, threshold)
    shape, in_labels = tuple(x.shape), marks & LAB
    outputs = find_rows(voxels, marks & OUT, shape, num_iterations, min_size)
    rows = np.zeros((2, len(voxels)), dtype=np.int32)
    if ids is None:
        truths = find_rows(voxels, in_labels, shape, num_iterations, min_size)
    else:
        given = np.where(in_labels, ids.numpy().reshape(-1)[voxels], 0)
        truths = number_rows(voxels, given, shape, min_size)
        rows[1, in_labels != 0] = -1  # what has no id is in no instance
    for side, of_side in zip((outputs, truths), rows, strict=True):
        spread(side.begins, side.firsts, side.lasts, side.rows, of_side)
    places = gather(voxels, rows[0], rows[1], x, labels, activation, pixel)
    sums = pixel_sums(x, places, activation, pixel, pixel_quantity)
    health = torch.ones(len(x), dtype=torch.float64)
    if not healthy:
        each = (find_foreground(*pair, activation, threshold)[-1] for pair in zip(x, labels, strict=True))
        health[~torch.tensor(list(each))] = torch.nan
    sites = [torch.from_numpy(voxels)[None], torch.from_numpy(rows)]
    if capacity:
        sites = [torch.nn.functional.pad(each, (0, x.numel() - len(voxels)), value=-1) for each in sites]
    counts = _count(outputs.counts, truths.counts, max_kept, too_many)
    return sites, sums, health, counts, measure([outputs, truths], shape, capacity)


def _count(outputs: Rows, labels: Rows, max_kept: int, too_many: float) -> Tensor:
    """Outputs, kept outputs and labels of each sample."""
    kept = np.minimum(outputs, max_kept) if max_kept else outputs
    kept = np.where((labels > 0) & (outputs > labels * too_many), 0, kept)
    return torch.from_numpy(np.stack((outputs, kept, labels)))


def row_maps(x: Tensor, sites: list[Tensor]) -> Tensor:
    """Operator `row_maps` (ops.py)."""
    voxels, *sides = read_sites(sites)
    maps = torch.zeros((2 * len(x), *x.shape[1:]), dtype=torch.int32)
    maps.numpy().reshape(2, -1)[:, voxels] = sides
    return maps
