"""From the volume that is activated to masks, the sums of the pixel term, and whether all is finite.

At a voxel, with x the volume, p = sigmoid(x) where that is the activation and x elsewhere, t the threshold:

    foreground = [p >= t], but [x == 1] without activation if t <= 0
    y          = [label > 0.5]

NaN compares as false, so it is background. The pixel term sees a prediction u and a truth w (codes of
../ops.py): u = x, w = label (RAW), u = p, w = y (PROBABILITY), or u = foreground, w = label (HARD). Its sums are
u w, phi(u, w) and truth(w), which is w, or w^2 where predictions are squared. One kernel reads x and the labels once;
each program writes its part of the sums, and 0 or NaN for whether all its x are finite and all its labels in
[-0.5, 1.5]. That is not found from a sum of x, which could grow too large where every value is finite. What the
parts add up to is found together with the counts (finish.py).

Lanes are cells of 2x2x2 voxels (nodes.py), as labelling wants them: if nothing else asks for masks, it begins here,
with the bytes of cells and the first parents. Otherwise foreground and y are written as masks.

Everything is computed in the precision of x, labels are rounded to it, and sums are added in float64. Backward: in
tables.py, together with that of the instances. Deterministic: no atomics, parts are added in a fixed order. Bytes a
voxel: the sizes of x and of a label read, and written 8.25 with cells, 2 with masks.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import blocks
from .blocks import block_size, cut, threads
from .launches import launch
from .nodes import (
    Cells,
    begin_cells,
    bits_of_row,
    cell_coordinates,
    empty_cells,
    number_of_cells,
    row_of,
    rows_of,
)
from .quantities import phi, truth

NONE: tl.constexpr = tl.constexpr(ops.NONE)
SIGMOID: tl.constexpr = tl.constexpr(ops.SIGMOID)
NOT_FUSED: tl.constexpr = tl.constexpr(ops.NOT_FUSED)
RAW: tl.constexpr = tl.constexpr(ops.RAW)
PROBABILITY: tl.constexpr = tl.constexpr(ops.PROBABILITY)
COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
# Tiles of one cell a thread that a program of one warp goes over: few parts to add, without a barrier.
ACTIVATE_TILES = 2


@triton.jit
def probability(x, ACTIVATION: tl.constexpr):
    """The probability, or x where there is none."""
    if ACTIVATION == SIGMOID:
        below = 1 + tl.exp(-x)
        # A float32 `/` is approximate on GPUs, and sigmoid(0) has to be 0.5.
        x = 1 / below if x.dtype == tl.float64 else tl.div_rn(tl.zeros_like(x) + 1, below)
    return x


@triton.jit
def is_label(labels):
    """Where labels are foreground, compared in their own type."""
    return labels > 0.5 if labels.dtype.is_floating() else labels > 0


@triton.jit
def is_mask_like(labels):
    """Where labels are in [-0.5, 1.5]; NaN is not."""
    return (labels >= -0.5) & (labels <= 1.5) if labels.dtype.is_floating() else (labels >= 0) & (labels <= 1)


@triton.jit
def is_foreground(x, p, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr):
    """Where an output is foreground."""
    only_ones: tl.constexpr = (ACTIVATION == NONE) & (THRESHOLD <= 0)
    return x == 1 if only_ones else p >= tl.full(x.shape, THRESHOLD, x.dtype)


@triton.jit
def _sum_of(values):
    """Sum of a block (BLOCK, 2)."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def seen_by_pixel(x, p, foreground, y, labels, PIXEL: tl.constexpr):
    """Prediction u and truth w of the pixel term, in the precision of x."""
    if PIXEL == RAW:
        u = x
    elif PIXEL == PROBABILITY:
        u = p
    else:
        u = foreground.to(x.dtype)
    w = y if PIXEL == PROBABILITY else labels
    return u, w.to(x.dtype)


