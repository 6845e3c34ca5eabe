"""The cells of instances: `cells` of ops.py, the instance that is nearest to each voxel.

Squared distances are sums over axes, so one axis follows the other, a launch each. Along W a voxel looks for the
nearest voxel of an instance in its own line, and keeps where that is: its w. Along H it asks the lines of its slab for
what they kept, and keeps the nearest of these: h * W + w. Along D it asks the slabs; the row of the nearest is the
answer:

    |w - w'|^2,    (h - h')^2 + min over w',    (d - d')^2 + min over h' and w'.

Each is a scan outwards, a step further on both sides, that ends when the step alone is longer than all that the program
has found. Of equal distances the larger row wins, at each axis and so in the end. Where all axes are alike distances
are whole numbers; elsewhere float64 without fused products, so that they are the same in either direction.

A line, slab or sample without instances shows at its first voxel, where the axis before has kept none. A program whose
voxels have nothing along the axis finds that out first, and leaves; nobody else learns how many instances there are.

Not differentiated. Deterministic: no atomics. Memory: two int32 maps, one of which is the answer. Bytes a voxel: 8 an
axis, and in each step outwards 8 more, from caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_size, coordinates, cut
from .launches import bits_of, launch, of_bits

# Axes, in the order in which they follow each other.
W_AXIS: tl.constexpr = tl.constexpr(0)
H_AXIS: tl.constexpr = tl.constexpr(1)
D_AXIS: tl.constexpr = tl.constexpr(2)
# What distances are: whole numbers, wide ones where squares do not fit, or products of steps.
WHOLE: tl.constexpr = tl.constexpr(0)
WIDE: tl.constexpr = tl.constexpr(1)
REAL: tl.constexpr = tl.constexpr(2)
LARGEST_INT32 = 2**31 - 1
STEPS = ["step_d", "step_h", "step_w"]
# Four voxels a thread of one warp, so that a program knows without a barrier whether it has to go on.
CELLS_BLOCK, CELLS_WARPS = 128, 1


@triton.jit
def _squared(apart, step, MEASURE: tl.constexpr):
    """Squared distance of what is `apart` voxels away along an axis."""
    if MEASURE == WHOLE:
        square = apart * apart
    elif MEASURE == WIDE:
        square = apart.to(tl.int64) * apart.to(tl.int64)
    else:
        length = apart.to(tl.float64) * of_bits(step)
        square = length * length
    return square


@triton.jit
def _longest(like, MEASURE: tl.constexpr):
    """A distance that is longer than all others."""
    if MEASURE == WHOLE:
        longest = tl.full(like.shape, 2**31 - 1, tl.int32)
    elif MEASURE == WIDE:
        longest = tl.full(like.shape, 2**62, tl.int64)
    else:
        longest = tl.full(like.shape, float("inf"), tl.float64)
    return longest


@triton.jit
def _any_along(found_ptr, first, last, stride, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Whether any of `found` from `first` to before `last`, `stride` apart, is at least LEAST."""
    largest = tl.zeros([], tl.int32) - 1
    for begin in range(first, last, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.load(found_ptr + place * stride, mask=place < last, other=-1), axis=0))
    return largest >= LEAST


