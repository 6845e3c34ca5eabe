"""The instances of both sides: `find` and `row_maps` of ops.py, made of the launches of other rooms.

Their *sites* are two: the row maps of both sides, that of the outputs first, with -1 where the foreground belongs to no
instance because that is too small or, of given ids, has none, so that what is not 0 is foreground; and the sizes of the
outputs beyond the tables, (B, rest).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .activation import launch_activate, launch_activate_cells
from .blocks import block_size
from .components import find_instances, instances_of, launch_number_instances
from .finish import ASSERTING, PARTS_BLOCK, ending_of, finish
from .launches import launch


@triton.jit
def _finish_kernel(
    found_ptr,  # (2 B,) int32: outputs, labels
    parts_ptr,  # (B, programs, 4) float64
    counts_ptr,  # (3, B) int32
    sums_ptr,  # (B, 3) float64
    health_ptr,  # (B,) float64
    programs,
    max_kept,
    capacity,
    TOO_MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    finish(
        sample, B, found_ptr, parts_ptr, counts_ptr, sums_ptr, health_ptr, programs, max_kept, capacity,
        TOO_MANY, BLOCK,
    )  # fmt: skip


def launch_find(
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
    """Sites, sums of the pixel term, health, counts and geometry."""
    options = activation, threshold, pixel, pixel_quantity
    batch, max_kept = len(x), min(max_kept, x[:1].numel())
    rest_sizes = torch.empty((batch, rest), dtype=torch.int32, device=x.device)
    by_cells = ids is None and num_iterations == 0 and min_size == 0 and x.numel() > 0
    if by_cells:
        # One labelling for both sides. All foreground is in instances.
        cells, parts = launch_activate_cells(x, labels, *options)
        ending = ending_of(parts, max_kept)
        sites, found, geometry = instances_of(cells, capacity, rest_sizes, ending, too_many)
    else:
        masks, parts = launch_activate(x, labels, *options)
        ending = ending_of(parts, max_kept)
        if ids is None:
            rows, found, geometry = find_instances(masks, num_iterations, min_size, capacity, rest_sizes)
        else:
            out = find_instances(masks[:batch], num_iterations, min_size, capacity, rest_sizes)
            lab = launch_number_instances(ids, min_size, capacity)
            rows, found, geometry = (torch.cat(pair) for pair in zip(out, lab, strict=True))
        sites = torch.where(masks & (rows == 0), -1, rows)
    if batch > 0 and type(found) is Tensor and found.device.type == "cpu":  # interpreted: assertions do nothing there
        checks.room_for_labels(int(found.numpy()[batch:].max()), capacity)
    if batch > 0 and not by_cells:
        launch(_finish_kernel, (batch,),
            found, *ending, capacity, too_many, block_size(ending.programs, PARTS_BLOCK), num_warps=1, **ASSERTING
        )  # fmt: skip
    return [sites, rest_sizes], ending.sums, ending.health, ending.counts, geometry


def launch_row_maps(x: Tensor, sites: list[Tensor]) -> Tensor:
    """The row maps of both sides."""
    return sites[0].clone()
