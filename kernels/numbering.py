"""From ids to instances: rows 1..n in the order of the ids, and one line of geometry for each.

Ids are ranked by their *names*, a volume that is looked up by id: the place of id i is that of voxel i - 1. There
stands the id itself if it is used, 0 if not; once the id has a row, minus that row.

After union-find the ids are their own names. A component has the id of its last voxel, its *root*: that voxel holds its
own id, and no other voxel does. How many roots each block has is known from finding them (components.py).

Other ids have no such voxel. After rounds of pooling, voxel i - 1 may hold a larger id than i; given ids are only
numbers; and ids of too few voxels are not used. For these, two kernels fill a volume of names:

- `_tally_kernel`: how many voxels each id has. Without a smallest size it is enough to know that there is one, a plain
  store.
- `_count_kernel`: an id of enough voxels becomes a name, any other 0; and how many names each block has.

The rest is the same for both:

1. A running count of the names of all blocks (`torch.cumsum`) says with which row each block begins.
2. `_rank_kernel`: the names of a block get their rows. The lines of these rows become what they are before any voxel is
   added, and the last block of a sample writes how many instances that has.
3. `_geometry_kernel`: each voxel looks its row up and writes it over its id; the block adds up size, coordinates and
   bounds of the instances in it. Rows beyond the table have a place in a narrow one for their sizes, if there is room.

Where ids are their own names, programs write rows over them while others look names up. They look up nothing but
roots, and a root holds minus its row until its own lane writes, and the row from then on: the absolute value is the row
in both cases. Nor can a lane take a row for an id: no other lane writes to its voxel, which it reads once, before it
writes. What it reads there is an id if positive, and minus its row, at a root, if negative.

A large instance is one address, on which atomics of single voxels would queue. So a block first adds up by itself:
while lanes remain, take the largest key, reduce its lanes, send one scalar atomic for each number, drop those lanes.

Backward: none. Deterministic: integers only, and the row of an id depends on nothing but which ids are used. Bytes a
voxel after union-find: 4 read, and again in blocks with a root; foreground also looks its name up and has 4 written.
For other ids, besides: 4 zeroed and 4 + 4 read. Memory: the row map takes that of the ids; two numbers a block; and 4
bytes a voxel for a volume of names where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, coordinates, cut
from .finish import ASSERTING, PARTS_BLOCK, Ending, finish
from .launches import launch
from .nodes import Cells, bits_of_row, cell_coordinates, node_of, row_of, rows_of

COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
COORDINATE_SUMS: tl.constexpr = tl.constexpr(ops.COORDINATE_SUMS.start)
LOWS: tl.constexpr = tl.constexpr(ops.LOWS.start)
HIGHS: tl.constexpr = tl.constexpr(ops.HIGHS.start)
# One warp reduces without barriers; 8 voxels a thread share the cost of the loop. Never more threads than lanes: of two
# threads on one lane, the second could read what the first has written over a name.
REDUCE_BLOCK, REDUCE_WARPS = 256, 1
# One cell a thread of one warp: with more, a block is less often background.
CELLS_BLOCK = 32
# Blocks a program ranks: in most there is no name.
RANK_BLOCKS: tl.constexpr = tl.constexpr(8)
FARTHEST: tl.constexpr = tl.constexpr(2**31 - 1)


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
def _room(sample, capacity, rest_samples, rest):
    """How many rows of a sample there is any room for."""
    return capacity + tl.where(sample < rest_samples, rest, 0)


@triton.jit
def _tally_kernel(
    ids_ptr,  # (B, V) int32
    tallies_ptr,  # (B, V) int32, zeros: voxels of each id
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
def _count_kernel(
    names_ptr,  # (B, V) int32: voxels of each id, which become the id if they are enough, or 0
    parts_ptr,  # (B, programs) int32: names in each block
    V,
    min_size,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    names_ptr += sample * V
    tally = tl.load(names_ptr + voxel, mask=voxel < V, other=0)
    enough = tally > min_size
    tl.store(names_ptr + voxel, tl.where(enough, voxel + 1, 0), mask=tally > 0)
    tl.store(parts_ptr + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(enough.to(tl.int32), axis=0))


@triton.jit
def _rank_kernel(
    names_ptr,  # (B, V) int32: each id that is used, in its place, which becomes minus its row
    ends_ptr,  # (B, blocks) int32: names up to the end of each block, those of earlier samples included
    counts_ptr,  # (B,) int32
    geometry_ptr,  # (B, capacity, 10) int64
    rest_sizes_ptr,  # (B', rest) int32, of the first B' samples
    V,
    blocks,
    capacity,
    rest_samples,
    rest,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    earlier = tl.load(ends_ptr + sample * blocks - 1, mask=sample > 0, other=0)
    ends_ptr += sample * blocks
    names_ptr += sample * V
    first = tl.program_id(0) * RANK_BLOCKS
    beyond = tl.minimum(first + RANK_BLOCKS, blocks)
    before = tl.load(ends_ptr + first - 1, mask=sample + first > 0, other=0) - earlier
    last = tl.load(ends_ptr + beyond - 1) - earlier
    for block in range(first, tl.where(last > before, beyond, first)):
        end = tl.load(ends_ptr + block) - earlier
        if end > before:  # most blocks have no name, and so nothing to read
            voxel = block * BLOCK + tl.arange(0, BLOCK)
            used = tl.load(names_ptr + voxel, mask=voxel < V, other=0) == voxel + 1
            row = before + tl.cumsum(used.to(tl.int32), axis=0)
            tl.store(names_ptr + voxel, -row, mask=used)
            row_ptr = geometry_ptr + (sample * capacity + row - 1) * COLUMNS
            in_table = used & (row <= capacity)
            for column in tl.static_range(COLUMNS):
                start = FARTHEST if (column >= LOWS) & (column < HIGHS) else (-1 if column >= HIGHS else 0)
                tl.store(row_ptr + column, tl.full((BLOCK,), start, tl.int64), mask=in_table)
            in_rest = used & (row > capacity) & (row <= _room(sample, capacity, rest_samples, rest))
            tl.store(rest_sizes_ptr + sample * rest + row - capacity - 1, tl.zeros_like(row), mask=in_rest)
        before = end
    if beyond == blocks:
        tl.store(counts_ptr + sample, last)


@triton.jit
def _geometry_kernel(
    ids_ptr,  # (B, V) int32, which become rows
    names_ptr,  # (B, V) int32, perhaps the same volume: minus the row of each id, or 0
    geometry_ptr,  # (B, capacity, 10) int64
    rest_sizes_ptr,  # (B', rest) int32, of the first B' samples
    V,
    H,
    W,
    capacity,
    rest_samples,
    rest,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    ids_ptr += sample * V
    id = tl.load(ids_ptr + voxel, mask=voxel < V, other=0)
    if tl.max(tl.abs(id), axis=0) > 0:  # most blocks are background
        found = tl.load(names_ptr + sample * V - 1 + id, mask=id > 0, other=0)
        row = tl.where(id > 0, tl.abs(found), -id)  # negative: a root, which holds minus its row
        tl.store(ids_ptr + voxel, row, mask=id != 0)

        z, y, x = coordinates(voxel, H, W)
        row = tl.where(row <= _room(sample, capacity, rest_samples, rest), row, 0)  # more than promised: nowhere
        while tl.max(row, axis=0) > 0:
            largest = tl.max(row, axis=0)
            here = row == largest
            size = tl.sum(here.to(tl.int32), axis=0)
            if largest <= capacity:
                row_ptr = geometry_ptr + (sample * capacity + largest - 1) * COLUMNS
                tl.atomic_add(row_ptr + SIZE, size.to(tl.int64), sem="relaxed")
                _add_axis(row_ptr, z, here, 0)
                _add_axis(row_ptr, y, here, 1)
                _add_axis(row_ptr, x, here, 2)
            else:
                tl.atomic_add(rest_sizes_ptr + sample * rest + largest - capacity - 1, size, sem="relaxed")
            row = tl.where(here, 0, row)


@triton.jit
def _voxels(occupancy, BITS: tl.constexpr):
    """How many of some voxels of a cell are foreground."""
    pairs = (occupancy & BITS & 0x55) + ((occupancy & BITS) >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours & 0x0F) + (fours >> 4)


@triton.jit
def _add_axis_of_cells(row_ptr, occupancy, position, AXIS: tl.constexpr, FAR: tl.constexpr):
    """Add the coordinates of cells along one axis to the sums and bounds of a row; FAR bits are one further."""
    # Two sums fit int32, which a GPU adds at once: at most 8 voxels of CELLS_BLOCK cells, and half of a number's bits.
    size = _voxels(occupancy, 0xFF)
    total = tl.sum((position & 0xFFFF) * size + _voxels(occupancy, FAR), axis=0).to(tl.int64)
    total += tl.sum((position >> 16) * size, axis=0).to(tl.int64) << 16
    low = position + ((occupancy & (0xFF - FAR)) == 0).to(tl.int32)
    high = position + ((occupancy & FAR) != 0).to(tl.int32)
    low = tl.min(tl.where(occupancy != 0, low, FARTHEST), axis=0).to(tl.int64)
    high = tl.max(tl.where(occupancy != 0, high, -1), axis=0).to(tl.int64)
    tl.atomic_add(row_ptr + COORDINATE_SUMS + AXIS, total, sem="relaxed")
    tl.atomic_min(row_ptr + LOWS + AXIS, low, sem="relaxed")
    tl.atomic_max(row_ptr + HIGHS + AXIS, high, sem="relaxed")


@triton.jit
def _cells_geometry_kernel(
    cells_ptr,  # (B, N) uint8
    ids_ptr,  # (B, V) int32: the root of each node, or minus its row; which become rows
    geometry_ptr,  # (B, capacity, 10) int64
    rest_sizes_ptr,  # (B', rest) int32, of the first B' samples
    found_ptr,  # (B,) int32
    parts_ptr,  # what `finish` takes, or None
    counts_ptr,
    sums_ptr,
    health_ptr,
    programs,
    max_kept,
    D,
    H,
    W,
    N,
    capacity,
    rest_samples,
    rest,
    TOO_MANY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    if parts_ptr is not None:
        samples = tl.num_programs(1) // 2  # of which each has outputs and labels
        if (tl.program_id(0) == 0) & (sample < samples):
            finish(
                sample, samples, found_ptr, parts_ptr, counts_ptr, sums_ptr, health_ptr, programs, max_kept, capacity,
                TOO_MANY, PARTS,
            )  # fmt: skip
    ids_ptr += sample * D * H * W
    occupancy = tl.load(cells_ptr + sample * N + cell, mask=cell < N, other=0).to(tl.int32)
    if tl.max(occupancy, axis=0) > 0:  # most cells are background
        z, y, x = cell_coordinates(cell, H, W)
        id = tl.load(ids_ptr - 1 + node_of(occupancy, z, y, x, H, W), mask=occupancy != 0, other=0)
        found = tl.load(ids_ptr - 1 + id, mask=id > 0, other=0)
        row = tl.where(id > 0, tl.abs(found), -id)  # negative: a root, which holds minus its row
        for line in tl.static_range(ROWS):
            voxel, inside = row_of(z, y, x, occupancy != 0, D, H, W, line, EVEN)
            foreground = bits_of_row(inside, line) & occupancy[:, None]
            tl.store(ids_ptr + voxel, tl.where(foreground != 0, row[:, None], 0), mask=inside)

        row = tl.where(row <= _room(sample, capacity, rest_samples, rest), row, 0)  # more than promised: nowhere
        while tl.max(row, axis=0) > 0:
            largest = tl.max(row, axis=0)
            here = tl.where(row == largest, occupancy, 0)
            size = tl.sum(_voxels(here, 0xFF), axis=0)
            if largest <= capacity:
                row_ptr = geometry_ptr + (sample * capacity + largest - 1) * COLUMNS
                tl.atomic_add(row_ptr + SIZE, size.to(tl.int64), sem="relaxed")
                _add_axis_of_cells(row_ptr, here, z, 0, 0xF0)
                _add_axis_of_cells(row_ptr, here, y, 1, 0xCC)
                _add_axis_of_cells(row_ptr, here, x, 2, 0xAA)
            else:
                tl.atomic_add(rest_sizes_ptr + sample * rest + largest - capacity - 1, size, sem="relaxed")
            row = tl.where(row == largest, 0, row)


def blocks_of(ids: Tensor) -> tuple[int, int]:
    """Lanes of a program and programs a sample: the blocks in which names are counted and ranked."""
    num_voxels = ids.shape[1:].numel()
    block = block_size(num_voxels, REDUCE_BLOCK)
    return block, cut(num_voxels, block)


def number(
    ids: Tensor, min_size: int, capacity: int, rest_sizes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of `ids` (B, D, H, W) int32, which are 0 or 1..V; the row map is written over them.

    Ids of `min_size` voxels or fewer become background. The caller promises at most `capacity` others in a sample; in
    the first samples there may be more, as far as `rest_sizes` (B', rest) int32 has room for their sizes.
    """
    batch, num_voxels = ids.shape[0], ids.shape[1:].numel()
    block, programs = blocks_of(ids)
    names = torch.zeros_like(ids)
    parts = ids.new_empty(batch * programs)
    if ids.numel() > 0:
        launch(_tally_kernel, (programs, batch), ids, names, num_voxels, min_size > 0, block, num_warps=REDUCE_WARPS)
        launch(_count_kernel, (programs, batch), names, parts, num_voxels, min_size, block, num_warps=REDUCE_WARPS)
    counts, geometry, rest_sizes = _rank(names, parts, capacity, rest_sizes)
    if ids.numel() > 0:
        launch(_geometry_kernel, (programs, batch),
            ids, names, geometry, rest_sizes, num_voxels, *ids.shape[2:], capacity, *rest_sizes.shape, block,
            num_warps=REDUCE_WARPS,
        )  # fmt: skip
    return ids, counts, geometry