# (with a depth that is 1 for a constant, LLVM leaves a byte of stack behind)
@triton.jit(do_not_specialize=["D"])
def _activate_kernel(
    x_ptr,  # (B, V) float32 or float64
    labels_ptr,  # (B, V) of any real dtype
    masks_ptr,  # (2 B, V) bool, or None: the cells are wanted
    cells_ptr,  # (2 B, N) uint8, or None: the masks are
    parents_ptr,  # (2 B, V) int32, or None
    parts_ptr,  # (B, programs, 4) float64: of the sums, zeros without a fused pixel term; 0 or NaN
    D,
    H,
    W,
    N,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PIXEL: tl.constexpr,
    QUANTITY: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # (as Triton 3.2 wants it: a type that is no constant, and its bits, which are one)
    label_type = labels_ptr.dtype.element_ty
    BITS: tl.constexpr = label_type.primitive_bitwidth
    # (narrow integers are compared as wider ones; without a sign, what is below 0 is above 1)
    WIDE: tl.constexpr = tl.int32 if BITS < 32 else label_type
    UNSIGNED: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    COMPARED: tl.constexpr = label_type if label_type.is_floating() else UNSIGNED
    # Of y it is whole numbers that are added, for which a warp has one instruction.
    TRUTH: tl.constexpr = tl.int32 if PIXEL == PROBABILITY else tl.float64
    sample, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    x_ptr += sample * D * H * W
    labels_ptr += sample * D * H * W
    of_both = tl.zeros((BLOCK, 2), tl.float64)
    of_u = tl.zeros((BLOCK, 2), tl.float64)
    of_w = tl.zeros((BLOCK, 2), TRUTH)
    # NaN once any x is not finite; and the least and largest label, or NaN
    not_finite = tl.zeros((BLOCK, 2), x_ptr.dtype.element_ty)
    least = tl.zeros((BLOCK, 2), COMPARED)
    most = tl.zeros((BLOCK, 2), COMPARED)
    for tile in range(TILES):
        cell = (tl.program_id(0) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        cell_z, cell_y, cell_x = cell_coordinates(cell, H, W)
        out, lab = tl.zeros((BLOCK, 2), tl.int32), tl.zeros((BLOCK, 2), tl.int32)
        for row in tl.static_range(ROWS):
            voxel, inside = row_of(cell_z, cell_y, cell_x, cell < N, D, H, W, row, EVEN)
            x = tl.load(x_ptr + voxel, mask=inside, other=0)
            labels = tl.load(labels_ptr + voxel, mask=inside, other=0)
            p = probability(x, ACTIVATION)
            foreground, y = is_foreground(x, p, ACTIVATION, THRESHOLD), is_label(labels)
            not_finite += 0 * x
            if label_type.is_floating():
                least = tl.minimum(least, labels, propagate_nan=tl.PropagateNan.ALL)
                most = tl.maximum(most, labels, propagate_nan=tl.PropagateNan.ALL)
            else:
                most = tl.maximum(most, labels.to(WIDE).to(COMPARED, bitcast=True))
            if PIXEL != NOT_FUSED:
                u, w = seen_by_pixel(x, p, foreground, y, labels, PIXEL)
                u = tl.where(inside, u, 0.0)  # where both are 0, so is all that is added
                of_both += (u * w).to(tl.float64)
                of_u += phi(u, w, QUANTITY).to(tl.float64)
                of_w += truth(w, QUANTITY).to(TRUTH)
            if masks_ptr is not None:
                mask_ptr = masks_ptr + sample * D * H * W + voxel
                tl.store(mask_ptr, foreground, mask=inside)
                tl.store(mask_ptr + B.to(tl.int64) * D * H * W, y, mask=inside)
            out |= tl.where(inside, bits_of_row(foreground, row), 0)
            lab |= bits_of_row(y, row)
        if cells_ptr is not None:
            for side in tl.static_range(2):
                start = side * B + sample
                begin_cells(
                    tl.sum(out if side == 0 else lab, axis=1), cells_ptr + start * N, parents_ptr + start * D * H * W,
                    cell, cell_z, cell_y, cell_x, D, H, W, N, ROWS, EVEN, BLOCK,
                )  # fmt: skip

    parts_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * (COLUMNS + 1)
    both, true = tl.zeros([], tl.float64), tl.zeros([], TRUTH)
    if PIXEL != PROBABILITY or tl.max(tl.max(of_w, axis=1), axis=0) > 0:  # most of y is background
        both, true = _sum_of(of_both), _sum_of(of_w)
    tl.store(parts_ptr, both)
    tl.store(parts_ptr + 1, _sum_of(of_u))
    tl.store(parts_ptr + 2, true.to(tl.float64))
    healthy = (not_finite == 0) & is_mask_like(least) & is_mask_like(most)
    broken = tl.max(tl.max(1 - healthy.to(tl.int32), axis=1), axis=0)
    tl.store(parts_ptr + COLUMNS, tl.where(broken > 0, float("nan"), 0.0))


def _activate(x: Tensor, labels: Tensor, masks: Tensor | None, begun: Cells | None, *options: Any) -> Tensor:
    """Write masks or cells; the parts of the sums of the pixel term and of health."""
    (batch, *shape), (activation, threshold, pixel, quantity) = x.shape, options
    num_cells = number_of_cells(shape)
    block, tiles = block_size(num_cells, threads(1)), 1 if blocks.INTERPRETED else ACTIVATE_TILES
    programs = cut(num_cells, block * tiles)
    parts = torch.empty((batch, programs, ops.SAMPLE_COLUMNS + 1), dtype=torch.float64, device=x.device)
    # As PyTorch and NumPy compare a number with a tensor: rounded to the dtype of the tensor.
    threshold = float(np.float64(threshold) if x.dtype == torch.float64 else np.float32(threshold))
    if x.numel() > 0:
        launch(_activate_kernel, (programs, batch),
            x, labels, masks, *(begun or (None, None)), parts, *shape, num_cells,
            activation, threshold, pixel, 0 if pixel == ops.NOT_FUSED else quantity, *rows_of(shape), tiles, block,
            num_warps=1,
        )  # fmt: skip
    return parts


def launch_activate(x: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Foreground and y as one mask (2 B, D, H, W), and the parts of sums and of health."""
    masks = torch.empty((2 * len(x), *x.shape[1:]), dtype=torch.bool, device=x.device)
    return masks, _activate(x, labels, masks, None, *options)


def launch_activate_cells(x: Tensor, labels: Tensor, *options: Any) -> tuple[Cells, Tensor]:
    """The same, but instead of the mask its cells, from which labelling goes on."""
    begun = empty_cells(2 * len(x), x.shape[1:], x.device)
    return begun, _activate(x, labels, None, begun, *options)
