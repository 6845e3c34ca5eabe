"""What is done before anything is summed: tables are cleared, and what follows from geometry alone is made.

Centre boxes (centers.py) and distances (proximity.py) hang neither on each other nor on sums. So one launch does all of
it: a step has two launches fewer. Rows are shared out among programs from the first one for boxes and from the last one
for distances, so that where there are few, they go to different programs, which run at the same time.

Backward: none. Deterministic: zeros, integers and minima. Bytes a voxel: none; 8 a slot of the pairs, 48 for each row
that is used, and what centers.py and proximity.py say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, table_programs
from .centers import BOX_BLOCK, overlap_boxes
from .launches import bits_of, launch
from .proximity import nearest_boxes

COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
# Two warps of one row of the other side a thread: a side rarely has more, and boxes want the registers.
OTHERS_BLOCK, WARPS = 64, 2
CLEAR_BLOCK = 256


class Cleared(NamedTuple):
    """Tables that are added to, all zeros in the rows that are used."""

    sums: Tensor  # (2 B, capacity, 5) float64
    excess: Tensor  # (B, capacity) float64
    pairs: Tensor  # (B, slots) int64
    touched: Tensor  # (B, rest) bool
    finished: Tensor  # () int32: programs that are done


@triton.jit
def _clear(
    counts_ptr,
    sums_ptr,
    excess_ptr,
    pairs_ptr,
    touched_ptr,
    finished_ptr,
    side,
    capacity,
    slots,
    rest,
    BLOCK: tl.constexpr,
):
    """Write zeros: in the rows of a side that are used and, with outputs, in what there is once a sample."""
    B = tl.num_programs(1) // 2
    is_output, sample = side < B, side % B
    outputs, labels = tl.load(counts_ptr + OUTPUTS * B + sample), tl.load(counts_ptr + LABELS * B + sample)
    start, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    nothing = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, tl.minimum(tl.where(is_output, outputs, labels), capacity), step):
        row = first + tl.arange(0, BLOCK)
        for column in tl.static_range(COLUMNS):
            tl.store(sums_ptr + (side * capacity + row) * COLUMNS + column, nothing, mask=row < capacity)
    if is_output:
        for first in range(start, tl.minimum(outputs, capacity), step):
            row = first + tl.arange(0, BLOCK)
            tl.store(excess_ptr + sample * capacity + row, nothing, mask=row < capacity)
        for first in range(start, slots, step):
            slot = first + tl.arange(0, BLOCK)
            tl.store(pairs_ptr + sample * slots + slot, tl.zeros((BLOCK,), tl.int64), mask=slot < slots)
        for first in range(start, tl.minimum(outputs - capacity, rest), step):
            row = first + tl.arange(0, BLOCK)
            tl.store(touched_ptr + sample * rest + row, tl.zeros((BLOCK,), tl.int1), mask=row < rest)
        if (tl.program_id(0) == 0) & (sample == 0):
            tl.store(finished_ptr, 0)


# (the spacing comes as bits: Triton would round it, and compile for each)
@triton.jit(do_not_specialize=["step_d", "step_h", "step_w"])
def _prepare_kernel(
    counts_ptr,  # (3, B) int32
    geometry_ptr,  # (2 B, capacity, 10) int64
    sums_ptr,  # (2 B, capacity, 5) float64
    excess_ptr,  # (B, capacity) float64
    pairs_ptr,  # (B, slots) int64
    touched_ptr,  # (B, rest) bool
    finished_ptr,  # () int32
    owned_ptr,  # (2 B, capacity, 2) int64, or None: no centre boxes
    distances_ptr,  # (2 B, capacity) float64, or None: no distances
    capacity,
    slots,
    rest,
    D,
    H,
    W,
    offset_z,
    offset_y,
    offset_x,
    step_d: tl.int64,
    step_h: tl.int64,
    step_w: tl.int64,
    PLANAR: tl.constexpr,
    CLEAR: tl.constexpr,
    BOX: tl.constexpr,
    OTHERS: tl.constexpr,
):
    side, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    B, from_last = tl.num_programs(1) // 2, tl.num_programs(0) - 1 - program
    used_ptr = counts_ptr + KEPT * B  # kept outputs, then labels
    if (side >= B) & (tl.minimum(program, from_last) >= tl.maximum(tl.load(used_ptr + side), 1)):
        return  # there is no label for it, and all else that is cleared goes with outputs
    if distances_ptr is not None:
        nearest_boxes(
            geometry_ptr, used_ptr, distances_ptr, from_last, side, capacity, D, H, W,
            step_d, step_h, step_w, PLANAR, OTHERS,
        )  # fmt: skip
    if owned_ptr is not None:
        overlap_boxes(
            geometry_ptr, used_ptr, owned_ptr, program, side, capacity, D, H, W, offset_z, offset_y, offset_x,
            BOX, OTHERS,
        )  # fmt: skip
    _clear(counts_ptr, sums_ptr, excess_ptr, pairs_ptr, touched_ptr, finished_ptr, side, capacity, slots, rest, CLEAR)


def prepare(
    geometry: Tensor,
    counts: Tensor,
    pairs: int,
    rest: int,
    shape: Sequence[int] = (1, 1, 1),
    reach: Sequence[int] | None = None,
    planar: bool = False,
    spacing: Sequence[float] | None = None,
) -> tuple[Cleared, Tensor | None, Tensor | None]:
    """Tables for sums, and for `pairs` and a `rest` of outputs beyond them, of the instances of both sides.

    With `reach`, how far centre boxes reach along each axis of a volume of `shape`, voxels that each row owns outside
    [0] and inside [1] the boxes of the other side, (2 B, capacity, 2) int64. With `spacing`, the smallest DIoU of each
    kept output to a label, and of each label to one, (2 B, capacity) float64; `planar` ignores the first axis.
    """
    (sides, capacity, _), batch = geometry.shape, counts.shape[1]
    f64, device = torch.float64, geometry.device
    cleared = Cleared(
        torch.empty((sides, capacity, ops.SUMS_COLUMNS), dtype=f64, device=device),
        torch.empty((batch, capacity), dtype=f64, device=device),
        torch.empty((batch, pairs), dtype=torch.int64, device=device),
        torch.empty((batch, rest), dtype=torch.bool, device=device),
        torch.empty((), dtype=torch.int32, device=device),
    )
    owned = distances = None
    if reach is not None:
        owned = torch.empty((sides, capacity, 2), dtype=torch.int64, device=device)
    if spacing is not None:
        distances = torch.empty((sides, capacity), dtype=f64, device=device)
    if batch > 0:
        blocks = block_size(pairs, CLEAR_BLOCK), block_size(shape[0] * shape[1] * shape[2], BOX_BLOCK)
        launch(_prepare_kernel, (max(table_programs(capacity), 1), sides),
            counts, geometry, *cleared, owned, distances, capacity, pairs, rest, *shape, *(reach or (0, 0, 0)),
            *bits_of(spacing or (1.0, 1.0, 1.0)), int(planar), *blocks, block_size(capacity, OTHERS_BLOCK),
            num_warps=WARPS,
        )  # fmt: skip
    return cleared, owned, distances