@triton.jit
def _is_any(found_ptr, voxel, V, D, H, W, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether there is any instance in the lines, slabs or volume of the voxels from `voxel` on."""
    last = tl.minimum(V - voxel, BLOCK) + voxel - 1
    if AXIS == W_AXIS:
        found = _any_along(found_ptr, voxel // W * W, (last // W + 1) * W, 1, 1, BLOCK)
    elif AXIS == H_AXIS:
        found = _any_along(found_ptr, voxel // W // H * H, (last // W // H + 1) * H, W, 0, BLOCK)
    else:
        found = _any_along(found_ptr, 0, D, H * W, 0, BLOCK)
    return found


@triton.jit
def _look(
    best, place, row, apart, rows_ptr, found_ptr, voxel, z, y, x, step_d, step_h, step_w, D, H, W,
    AXIS: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """The nearer of what is known (squared distance, place, row) and what lies `apart`, before or after, in an axis."""
    if AXIS == W_AXIS:
        there, length, stride = x + apart, W, 1
    elif AXIS == H_AXIS:
        there, length, stride = y + apart, H, W
    else:
        there, length, stride = z + apart, D, H * W
    inside = (there >= 0) & (there < length) & (best >= 0)
    found = tl.load(found_ptr + voxel + apart * stride, mask=inside, other=-1)
    if AXIS == W_AXIS:
        candidate, at = inside & (found > 0), there
        distance = _squared(apart + tl.zeros_like(x), step_w, MEASURE)
    elif AXIS == H_AXIS:
        candidate, at = inside & (found >= 0), there * W + found
        distance = _squared(x - found, step_w, MEASURE) + _squared(apart, step_h, MEASURE)
    else:
        candidate, at = inside & (found >= 0), there * (H * W) + found
        distance = _squared(x - found % W, step_w, MEASURE) + _squared(y - found // W, step_h, MEASURE)
        distance += _squared(apart, step_d, MEASURE)
    candidate &= distance <= best
    source = at + (z * H + y) * W if AXIS == W_AXIS else at + z * (H * W) if AXIS == H_AXIS else at
    other_row = tl.load(rows_ptr + source, mask=candidate, other=0)
    better = candidate & ((distance < best) | (other_row > row))
    return tl.where(better, distance, best), tl.where(better, at, place), tl.where(better, other_row, row)


@triton.jit(do_not_specialize=STEPS)
def _nearest_kernel(
    step_d: tl.int64,  # length of a voxel along each axis, a float64 in its bits
    step_h: tl.int64,
    step_w: tl.int64,
    rows_ptr,  # (B, V) int32
    found_ptr,  # (B, V) int32: rows along W, else where the axis before has found the nearest, -1: nowhere
    nearest_ptr,  # (B, V) int32: where this axis has found it; in the end, its row
    V,
    D,
    H,
    W,
    AXIS: tl.constexpr,
    LAST: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    rows_ptr += sample * V
    found_ptr += sample * V
    first = tl.program_id(0) * BLOCK
    voxel = first + tl.arange(0, BLOCK)
    in_volume = voxel < V
    place = tl.zeros((BLOCK,), tl.int32) - 1
    row = tl.zeros((BLOCK,), tl.int32)
    if _is_any(found_ptr, first, V, D, H, W, AXIS, BLOCK):
        z, y, x = coordinates(voxel, H, W)
        length = W if AXIS == W_AXIS else H if AXIS == H_AXIS else D
        step = step_w if AXIS == W_AXIS else step_h if AXIS == H_AXIS else step_d
        # (lanes outside of the volume have the best that there is)
        far = _longest(voxel, MEASURE)
        best = tl.where(in_volume, far, tl.zeros_like(far) - 1)
        apart = tl.zeros([], tl.int32)
        while (apart < length) & (tl.max(best, axis=0) >= _squared(apart, step, MEASURE)):
            best, place, row = _look(
                best, place, row, -apart, rows_ptr, found_ptr, voxel, z, y, x, step_d, step_h, step_w, D, H, W,
                AXIS, MEASURE,
            )  # fmt: skip
            best, place, row = _look(
                best, place, row, apart, rows_ptr, found_ptr, voxel, z, y, x, step_d, step_h, step_w, D, H, W,
                AXIS, MEASURE,
            )  # fmt: skip
            apart += 1
    tl.store(nearest_ptr + sample * V + voxel, row if LAST else place, mask=in_volume)


def launch_cells(rows: Tensor, spacing: list[float]) -> Tensor:
    """The row that is nearest to each voxel; 0 in a sample without any."""
    batch, depth, height, width = rows.shape
    num_voxels = depth * height * width
    nearest, other = torch.empty_like(rows), torch.empty_like(rows)
    if batch * num_voxels == 0:
        return nearest
    sides = depth, height, width
    if len({step for step, length in zip(spacing, sides, strict=True) if length > 1}) > 1:
        measure = REAL.value
    else:
        measure = WHOLE.value if sum(side * side for side in sides) <= LARGEST_INT32 else WIDE.value
    block = block_size(num_voxels, CELLS_BLOCK)
    grid, steps = (cut(num_voxels, block), batch), bits_of(tuple(spacing))

    def along(axis: tl.constexpr, found: Tensor, into: Tensor, last: bool) -> None:
        launch(_nearest_kernel, grid,
            rows, found, into, num_voxels, depth, height, width, axis.value, last, measure, block,
            values=steps, num_warps=CELLS_WARPS, enable_fp_fusion=False,
        )  # fmt: skip

    along(W_AXIS, rows, other, False)
    along(H_AXIS, other, nearest, depth == 1)
    if depth > 1:
        along(D_AXIS, nearest, other, True)
        return other
    return nearest