def number_components(
    cells: Cells,
    roots: Tensor,
    capacity: int,
    rest_sizes: Tensor | None = None,
    ending: Ending | None = None,
    too_many: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of united cells, whose parents become the row map; `roots` (B * blocks,) int32 counts them by block.

    It also writes what `find` ends with, if that is given.
    """
    of_bytes, ids = cells
    batch, *shape = ids.shape
    counts, geometry, rest_sizes = _rank(ids, roots, capacity, rest_sizes)
    if ids.numel() > 0:
        num_cells = of_bytes.shape[1]
        block = block_size(num_cells, CELLS_BLOCK)
        end, parts_block, options = (None,) * 4 + (0, 0), 0, {}
        if ending is not None:
            end, parts_block, options = ending, block_size(ending.programs, PARTS_BLOCK), ASSERTING
        launch(_cells_geometry_kernel, (cut(num_cells, block), batch),
            of_bytes, ids, geometry, rest_sizes, counts, *end, *shape, num_cells, capacity, *rest_sizes.shape,
            too_many, parts_block, *rows_of(shape), block, num_warps=REDUCE_WARPS, **options,
        )  # fmt: skip
    return ids, counts, geometry


def _rank(names: Tensor, parts: Tensor, capacity: int, rest_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give names their rows; `parts` (B * blocks,) int32 counts them. How many there are, and tables with such rows."""
    batch, num_voxels = len(names), names.shape[1:].numel()
    counts = torch.empty(batch, dtype=torch.int32, device=names.device)
    geometry = torch.empty((batch, capacity, ops.GEOMETRY_COLUMNS), dtype=torch.int64, device=names.device)
    if rest_sizes is None:
        rest_sizes = names.new_empty((0, 0))
    if names.numel() == 0:
        return counts.zero_(), geometry, rest_sizes
    block, num_blocks = blocks_of(names)
    # One flat cumsum: along the last axis of a few long rows, torch's runs on a few threads.
    ends = parts.cumsum(0, dtype=torch.int32)
    launch(_rank_kernel, (cut(num_blocks, RANK_BLOCKS.value), batch),
        names, ends, counts, geometry, rest_sizes, num_voxels, num_blocks, capacity, *rest_sizes.shape, block,
        num_warps=REDUCE_WARPS,
    )  # fmt: skip
    return counts, geometry, rest_sizes
