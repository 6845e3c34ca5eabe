"""The instances of a batch: where they are, how many, and how large."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .activation import activation_of, for_each_class
from .components import capacity_bound, rows_of_tables
from .options import Options

# A row for each instance there could be, one a 2x2x2 block of voxels, would make tables larger than everything else. In
# noise a fifth of the blocks at most make a component of their own, in images a third (tests/test_instances.py); only
# lattices have more. Outputs beyond `max_cc_out` need no row, so outputs may be anything, but labels that are such a
# lattice are an error (kernels/instances.py). With so few rows as FEW_ROWS memory does not matter.
BLOCKS_A_ROW = {2: 2, 3: 4}
FEW_ROWS = 4096


class Found(NamedTuple):
    """The instances of a batch."""

    sites: tuple[Tensor, Tensor]  # where the foreground is, and which instance that is, as the backend likes it
    counts: Tensor  # (3, B) int32: outputs, kept outputs, labels; outputs 1..kept are used individually
    geometry: Tensor  # (2 B, rows, 10) int64, outputs before labels, columns as ops.py names them
    pixel_sums: Tensor  # (B, 3) float64: sums of the pixel term
    health: Tensor  # (B,) float64: 1, or NaN if x or the labels are broken
    pairs: int  # how many slots the pairs (kept output, label) that touch need


class Search(NamedTuple):
    """How instances are found, in the words of the operator `find`."""

    ids: Tensor | None
    options: tuple[Any, ...]
    pairs: int  # how many slots the pairs (kept output, label) that touch need


def search(
    x: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None,
    pixel: tuple[int, int],
    options: Options,
    every: bool = False,
) -> Search:
    """How the instances of a call are found.

    `pixel` says what the pixel term sees, and the code of its quantity; `every`: each output is to have a row.
    """
    bound = capacity_bound(x.shape, options.num_iterations)
    on_gpu = ops.backend(x) == "triton"
    ids = None
    if cc_label_batch is not None:
        ids = for_each_class(cc_label_batch, options)
        if on_gpu:  # the CPU looks at labels anyway
            ids = ids * (labels > 0.5)
        bound = x[0].numel()
    rows = bound if on_gpu else rows_of_tables(x, bound)
    some_suffice = not every and ids is None and options.num_iterations is None and options.max_cc_out > 0
    if some_suffice and on_gpu:
        rows = min(rows, max(bound // BLOCKS_A_ROW[options.spatial_dims], FEW_ROWS, options.max_cc_out))
    of_instances = options.num_iterations or 0, options.min_instance_size
    of_kept = options.max_cc_out, float(options.mul_too_many)
    wanted = *activation_of(options), *pixel, *of_instances, *of_kept, rows, bound - rows if rows > 0 else 0
    # A voxel makes at most one pair, and whole components at most one a 2x2x2 block; a hash set is to stay half empty.
    return Search(ids, wanted, 2 * bound)


def find(x: Tensor, labels: Tensor, how: Search) -> Found:
    """Label both volumes, number and measure their instances, and decide which outputs are kept."""
    sites, pixel_sums, health, counts, geometry = ops.find(x, labels, how.ids, *how.options)
    where, which = sites
    return Found((where, which), counts, geometry, pixel_sums, health, how.pairs)


def instances_of_all(counts: Tensor, options: Options) -> Tensor | None:
    """Kept outputs and labels of each class in all processes, a share of each process: (2, classes) float64.

    A sample without any counts as one. None without a process group, or where samples are averaged and not instances.
    """
    if options.process_group is None or options.instance_wise_reduce != "instance":
        return None
    group = None if options.process_group == "world" else options.process_group
    mine = counts[ops.KEPT :].clamp(min=1).view(2, -1, len(options.classes)).sum(1, dtype=torch.float64)
    torch.distributed.all_reduce(mine, group=group)
    return mine / torch.distributed.get_world_size(group)
