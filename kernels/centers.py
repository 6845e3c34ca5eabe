"""Centre boxes: how output boxes and label boxes overlap, and the same as volumes.

The centre of an instance is its mean coordinate, rounded up, in integers: c = (sum + size - 1) // size. With the
offset o of an axis its box covers [c - o - 1, c + o), clipped to the volume. A voxel in several boxes belongs to the
largest row.

1. `_paint_boxes_kernel` raises each voxel of a box to the row of the instance (atomic_max), in one map for the outputs
   and one for the labels of each sample.
2. `_count_boxes_kernel` walks over the same boxes and counts the voxels that still hold the row: outside and inside
   the boxes of the other side.

A program takes one row after the other, up to the number of kept outputs or of labels. Backward: none here; the terms
use the counts. Deterministic: maxima and integers. Bytes a voxel: 4 zeroed for each map, besides which only voxels in
boxes are touched.
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
# A box of the usual offsets, up to 3, has at most 7^3 = 343 voxels.
BOX_BLOCK = 256


@triton.jit
def _box_side(row_ptr, dim, offset, AXIS: tl.constexpr):
    """First coordinate of a row's centre box along one axis, and how many voxels it has there."""
    size = tl.maximum(tl.load(row_ptr + SIZE), 1)
    center = (tl.load(row_ptr + COORDINATE_SUMS + AXIS) + size - 1) // size
    low = tl.maximum(center - offset - 1, 0)
    return low, tl.maximum(tl.minimum(center + offset, dim) - low, 0)


@triton.jit
def _box(row_ptr, D, H, W, offset_z, offset_y, offset_x):
    """First voxel of a row's centre box, its sides along y and x, and how many voxels it has."""
    low_z, size_z = _box_side(row_ptr, D, offset_z, 0)
    low_y, size_y = _box_side(row_ptr, H, offset_y, 1)
    low_x, size_x = _box_side(row_ptr, W, offset_x, 2)
    return (low_z * H + low_y) * W + low_x, size_y, size_x, size_z * size_y * size_x


@triton.jit
def _step(lane, size_y, size_x, H, W):
    """From the first voxel of a box to its voxel number `lane`."""
    z, y, x = coordinates(lane, size_y, size_x)
    return (z * H + y) * W + x


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
        corner, size_y, size_x, size = _box(row_ptr, D, H, W, offset_z, offset_y, offset_x)
        for first in range(0, size, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            voxel = corner + _step(lane, size_y, size_x, H, W)
            tl.atomic_max(owner_ptr + voxel, row + 1, mask=lane < size, sem="relaxed")


@triton.jit
def _count_boxes_kernel(
    geometry_ptr,  # (2 B, capacity, 10) int64
    used_ptr,  # (2 B,) int32
    owner_ptr,  # (2 B, D, H, W) int32
    owned_ptr,  # (2 B, capacity, 2) int64
    capacity,
    D,
    H,
    W,
    offset_z,
    offset_y,
    offset_x,
    BLOCK: tl.constexpr,
):
    sides = tl.num_programs(1)
    side = tl.program_id(1).to(tl.int64)
    other_ptr = owner_ptr + (side + sides // 2) % sides * D * H * W
    owner_ptr += side * D * H * W
    rows = tl.minimum(tl.load(used_ptr + side), capacity)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = geometry_ptr + (side * capacity + row) * COLUMNS
        corner, size_y, size_x, size = _box(row_ptr, D, H, W, offset_z, offset_y, offset_x)
        outside = tl.zeros((BLOCK,), tl.int64)
        inside = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, size, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            voxel = corner + _step(lane, size_y, size_x, H, W)
            in_box = lane < size
            mine = tl.load(owner_ptr + voxel, mask=in_box, other=0) == row + 1
            other = tl.load(other_ptr + voxel, mask=mine, other=0)
            outside += (mine & (other == 0)).to(tl.int64)
            inside += (mine & (other > 0)).to(tl.int64)
        tl.store(owned_ptr + (side * capacity + row) * 2, tl.sum(outside, axis=0))
        tl.store(owned_ptr + (side * capacity + row) * 2 + 1, tl.sum(inside, axis=0))


def _paint(geometry: Tensor, used: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Largest row (from 1) of each side whose centre box covers a voxel, (2 B, D, H, W) int32; 0 = none."""
    sides, capacity, _ = geometry.shape
    owner = torch.zeros((sides, *shape), dtype=torch.int32, device=geometry.device)
    if owner.numel() > 0 and capacity > 0:
        block = block_size(owner[0].numel(), BOX_BLOCK)
        _paint_boxes_kernel[(table_programs(capacity), sides)](geometry, used, owner, capacity, *shape, *offsets, block)
    return owner


def launch_center_overlaps(geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]) -> Tensor:
    """Voxels each row owns outside [0] and inside [1] the boxes of the other side, (2 B, capacity, 2) int64."""
    (sides, capacity, _), used = geometry.shape, counts[ops.KEPT :].flatten()
    owner = _paint(geometry, used, shape, offsets)
    owned = torch.empty((sides, capacity, 2), dtype=torch.int64, device=geometry.device)
    if owner.numel() > 0 and capacity > 0:
        block = block_size(owner[0].numel(), BOX_BLOCK)
        _count_boxes_kernel[(table_programs(capacity), sides)](
            geometry, used, owner, owned, capacity, *shape, *offsets, block
        )
    return owned


def launch_center_volumes(
    geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Owner of each voxel among the kept outputs' boxes, int32, and whether a label box covers it, bool."""
    owner, covered = _paint(geometry, counts[ops.KEPT :].flatten(), shape, offsets).chunk(2)
    return owner.clone(), covered > 0
