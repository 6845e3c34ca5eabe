"""From the volume that is activated to masks, the sums of the pixel term, and whether all is finite.

At a voxel, with x the volume, p = sigmoid(x) where that is the activation and x elsewhere, t the threshold:

    foreground = [p >= t], but [x == 1] without activation if t <= 0
    y          = [label > 0.5]

NaN compares as false, so it is background. The pixel term sees a prediction u and a truth w (codes of
../ops.py): u = x, w = label (RAW), u = p, w = y (PROBABILITY), or u = foreground, w = label (HARD). Its sums are
u w, phi(u, w) and truth(w), which is w, or w^2 where predictions are squared. One kernel reads x and the labels once;
each program writes its part of the sums, and 0 or NaN for whether all its x are finite and all its labels in
[-0.5, 1.5]. That is counted and not found from a sum, which could grow too large where every value is finite. What the
parts add up to is found together with the counts (instances.py).

Everything is computed in the precision of x, labels are rounded to it, and sums are added in float64. Backward: in
tables.py, together with that of the instances. Deterministic: no atomics, parts are added in a fixed order. Bytes a
voxel: the sizes of x and of a label read, 2 written.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, cut
from .launches import launch
from .quantities import phi, sum_where, truth

NONE: tl.constexpr = tl.constexpr(ops.NONE)
SIGMOID: tl.constexpr = tl.constexpr(ops.SIGMOID)
NOT_FUSED: tl.constexpr = tl.constexpr(ops.NOT_FUSED)
RAW: tl.constexpr = tl.constexpr(ops.RAW)
PROBABILITY: tl.constexpr = tl.constexpr(ops.PROBABILITY)
COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
# Eight voxels a thread of four warps: enough loads under way to wait for memory, and few parts to add.
ACTIVATE_BLOCK = 1024


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


@triton.jit
def _activate_kernel(
    x_ptr,  # (B, V) float32 or float64
    labels_ptr,  # (B, V) of any real dtype
    foreground_ptr,  # (B, V) bool
    y_ptr,  # (B, V) bool
    parts_ptr,  # (B, programs, 4) float64: of the sums, zeros without a fused pixel term; 0 or NaN
    V,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PIXEL: tl.constexpr,
    QUANTITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    index = sample * V + voxel
    in_volume = voxel < V
    x = tl.load(x_ptr + index, mask=in_volume, other=0)
    labels = tl.load(labels_ptr + index, mask=in_volume, other=0)

    p = probability(x, ACTIVATION)
    only_ones: tl.constexpr = (ACTIVATION == NONE) & (THRESHOLD <= 0)
    foreground = x == 1 if only_ones else p >= tl.full(x.shape, THRESHOLD, x.dtype)
    y = is_label(labels)
    tl.store(foreground_ptr + index, foreground, mask=in_volume)
    tl.store(y_ptr + index, y, mask=in_volume)

    parts_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * (COLUMNS + 1)
    broken = tl.sum((~((tl.abs(x) < float("inf")) & is_mask_like(labels))).to(tl.int32), axis=0)
    tl.store(parts_ptr + COLUMNS, tl.where(broken > 0, float("nan"), 0.0))
    if PIXEL != NOT_FUSED:
        u, w = seen_by_pixel(x, p, foreground, y, labels, PIXEL)
        tl.store(parts_ptr, sum_where(u * w, in_volume))
        tl.store(parts_ptr + 1, sum_where(phi(u, w, QUANTITY), in_volume))
        tl.store(parts_ptr + 2, sum_where(truth(w, QUANTITY), in_volume))
    else:
        for column in tl.static_range(COLUMNS):
            tl.store(parts_ptr + column, 0.0)


def launch_activate(
    x: Tensor, labels: Tensor, activation: int, threshold: float, pixel: int, quantity: int
) -> tuple[Tensor, Tensor]:
    """Foreground and y as one mask (2 B, D, H, W), and the parts of the sums of the pixel term and of the health."""
    batch, *shape = x.shape
    masks = torch.empty((2 * batch, *shape), dtype=torch.bool, device=x.device)
    num_voxels = x[0].numel() if batch else 0
    block = block_size(num_voxels, ACTIVATE_BLOCK)
    programs = cut(num_voxels, block)
    parts = torch.empty((batch, programs, ops.SAMPLE_COLUMNS + 1), dtype=torch.float64, device=x.device)
    # As PyTorch and NumPy compare a number with a tensor: rounded to the dtype of the tensor.
    threshold = float(np.float64(threshold) if x.dtype == torch.float64 else np.float32(threshold))
    if x.numel() > 0:
        launch(_activate_kernel, (programs, batch),
            x, labels, *masks.chunk(2), parts, num_voxels,
            activation, threshold, pixel, 0 if pixel == ops.NOT_FUSED else quantity, block,
        )  # fmt: skip
    return masks, parts
