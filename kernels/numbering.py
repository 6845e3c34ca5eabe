"""From ids to instances: rows 1..n in the order of the ids, and one line of geometry for each.

1. `_tally_kernel`: how many voxels each id has, in a table by id (an id is at most the number of voxels). Without a
   smallest size it is enough to know that there is one, a plain store.
2. A running count of the tallies that are large enough (`torch.cumsum`) gives each id its row.
3. `_begin_kernel`: the number of instances of each sample, and their lines as they are before any voxel is added.
4. `_geometry_kernel`: each voxel looks its row up, and the block adds up size, coordinates and bounds of the
   instances in it.

A large instance is one address, on which atomics of single voxels would queue. So a block first adds up by itself:
while lanes remain, take the largest key, reduce its lanes, send one scalar atomic for each number, drop those lanes.

Backward: none. Deterministic: integers only. Bytes a voxel: 4 + 4 read and 4 written besides the table by id, which
is 4 zeroed, 4 + 4 counted, and is looked up by foreground only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, coordinates, table_programs

COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
COORDINATE_SUMS: tl.constexpr = tl.constexpr(ops.COORDINATE_SUMS.start)
LOWS: tl.constexpr = tl.constexpr(ops.LOWS.start)
HIGHS: tl.constexpr = tl.constexpr(ops.HIGHS.start)
# One warp reduces without barriers; 8 voxels a thread share the cost of the loop.
REDUCE_BLOCK, REDUCE_WARPS = 256, 1
FARTHEST: tl.constexpr = tl.constexpr(2**31 - 1)
ROWS_BLOCK = 128


@triton.jit
def _add_axis(row_ptr, position, here, AXIS: tl.constexpr):
    """Add the coordinates of the lanes `here` along one axis to the sums and bounds of a row."""
    total = tl.sum(tl.where(here, position, 0).to(tl.int64), axis=0)
    low = tl.min(tl.where(here, position, FARTHEST), axis=0).to(tl.int64)
    high = tl.max(tl.where(here, position, -1), axis=0).to(tl.int64)
    tl.atomic_add(row_ptr + COORDINATE_SUMS + AXIS, total, sem="relaxed")
    tl.atomic_min(row_ptr + LOWS + AXIS, low, sem="relaxed")
    tl.atomic_max(row_ptr + HIGHS + AXIS, high, sem="relaxed")


@triton.jit
def _tally_kernel(
    ids_ptr,  # (B, V) int32
    tallies_ptr,  # (B, V) int32
    V,
    COUNTING: tl.constexpr,  # False: only whether an id is there
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1).to(tl.int64) * V
    id = tl.load(ids_ptr + start + voxel, mask=voxel < V, other=0)
    tallies_ptr += start - 1  # ids start at 1
    if COUNTING:
        while tl.max(id, axis=0) > 0:
            largest = tl.max(id, axis=0)
            here = id == largest
            tl.atomic_add(tallies_ptr + largest, tl.sum(here.to(tl.int32), axis=0), sem="relaxed")
            id = tl.where(here, 0, id)
    else:
        tl.store(tallies_ptr + id, 1, mask=id > 0)


@triton.jit
def _begin_kernel(
    ranks_ptr,  # (B, V) int32: large enough ids up to this one, those of earlier samples included
    counts_ptr,  # (B,) int32
    geometry_ptr,  # (B, capacity, 10) int64
    V,
    capacity,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    ranks_ptr += (sample + 1) * V - 1
    count = tl.load(ranks_ptr) - tl.load(ranks_ptr - V, mask=sample > 0, other=0)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + sample, count)
    rows = tl.minimum(count, capacity)
    for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        row_ptr = geometry_ptr + (sample * capacity + row) * COLUMNS
        for column in tl.static_range(COLUMNS):
            start = FARTHEST if (column >= LOWS) & (column < HIGHS) else (-1 if column >= HIGHS else 0)
            tl.store(row_ptr + column, tl.full((BLOCK,), start, tl.int64), mask=row < rows)


@triton.jit
def _geometry_kernel(
    ids_ptr,  # (B, V) int32
    tallies_ptr,  # (B, V) int32
    ranks_ptr,  # (B, V) int32: large enough ids up to this one, those of earlier samples included
    rows_ptr,  # (B, V) int32
    geometry_ptr,  # (B, capacity, 10) int64
    V,
    H,
    W,
    min_size,
    capacity,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    start = sample * V
    id = tl.load(ids_ptr + start + voxel, mask=voxel < V, other=0)
    tally = tl.load(tallies_ptr + start - 1 + id, mask=id > 0, other=0)
    enough = (id > 0) & (tally > min_size)
    earlier = tl.load(ranks_ptr + start - 1, mask=sample > 0, other=0)
    row = tl.load(ranks_ptr + start - 1 + id, mask=enough, other=0) - earlier
    row = tl.where(enough, row, 0)
    tl.store(rows_ptr + start + voxel, row, mask=voxel < V)

    z, y, x = coordinates(voxel, H, W)
    row = tl.where(row <= capacity, row, 0)  # more than the caller promised: not in the table
    while tl.max(row, axis=0) > 0:
        largest = tl.max(row, axis=0)
        here = row == largest
        row_ptr = geometry_ptr + (sample * capacity + largest - 1) * COLUMNS
        tl.atomic_add(row_ptr + SIZE, tl.sum(here.to(tl.int64), axis=0), sem="relaxed")
        _add_axis(row_ptr, z, here, 0)
        _add_axis(row_ptr, y, here, 1)
        _add_axis(row_ptr, x, here, 2)
        row = tl.where(here, 0, row)


def number(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of `ids` (B, D, H, W) int32, which are 0 or 1..V.

    Ids of `min_size` voxels or fewer become background. The caller promises at most `capacity` others in a sample.
    """
    batch, depth, height, width = ids.shape
    num_voxels = depth * height * width
    rows = torch.empty_like(ids)
    counts = torch.empty(batch, dtype=torch.int32, device=ids.device)
    geometry = torch.empty((batch, capacity, ops.GEOMETRY_COLUMNS), dtype=torch.int64, device=ids.device)
    if ids.numel() == 0:
        return rows, counts.zero_(), geometry
    block = block_size(num_voxels, REDUCE_BLOCK)
    grid = (triton.cdiv(num_voxels, block), batch)
    tallies = torch.zeros_like(ids)
    _tally_kernel[grid](ids, tallies, num_voxels, min_size > 0, block, num_warps=REDUCE_WARPS)
    # One flat cumsum: along the last axis of a few long rows, torch's runs on a few threads.
    ranks = (tallies > min_size).flatten().cumsum(0, dtype=torch.int32)
    block_of_rows = block_size(capacity, ROWS_BLOCK)
    _begin_kernel[(table_programs(triton.cdiv(capacity, block_of_rows)), batch)](
        ranks, counts, geometry, num_voxels, capacity, block_of_rows
    )
    _geometry_kernel[grid](
        ids, tallies, ranks, rows, geometry,
        num_voxels, height, width, min_size, capacity, block, num_warps=REDUCE_WARPS,
    )  # fmt: skip
    return rows, counts, geometry
