"""What rows of tables need before sums over them begin: zeros, and what follows from geometry alone.

One kernel, since none of it waits for the rest: it clears the sums of the rows that are used, and the table of pairs
that touch (pairs.py); counts how centre boxes overlap (centers.py); and finds the nearest neighbours (proximity.py).
Boxes and neighbours only if they are wanted. Programs share the rows of each side of a sample, up to the counts, which
only the device knows.

Backward: none. Deterministic: integers and minima. Bytes a voxel: those of the pairs, about 4; besides, see there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, table_programs
from .centers import BOX_BLOCK, count_box
from .launches import launch
from .proximity import find_nearest

SUMS_COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
# Two warps of one row a thread: a side rarely has more, and the float64 arithmetic of neighbours wants the registers.
OTHERS_BLOCK, ROWS_WARPS = 64, 2
# Eight slots a thread.
SLOTS_BLOCK = 512


@triton.jit
def _clear(
    sums_ptr,  # (2 B, capacity, 5) float64
    excess_ptr,  # (B, capacity) float64
    pairs_ptr,  # (B, slots) int64
    touched_ptr,  # (B, rest) bool
    side,
    count,
    capacity,
    slots,
    rest,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Clear the first `count` rows of a side; of that of outputs the pairs and the rest, too."""
    program, programs, samples = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) // 2
    nothing = tl.zeros((ROWS,), tl.float64)
    for first in range(program * ROWS, tl.minimum(count, capacity), programs * ROWS):
        row = first + tl.arange(0, ROWS)
        row_ptr = sums_ptr + (side * capacity + row) * SUMS_COLUMNS
        for column in tl.static_range(SUMS_COLUMNS):
            tl.store(row_ptr + column, nothing, mask=row < capacity)
        if side < samples:
            tl.store(excess_ptr + side * capacity + row, nothing, mask=row < capacity)
    if side < samples:
        for first in range(program * SLOTS, slots, programs * SLOTS):
            slot = first + tl.arange(0, SLOTS)
            tl.store(pairs_ptr + side * slots + slot, tl.zeros((SLOTS,), tl.int64), mask=slot < slots)
        for first in range(program * ROWS, tl.minimum(count - capacity, rest), programs * ROWS):
            row = first + tl.arange(0, ROWS)
            tl.store(touched_ptr + side * rest + row, tl.zeros((ROWS,), tl.int1), mask=row < rest)


@triton.jit
def _rows_kernel(
    geometry_ptr,  # (2 B, capacity, 10) int64
    counts_ptr,  # (3, B) int32
    sums_ptr,  # (2 B, capacity, 5) float64
    excess_ptr,  # (B, capacity) float64
    pairs_ptr,  # (B, slots) int64
    touched_ptr,  # (B, rest) bool
    arrived_ptr,  # () int32: programs of terms.py
    owned_ptr,  # (2 B, capacity, 2) int64, or None
    minima_ptr,  # (2 B, capacity) float64, or None
    capacity,
    slots,
    rest,
    D,
    H,
    W,
    offset_z,
    offset_y,
    offset_x,
    PLANAR: tl.constexpr,
    BOX: tl.constexpr,
    OTHERS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    side, sides = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    samples = sides // 2
    other_side = (side + samples) % sides
    # (counts of labels are those behind those of kept outputs)
    count = tl.load(counts_ptr + tl.where(side < samples, OUTPUTS * samples + side, LABELS * samples + side - samples))
    _clear(
        sums_ptr, excess_ptr, pairs_ptr, touched_ptr, side, count, capacity, slots, rest, OTHERS, SLOTS,
    )  # fmt: skip
    if (tl.program_id(0) == 0) & (side == 0):
        tl.store(arrived_ptr, 0)
    rows = tl.minimum(tl.load(counts_ptr + KEPT * samples + side), capacity)
    other_rows = tl.minimum(tl.load(counts_ptr + KEPT * samples + other_side), capacity)
    if owned_ptr is not None:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            count_box(
                geometry_ptr, owned_ptr, side, other_side, row, rows, other_rows, capacity, D, H, W,
                offset_z, offset_y, offset_x, BOX, OTHERS,
            )  # fmt: skip
    if minima_ptr is not None:
        for row in range(tl.program_id(0), tl.maximum(rows, 1), tl.num_programs(0)):
            find_nearest(
                geometry_ptr, minima_ptr, side, other_side, row, rows, other_rows, capacity, D, H, W, PLANAR, OTHERS
            )


def launch_rows(
    geometry: Tensor,
    counts: Tensor,
    shape: list[int],
    pairs: int,
    rest: int,
    offsets: list[int] | None = None,
    proximity: bool = False,
    planar: bool = False,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Sums, excess, pairs, which of the rest touch a label, and a counter, cleared; overlaps and minima, if wanted.

    Overlaps are the voxels each row owns outside [0] and inside [1] the boxes of the other side, (2 B, capacity, 2)
    int64, by the `offsets` of boxes. Minima are the smallest DIoU of each kept output to a label, and of each label to
    one, (2 B, capacity) float64; `planar` ignores the first axis.
    """
    (sides, capacity, _), batch, device = geometry.shape, counts.shape[1], geometry.device
    sizes = (sides, capacity, ops.SUMS_COLUMNS), (batch, capacity)
    sums, excess = (torch.empty(size, dtype=torch.float64, device=device) for size in sizes)
    where = torch.empty((batch, pairs), dtype=torch.int64, device=device)
    touched = torch.empty((batch, rest), dtype=torch.bool, device=device)
    arrived = torch.empty((), dtype=torch.int32, device=device)
    overlaps = minima = None
    num_voxels = math.prod(shape)
    if offsets is not None:
        overlaps = torch.empty((sides, capacity, 2), dtype=torch.int64, device=device)
    if proximity:
        minima = torch.empty((sides, capacity), dtype=torch.float64, device=device)
    if batch > 0:
        # (a table without rows has no place for row 0)
        boxes, nearest = overlaps if num_voxels * capacity > 0 else None, minima if capacity > 0 else None
        launch(_rows_kernel, (table_programs(max(capacity, 1)), sides),
            geometry, counts, sums, excess, where, touched, arrived, boxes, nearest,
            capacity, pairs, rest, *shape, *(offsets or (0, 0, 0)), int(planar),
            block_size(num_voxels, BOX_BLOCK), block_size(capacity, OTHERS_BLOCK), block_size(pairs, SLOTS_BLOCK),
            num_warps=ROWS_WARPS,
        )  # fmt: skip
    return [sums, excess, where, touched, arrived], overlaps, minima
