"""Centre boxes: how output boxes and label boxes overlap, and the same as volumes.

The centre of an instance is its mean coordinate, rounded up, in integers: c = (sum + size - 1) // size. With the
offset o of an axis its box covers [c - o - 1, c + o), clipped to the volume. A voxel in several boxes of one side
belongs to the largest row. So a box covers the voxel v where |c - (v + 1)| <= o along every axis, and two boxes can
share a voxel only where |c - c'| <= 2 o.

Overlaps: a program takes one row of a side after the other; its lanes are the voxels of the row's box, a block of them
at a time. It goes over the larger rows of the same side in blocks, and while any of their centres are near enough,
takes the largest such row, drops the voxels that its box covers, and goes on with smaller rows, until no voxel is left.
Voxels that are left are owned. The same walk over all rows of the other side leaves those of them that are outside.

Volumes: each voxel of a box is raised to the row of the instance (atomic_max), in one map for the outputs and one for
the labels of each sample.

Backward: none here; the terms use the counts. Deterministic: maxima and integers. Bytes a voxel: none for overlaps, but
48 for each row and each row it is compared with. With 30 boxes a side a program does one row, in one block of rows of
each side, and drops the voxels of the few boxes that it meets. With 5,000 a side each row is compared with 7,500 others
on average, 60 blocks: 75 million comparisons of some dozens of integer instructions, estimated (not measured) at half a
millisecond on an H100. Volumes: 4 bytes a voxel zeroed for each map, besides which only voxels in boxes are touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, coordinates, table_programs
from .launches import launch

COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
COORDINATE_SUMS: tl.constexpr = tl.constexpr(ops.COORDINATE_SUMS.start)
# A box of the usual offsets, up to 3, has at most 7^3 = 343 voxels: one block.
BOX_BLOCK = 512


@triton.jit
def _box_side(row_ptr, dim, offset, AXIS: tl.constexpr):
    """Along one axis: centre of a row, first coordinate of its box, and how many voxels the box has there."""
    size = tl.maximum(tl.load(row_ptr + SIZE), 1)
    center = (tl.load(row_ptr + COORDINATE_SUMS + AXIS) + size - 1) // size
    low, high = tl.maximum(center - offset - 1, 0), tl.minimum(center + offset, dim)
    # Coordinates fit int32, in which lanes are divided several times as fast.
    return center, low.to(tl.int32), tl.maximum(high - low, 0).to(tl.int32)


@triton.jit
def _near_along(row_ptr, here, size, position, reach, AXIS: tl.constexpr):
    """Whether |centre - position| * size <= reach along one axis."""
    sums = tl.load(row_ptr + COORDINATE_SUMS + AXIS, mask=here, other=0)
    # The centre is sums / size rounded up, so it is at most k exactly where sums <= k * size: no division.
    rest = sums - position * size
    return (rest > -reach - size) & (rest <= reach)


@triton.jit
def _near(row_ptr, here, z, y, x, offset_z, offset_y, offset_x, OFFSETS: tl.constexpr):
    """Whether the centre of a row that is `here` lies within so many offsets of a position, along every axis."""
    size = tl.load(row_ptr + SIZE, mask=here, other=1)
    unit = OFFSETS * size
    near_z = _near_along(row_ptr, here, size, z, offset_z * unit, 0)
    near_y = _near_along(row_ptr, here, size, y, offset_y * unit, 1)
    near_x = _near_along(row_ptr, here, size, x, offset_x * unit, 2)
    return here & near_z & near_y & near_x


@triton.jit
def _any(lanes):
    """Whether a condition holds on any lane."""
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit
def _uncovered(
    voxels,
    z,  # coordinates plus one, as are y and x
    y,
    x,
    side_ptr,  # (capacity, 10) int64
    first,
    rows,
    center_z,
    center_y,
    center_x,
    offset_z,
    offset_y,
    offset_x,
    BLOCK: tl.constexpr,
):
    """Those voxels of the box around a centre that no box of the rows first..rows - 1 covers."""
    while (rows > first) & _any(voxels):
        other = rows - 1 - tl.arange(0, BLOCK)
        other_ptr = side_ptr + other.to(tl.int64) * COLUMNS
        meets = _near(other_ptr, other >= first, center_z, center_y, center_x, offset_z, offset_y, offset_x, 2)
        largest = tl.max(tl.where(meets, other, -1), axis=0)
        while largest >= 0:
            largest_ptr = side_ptr + largest.to(tl.int64) * COLUMNS
            covers = _near(largest_ptr, largest >= 0, z, y, x, offset_z, offset_y, offset_x, 1)
            voxels = voxels & ~covers
            # The largest row goes first, so smaller ones remain; none does once there is no voxel to drop.
            meets = meets & (other < largest) & _any(voxels)
            largest = tl.max(tl.where(meets, other, -1), axis=0)
        rows -= BLOCK
    return voxels


@triton.jit
def overlap_boxes(
    geometry_ptr,  # (2 B, capacity, 10) int64
    used_ptr,  # (2 B,) int32
    owned_ptr,  # (2 B, capacity, 2) int64
    program,
    side,
    capacity,
    D,
    H,
    W,
    offset_z,
    offset_y,
    offset_x,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Count what the rows of a side own, those that are a program's."""
    sides = tl.num_programs(1)
    other_side = (side + sides // 2) % sides
    rows = tl.minimum(tl.load(used_ptr + side), capacity)
    other_rows = tl.minimum(tl.load(used_ptr + other_side), capacity)
    side_ptr = geometry_ptr + side * capacity * COLUMNS
    other_side_ptr = geometry_ptr + other_side * capacity * COLUMNS
    for row in range(program, rows, tl.num_programs(0)):
        row_ptr = geometry_ptr + (side * capacity + row) * COLUMNS
        center_z, low_z, size_z = _box_side(row_ptr, D, offset_z, 0)
        center_y, low_y, size_y = _box_side(row_ptr, H, offset_y, 1)
        center_x, low_x, size_x = _box_side(row_ptr, W, offset_x, 2)
        size = size_z * size_y * size_x
        owned, outside = 0, 0
        for first in range(0, size, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            z, y, x = coordinates(lane, size_y, size_x)
            z, y, x = low_z + z + 1, low_y + y + 1, low_x + x + 1
            mine = _uncovered(
                lane < size, z, y, x, side_ptr, row + 1, rows,
                center_z, center_y, center_x, offset_z, offset_y, offset_x, OTHERS,
            )  # fmt: skip
            free = _uncovered(
                mine, z, y, x, other_side_ptr, 0, other_rows,
                center_z, center_y, center_x, offset_z, offset_y, offset_x, OTHERS,
            )  # fmt: skip
            owned += tl.sum(mine.to(tl.int32), axis=0)
            outside += tl.sum(free.to(tl.int32), axis=0)
        row_ptr = owned_ptr + (side * capacity + row) * 2
        tl.store(row_ptr, outside)
        tl.store(row_ptr + 1, owned - outside)


@triton.jit
def _paint_boxes_kernel(
    geometry_ptr,  # (2 B, capacity, 10) int64
    used_ptr,  # (2 B,) int32
    owner_ptr,  # (2 B, D, H, W) int32
    capacity,
    D,
    H,
    W,
    offset_z,
    offset_y,
    offset_x,
    BLOCK: tl.constexpr,
):
    side = tl.program_id(1).to(tl.int64)
    owner_ptr += side * D * H * W
    rows = tl.minimum(tl.load(used_ptr + side), capacity)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = geometry_ptr + (side * capacity + row) * COLUMNS
        _, low_z, size_z = _box_side(row_ptr, D, offset_z, 0)
        _, low_y, size_y = _box_side(row_ptr, H, offset_y, 1)
        _, low_x, size_x = _box_side(row_ptr, W, offset_x, 2)
        size = size_z * size_y * size_x
        for first in range(0, size, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            z, y, x = coordinates(lane, size_y, size_x)
            voxel = ((low_z + z) * H + low_y + y) * W + low_x + x
            tl.atomic_max(owner_ptr + voxel, row + 1, mask=lane < size, sem="relaxed")


def launch_center_volumes(
    geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Owner of each voxel among the kept outputs' boxes, int32, and whether a label box covers it, bool."""
    sides, capacity, _ = geometry.shape
    owner = torch.zeros((sides, *shape), dtype=torch.int32, device=geometry.device)
    if owner.numel() > 0 and capacity > 0:
        used, block = counts[ops.KEPT :].flatten(), block_size(owner[0].numel(), BOX_BLOCK)
        launch(
            _paint_boxes_kernel,
            (table_programs(capacity), sides),
            geometry,
            used,
            owner,
            capacity,
            *shape,
            *offsets,
            block,
        )
    owner, covered = owner.chunk(2)
    return owner.clone(), covered > 0
