"""The nearest neighbour of each instance on the other side, by the distance-IoU (DIoU) of extended boxes.

Along an axis with inclusive bounds [low, high] and extent e = max(high - low, 1) the box is [max(low - e - 1, 0),
min(high + e, dim)) and its centre low' + ceil((high' - low') / 2). With |.| volumes, d the distance of the centres,
diag the diagonal of the smallest box around both, both in units of the spacing,

    DIoU = 1 - |A n B| / |A u B| + d^2 / (diag^2 + 1e-7).

A side without instances is one box [q - 1, q + 1), q = dim // 2, in the middle. A program takes one row of a side
after the other and goes over the rows of the other side in blocks, up to the counts, which only the device knows.
DIoU is symmetric to the last bit as computed here, so one launch serves both sides.

Backward: none, DIoU is a constant. Deterministic: minima. Bytes a voxel: none; 48 for each row and each row it is
compared with.
"""

import triton
import triton.language as tl

from .. import ops
from .launches import of_bits

COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
LOWS: tl.constexpr = tl.constexpr(ops.LOWS.start)
HIGHS: tl.constexpr = tl.constexpr(ops.HIGHS.start)


@triton.jit
def _box_side(row_ptr, present, dim, AXIS: tl.constexpr):
    """Bounds [low, high) of extended boxes along one axis, float64; of the middle box where no instance is present."""
    low = tl.load(row_ptr + LOWS + AXIS, mask=present, other=0)
    high = tl.load(row_ptr + HIGHS + AXIS, mask=present, other=0)
    extent = tl.maximum(high - low, 1)
    low = tl.where(present, tl.maximum(low - extent - 1, 0), dim // 2 - 1)
    high = tl.where(present, tl.minimum(high + extent, dim), dim // 2 + 1)
    return low.to(tl.float64), high.to(tl.float64)


@triton.jit
def _compare_side(low, high, other_low, other_high, step):
    """Along one axis: voxels of the intersection, squared distance of the centres, squared length around both."""
    shared = tl.maximum(tl.minimum(high, other_high) - tl.maximum(low, other_low), 0.0)
    distance = (low + tl.ceil((high - low) / 2) - other_low - tl.ceil((other_high - other_low) / 2)) * step
    around = (tl.maximum(high, other_high) - tl.minimum(low, other_low)) * step
    return shared, distance * distance, around * around


@triton.jit
def nearest_boxes(
    geometry_ptr,  # (2 B, capacity, 10) int64
    used_ptr,  # (2 B,) int32
    minima_ptr,  # (2 B, capacity) float64
    program,
    side,
    capacity,
    D,
    H,
    W,
    step_d,  # float64 in its bits
    step_h,
    step_w,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the smallest DIoU of each row of a side, of those that are a program's."""
    sides = tl.num_programs(1)
    other_side = (side + sides // 2) % sides
    epsilon = tl.full((BLOCK,), 1e-7, tl.float64)  # a bare 1e-7 would be rounded to float32
    count = tl.minimum(tl.load(used_ptr + side), capacity)
    other_count = tl.minimum(tl.load(used_ptr + other_side), capacity)
    for row in range(program, tl.minimum(tl.maximum(count, 1), capacity), tl.num_programs(0)):
        row_ptr = geometry_ptr + (side * capacity + row) * COLUMNS
        smallest = tl.full((BLOCK,), float("inf"), tl.float64)
        for first in range(0, tl.maximum(other_count, 1), BLOCK):
            other = first + tl.arange(0, BLOCK)
            here = other < tl.maximum(other_count, 1)
            other_ptr = geometry_ptr + (other_side * capacity + other) * COLUMNS
            volume, other_volume, shared = 1.0, 1.0, 1.0
            distance, around = 0.0, 0.0
            for axis in tl.static_range(PLANAR, 3):
                dim = D if axis == 0 else (H if axis == 1 else W)
                step = of_bits(step_d if axis == 0 else (step_h if axis == 1 else step_w))
                low, high = _box_side(row_ptr, row < count, dim, axis)
                other_low, other_high = _box_side(other_ptr, other < other_count, dim, axis)
                shared_side, distance_side, around_side = _compare_side(low, high, other_low, other_high, step)
                volume *= high - low
                other_volume *= other_high - other_low
                shared *= shared_side
                distance += distance_side
                around += around_side
            diou = 1.0 - shared / (volume + other_volume - shared) + distance / (around + epsilon)
            smallest = tl.minimum(smallest, tl.where(here, diou, float("inf")))
        tl.store(minima_ptr + side * capacity + row, tl.min(smallest, axis=0))
