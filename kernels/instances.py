"""The instances of both sides: `find` and `row_maps` of ops.py, made of the launches of other rooms.

Their *sites* are two: the row maps of both sides, that of the outputs first, with -1 where the foreground belongs to no
instance because that is too small or, of given ids, has none, so that what is not 0 is foreground; and the sizes of the
outputs beyond the tables, (B, rest).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, ops
from .activation import launch_activate
from .blocks import block_size
from .components import find_instances, launch_number_instances
from .launches import launch
from .quantities import PARTS_BLOCK, sum_parts

OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
PART_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS + 1)


@triton.jit
def _finish_kernel(
    found_ptr,  # (2 B,) int32: outputs, labels
    parts_ptr,  # (B, programs, 4) float64: of the sums of the pixel term, and 0 or NaN
    counts_ptr,  # (3, B) int32: outputs, kept outputs, labels
    sums_ptr,  # (B, 3) float64
    health_ptr,  # () float64
    programs,
    max_kept,  # 0: all
    capacity,
    TOO_MANY: tl.constexpr,  # outputs for each label
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0)
    outputs, labels = tl.load(found_ptr + sample), tl.load(found_ptr + B + sample)
    tl.device_assert(labels <= capacity, "labels have too many instances, see docs/limits.md")
    kept = tl.minimum(outputs, max_kept) if max_kept > 0 else outputs
    # (a bare constant would be rounded to float32)
    most = labels.to(tl.float64) * tl.full([], TOO_MANY, tl.float64)
    kept = tl.where((labels > 0) & (outputs > most), 0, kept)
    tl.store(counts_ptr + OUTPUTS * B + sample, outputs)
    tl.store(counts_ptr + KEPT * B + sample, kept)
    tl.store(counts_ptr + LABELS * B + sample, labels)

    for column in tl.static_range(SAMPLE_COLUMNS):
        part_ptr = parts_ptr + sample * programs * PART_COLUMNS + column
        total = sum_parts(part_ptr, programs, PART_COLUMNS, BLOCK)
        tl.store(sums_ptr + sample * SAMPLE_COLUMNS + column, total)
    if sample == 0:  # one health for the batch
        broken = sum_parts(parts_ptr + SAMPLE_COLUMNS, B * programs, PART_COLUMNS, BLOCK)
        tl.store(health_ptr, 1.0 + broken)


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
    masks, parts = launch_activate(x, labels, activation, threshold, pixel, pixel_quantity)
    batch, programs, _ = parts.shape
    rest_sizes = torch.empty((batch, rest), dtype=torch.int32, device=x.device)
    if ids is None:
        # One labelling for both sides.
        rows, found, geometry = find_instances(masks, num_iterations, min_size, capacity, rest_sizes)
    else:
        out = find_instances(masks[:batch], num_iterations, min_size, capacity, rest_sizes)
        lab = launch_number_instances(ids, min_size, capacity)
        rows, found, geometry = (torch.cat(pair) for pair in zip(out, lab, strict=True))
    all_in_instances = ids is None and min_size == 0
    sites = rows if all_in_instances else torch.where(masks & (rows == 0), -1, rows)
    counts = torch.empty((ops.COUNTS, batch), dtype=torch.int32, device=x.device)
    sums = torch.empty((batch, ops.SAMPLE_COLUMNS), dtype=torch.float64, device=x.device)
    health = torch.empty((), dtype=torch.float64, device=x.device)
    if batch > 0:
        block = block_size(programs, PARTS_BLOCK)
        if type(found) is Tensor and found.device.type == "cpu":  # interpreted: assertions do nothing there
            checks.room_for_labels(int(found.numpy()[batch:].max()), capacity)
        # Without `debug` they do nothing on a GPU either. This one ends the use of the device, as PyTorch's own do.
        launch(_finish_kernel, (batch,),
            found, parts, counts, sums, health, programs, min(max_kept, x[0].numel()), capacity, too_many, block,
            debug=True, sanitize_overflow=False,
        )  # fmt: skip
    return [sites, rest_sizes], sums, health, counts, geometry


def launch_row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Foreground of both sides, and their row maps."""
    out, lab = sites[0].chunk(2)
    return out != 0, lab != 0, out.clamp(min=0), lab.clamp(min=0)
