"""Sums of the activated output over instances, and the gradient of all sums in x.

At a voxel: a the activated output, y its label, o and l the rows of its output and label instance (0 = none), inside
= (1 <= o <= kept), phi(a, w) the quantity of the criterion. Then (columns as in ops.py)

    output o:  MASS a     INTERSECTION a [l > 0]     COST phi(a, [l > 0])     excess e           OVERLAP [l > 0]
    label l:   MASS a     INTERSECTION a [inside]    COST c [inside]          TOUCHED [o > 0]   OVERLAP [inside]
    sample:    a y, phi(a, y), y

with e = phi(a s, 0) [y = 0], s = a held constant, c = phi(a, 1); without no_tp e = phi(a, 0), c = phi(a, 1) - phi(a,
0). All voxels of a block with the same pair (o, l) go the same way, so the block adds up by pairs: while lanes
remain, take the largest pair, reduce a, phi(a, 0), phi(a, 1) and e over its lanes, send scalar atomics to both rows,
drop those lanes. If the pair touches, it is noted (pairs.py), and a second kernel adds what rows that touch bring each
other. Both add to tables that have been cleared (prepare.py). Outputs beyond the tables, the rest, leave but a flag
each: whether they touch a label.

Backward, G the gradients of the tables, phi' the derivative in a, F the gradient of a false output, M that of a missed
label, over their sizes (both 0 for all other instances):

    da = G_o.MASS + G_o.INTERSECTION [l > 0] + G_o.COST phi'(a, [l > 0]) + E_o e'
       + G_l.MASS + [inside] (G_l.INTERSECTION + G_l.COST c') + [here] (G_s.0 y + G_s.1 phi'(a, y)),
    F = F_o, but G_s.BY_REST / |o| where o is of the rest and touches no label,

with e' = phi'(a a, 0) a [y = 0], c' = phi'(a, 1); without no_tp e' = phi'(a, 0), c' = phi'(a, 1) - phi'(a, 0), and
E_o the sum of G_l.COST over the labels that o touches. `here` is everywhere for a soft a, and where a or y is 1 for a
hard one, whose background is right and has no gradient. It goes on to z (../ops.py), together with that of the pixel
term, du = G_p.0 w + G_p.1 phi'(u, w) for the u and w of activation.py and the pixel term's own phi; with a hard u,
only `here`. With s = p (1 - p), p the probability, or s = 1 where there is none:

    dz = (da + F + M) s + du s    if the pixel term sees the probability or the hard output,
    dz = (da + F + M) s + du      if it sees x itself; without du if it is not fused,

and F p + M (1 - p) in place of (F + M) s where the gradient of mistakes is that of a logarithm.

phi is computed in the precision of a (forward, float32 for a hard a) or of x (backward), and added in float64.
Deterministic where the values are integers, as for a hard a; otherwise atomics add in any order, which shows in the
last bits of a float64, unless PyTorch is asked to be deterministic: then one program goes over the blocks of a sample.
Bytes a voxel: forward 8, and x where that is a. Backward 8, x where the formulas want it (not for a given probability
that no pixel term sees), the labels where the pixel term sees them, and one gradient written.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops, quantities
from .activation import NONE, NOT_FUSED, RAW, probability, seen_by_pixel
from .blocks import adding_programs, block_size, cut, threads
from .launches import launch
from .pairs import SUMS_WARPS, insert_pair, sum_neighbours
from .prepare import Cleared, prepare
from .quantities import phi, phi_derivative, sum_where

MASS: tl.constexpr = tl.constexpr(ops.MASS)
INTERSECTION: tl.constexpr = tl.constexpr(ops.INTERSECTION)
COST: tl.constexpr = tl.constexpr(ops.COST)
TOUCHED: tl.constexpr = tl.constexpr(ops.TOUCHED)
OVERLAP: tl.constexpr = tl.constexpr(ops.OVERLAP)
COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.GRADIENT_COLUMNS)
SAMPLE_GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_GRADIENT_COLUMNS)
WHOLE_GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.WHOLE_GRADIENT_COLUMNS)
BY_REST: tl.constexpr = tl.constexpr(ops.BY_REST)
BY_FALSE: tl.constexpr = tl.constexpr(ops.BY_FALSE)
FALSE_INSTANCES: tl.constexpr = tl.constexpr(ops.FALSE_INSTANCES)
MISSED_INSTANCES: tl.constexpr = tl.constexpr(ops.MISSED_INSTANCES)
SLOPES_COLUMNS: tl.constexpr = tl.constexpr(ops.SLOPES_COLUMNS)
HARD: tl.constexpr = tl.constexpr(ops.HARD)
NO_GRADIENT: tl.constexpr = tl.constexpr(ops.NO_GRADIENT)
OF_MEAN: tl.constexpr = tl.constexpr(ops.OF_MEAN)
OF_LOGARITHM: tl.constexpr = tl.constexpr(ops.OF_LOGARITHM)
# For one warp (pairs.py), which reduces without barriers. A soft output or a cross entropy has several numbers a voxel
# to keep instead of one; in a block of 128, some would not fit the registers.
SUMS_BLOCK, LONG_SUMS_BLOCK = 256, 64
# Four voxels a thread of one warp, so that a block of background is found without a barrier; two of float64, of which
# more would not fit the registers.
GRADIENT_BLOCK, WIDE_GRADIENT_BLOCK, GRADIENT_WARPS = 128, 64, 1


@triton.jit
def _times(grad, slope, here):
    """Chain rule in float64 on the lanes `here`; 0 elsewhere, even where the slope is not finite."""
    return tl.where(here, grad * slope.to(tl.float64), 0.0)


@triton.jit
def _sum_instances_kernel(
    x_ptr,  # (B, V) float32 or float64
    sites_ptr,  # (2 B, V) int32
    counts_ptr,  # (3, B) int32
    sums_ptr,  # (2 B, capacity, 5) float64
    excess_ptr,  # (B, capacity) float64
    parts_ptr,  # (B, blocks, 3) float64: of the sums of a sample
    pairs_ptr,  # (B, pair_capacity) int64
    touched_ptr,  # (B, rest) bool
    V,
    capacity,
    pair_capacity,
    rest,
    QUANTITY: tl.constexpr,
    NO_TP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    WHOLE: tl.constexpr = ACTIVATION != NONE  # so are all quantities of zeros and ones
    sample = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1)
    kept = tl.load(counts_ptr + KEPT * B + sample)
    alone = (kept == 0) | (tl.load(counts_ptr + LABELS * B + sample) == 0)
    blocks = (V - 1) // BLOCK + 1  # rounded up; V + BLOCK may not fit
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        voxel = block * BLOCK + tl.arange(0, BLOCK)
        index = sample * V + voxel
        in_volume = voxel < V
        out_site = tl.load(sites_ptr + index, mask=in_volume, other=0)
        lab_site = tl.load(sites_ptr + B.to(tl.int64) * V + index, mask=in_volume, other=0)
        y = (lab_site != 0).to(tl.float32)
        a = (out_site != 0).to(tl.float32)
        if ACTIVATION == NONE:
            a = tl.load(x_ptr + index, mask=in_volume, other=0)
            y = y.to(a.dtype)

        if alone:  # elsewhere nobody asks for the sums of the sample
            part_ptr = parts_ptr + (sample * blocks + block) * SAMPLE_COLUMNS
            tl.store(part_ptr, sum_where(a * y, in_volume, WHOLE))
            tl.store(part_ptr + 1, sum_where(phi(a, y, QUANTITY), in_volume, WHOLE))
            tl.store(part_ptr + 2, sum_where(y, in_volume, WHOLE))
        if tl.max(tl.maximum(out_site, lab_site), axis=0) > 0:  # most blocks are background
            key = (tl.maximum(out_site, 0).to(tl.int64) << 32) | tl.maximum(lab_site, 0)
            phi_0 = phi(a, tl.zeros_like(a), QUANTITY)
            phi_1 = phi(a, tl.zeros_like(a) + 1, QUANTITY)
            excess = tl.where(y > 0, 0.0, phi(a * a, tl.zeros_like(a), QUANTITY)) if NO_TP else phi_0
            # (in a branch, Triton 3.2 takes no function as a condition, nor one that gives what nobody takes)
            left = tl.max(key, axis=0) > 0
            while left:
                largest = tl.max(key, axis=0)
                here = key == largest
                out, lab = largest >> 32, largest & 0xFFFFFFFF
                inside = (out > 0) & (out <= kept)
                count = tl.sum(here.to(tl.int32), axis=0).to(tl.float64)
                mass = sum_where(a, here, WHOLE)
                cost_0, cost_1 = sum_where(phi_0, here, WHOLE), sum_where(phi_1, here, WHOLE)
                if (out > 0) & (out <= capacity):
                    row_ptr = sums_ptr + (sample * capacity + out - 1) * COLUMNS
                    tl.atomic_add(row_ptr + MASS, mass, sem="relaxed")
                    tl.atomic_add(row_ptr + COST, tl.where(lab > 0, cost_1, cost_0), sem="relaxed")
                    tl.atomic_add(
                        excess_ptr + sample * capacity + out - 1, sum_where(excess, here, WHOLE), sem="relaxed"
                    )
                    if lab > 0:
                        tl.atomic_add(row_ptr + INTERSECTION, mass, sem="relaxed")
                        tl.atomic_add(row_ptr + OVERLAP, count, sem="relaxed")
                elif (out > capacity) & (out <= capacity + rest) & (lab > 0):
                    tl.store(touched_ptr + sample * rest + out - capacity - 1, True)
                if (lab > 0) & (lab <= capacity):
                    row_ptr = sums_ptr + ((B + sample) * capacity + lab - 1) * COLUMNS
                    tl.atomic_add(row_ptr + MASS, mass, sem="relaxed")
                    if out > 0:
                        tl.atomic_add(row_ptr + TOUCHED, count, sem="relaxed")
                    if inside:
                        tl.atomic_add(row_ptr + INTERSECTION, mass, sem="relaxed")
                        tl.atomic_add(row_ptr + COST, cost_1 if NO_TP else cost_1 - cost_0, sem="relaxed")
                        tl.atomic_add(row_ptr + OVERLAP, count, sem="relaxed")
                        _ = insert_pair(pairs_ptr + sample * pair_capacity, out, lab, pair_capacity, THREADS)
                key = tl.where(here, 0, key)
                left = tl.max(key, axis=0) > 0


@triton.jit
def _of_outputs(
    a, out, lab, sample, grad_sums_ptr, grad_excess_ptr, capacity, QUANTITY: tl.constexpr, NO_TP: tl.constexpr
):
    """Gradient of a, from those of the sums of outputs."""
    here = (out > 0) & (out <= capacity)
    row = sample * capacity + out - 1
    row_ptr = grad_sums_ptr + row * GRADIENT_COLUMNS
    grad = tl.load(row_ptr + MASS, mask=here, other=0.0)
    grad += tl.load(row_ptr + INTERSECTION, mask=here & (lab > 0), other=0.0)
    slope = phi_derivative(a, (lab > 0).to(a.dtype), QUANTITY)
    grad += _times(tl.load(row_ptr + COST, mask=here, other=0.0), slope, here)
    excess = phi_derivative(a, tl.zeros_like(a), QUANTITY)
    if NO_TP:
        excess = tl.where(lab != 0, 0.0, phi_derivative(a * a, tl.zeros_like(a), QUANTITY) * a)
    grad_excess = tl.load(grad_excess_ptr + row, mask=here, other=0.0)
    return grad + _times(grad_excess, excess, here)


@triton.jit
def _of_labels(a, out, lab, sample, kept, grad_sums_ptr, capacity, QUANTITY: tl.constexpr, NO_TP: tl.constexpr):
    """Gradient of a, from those of the sums of labels."""
    here = (lab > 0) & (lab <= capacity)
    inside = here & (out > 0) & (out <= kept)
    row_ptr = grad_sums_ptr + ((tl.num_programs(1) + sample) * capacity + lab - 1) * GRADIENT_COLUMNS
    grad = tl.load(row_ptr + MASS, mask=here, other=0.0)
    grad += tl.load(row_ptr + INTERSECTION, mask=inside, other=0.0)
    slope = phi_derivative(a, tl.zeros_like(a) + 1, QUANTITY)
    if not NO_TP:
        slope = slope - phi_derivative(a, tl.zeros_like(a), QUANTITY)
    return grad + _times(tl.load(row_ptr + COST, mask=inside, other=0.0), slope, inside)


@triton.jit
def _of_instances(
    x,
    out,
    lab,
    sample,
    grad_sums_ptr,
    grad_excess_ptr,
    sample_ptr,
    counts_ptr,
    capacity,
    QUANTITY: tl.constexpr,
    NO_TP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Gradient of a, from those of the sums of instances and of the whole sample."""
    kept = tl.load(counts_ptr + KEPT * tl.num_programs(1) + sample)
    a = x if ACTIVATION == NONE else (out != 0).to(x.dtype)
    grad = tl.zeros(x.shape, tl.float64)
    if tl.max(out, axis=0) > 0:
        grad += _of_outputs(a, out, lab, sample, grad_sums_ptr, grad_excess_ptr, capacity, QUANTITY, NO_TP)
    if tl.max(lab, axis=0) > 0:
        grad += _of_labels(a, out, lab, sample, kept, grad_sums_ptr, capacity, QUANTITY, NO_TP)
    by_both, by_a = tl.load(sample_ptr), tl.load(sample_ptr + 1)
    y = (lab != 0).to(x.dtype)
    slope = phi_derivative(a, y, QUANTITY).to(tl.float64)
    if ACTIVATION != NONE:
        slope = tl.where((out != 0) | (lab != 0), slope, 0.0)
    return grad + by_both * y.to(tl.float64) + by_a * slope


@triton.jit
def _of_mistakes(row_ptr, row, capacity):
    """Slopes of false or of missed instances at their voxels, of one side of a sample."""
    here = (row > 0) & (row <= capacity)
    return tl.load(row_ptr + (row.to(tl.int64) - 1) * SLOPES_COLUMNS + BY_FALSE, mask=here, other=0.0)


@triton.jit
def _of_rest(out, sample, sample_ptr, rest_sizes_ptr, touched_ptr, capacity, rest):
    """Gradients of false instances beyond the tables at their voxels."""
    here = (out > capacity) & (out <= capacity + rest)
    row = sample * rest + out - capacity - 1
    size = tl.load(rest_sizes_ptr + row, mask=here, other=1)
    touched = tl.load(touched_ptr + row, mask=here, other=1)
    return tl.where(touched, 0.0, tl.load(sample_ptr + BY_REST) / size.to(tl.float64))


@triton.jit
def _sum_instances_backward_kernel(
    grad_terms_ptr,  # (7,) float64
    slopes_ptr,  # (2 B, capacity, 5) float64
    grad_sums_ptr,  # (2 B, capacity, 3) float64
    grad_excess_ptr,  # (B, capacity) float64
    grad_sample_sums_ptr,  # (B, 3) float64
    grad_pixel_sums_ptr,  # (B, 2) float64
    x_ptr,  # (B, V) float32 or float64
    labels_ptr,  # (B, V) of any real dtype
    sites_ptr,  # (2 B, V) int32
    rest_sizes_ptr,  # (B, rest) int32
    touched_ptr,  # (B, rest) bool
    counts_ptr,  # (3, B) int32
    grad_x_ptr,  # (B, V), of the dtype of x
    V,
    capacity,
    rest,
    QUANTITY: tl.constexpr,
    NO_TP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIXEL: tl.constexpr,
    PIXEL_QUANTITY: tl.constexpr,
    MISTAKES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1)
    index = sample * V + voxel
    in_volume = voxel < V
    # What is loaded and then not used, the compiler drops.
    x = tl.load(x_ptr + index, mask=in_volume, other=0)
    out = tl.load(sites_ptr + index, mask=in_volume, other=0)
    lab = tl.load(sites_ptr + B.to(tl.int64) * V + index, mask=in_volume, other=0)
    p = probability(x, ACTIVATION)
    here = (out != 0) | (lab != 0)
    sample_ptr = grad_sample_sums_ptr + sample * WHOLE_GRADIENT_COLUMNS
    # Where something is broken the loads are NaN, and so is the gradient everywhere.
    grad = tl.zeros((BLOCK,), tl.float64) + 0.0 * (tl.load(sample_ptr) + tl.load(sample_ptr + 1))
    false, missed = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    # A soft output is everywhere; most blocks of a hard one are background.
    if (ACTIVATION == NONE) | (tl.max(here.to(tl.int32), axis=0) > 0):
        grad += _of_instances(
            x, out, lab, sample, grad_sums_ptr, grad_excess_ptr, sample_ptr, counts_ptr, capacity,
            QUANTITY, NO_TP, ACTIVATION,
        )  # fmt: skip
        if MISTAKES != NO_GRADIENT:
            row_ptr = slopes_ptr + sample * capacity * SLOPES_COLUMNS
            false = tl.load(grad_terms_ptr + FALSE_INSTANCES) * _of_mistakes(row_ptr, out, capacity)
            row_ptr += B.to(tl.int64) * capacity * SLOPES_COLUMNS
            missed = tl.load(grad_terms_ptr + MISSED_INSTANCES) * _of_mistakes(row_ptr, lab, capacity)
            if tl.max(out, axis=0) > capacity:
                false += _of_rest(out, sample, sample_ptr, rest_sizes_ptr, touched_ptr, capacity, rest)
        if MISTAKES == OF_MEAN:
            grad += false + missed
    if PIXEL != NOT_FUSED:
        labels = tl.load(labels_ptr + index, mask=in_volume, other=0)
        u, w = seen_by_pixel(x, p, out != 0, lab != 0, labels, PIXEL)
        row_ptr = grad_pixel_sums_ptr + sample * SAMPLE_GRADIENT_COLUMNS
        by_u = tl.load(row_ptr) * w.to(tl.float64)
        by_u += tl.load(row_ptr + 1) * phi_derivative(u, w, PIXEL_QUANTITY).to(tl.float64)
        if PIXEL == HARD:
            by_u = tl.where(here, by_u, 0.0)
        if PIXEL != RAW:
            grad += by_u
    if ACTIVATION != NONE:
        grad *= (p * (1 - p)).to(tl.float64)
    if MISTAKES == OF_LOGARITHM:
        grad += false * p.to(tl.float64) + missed * (1 - p).to(tl.float64)
    if PIXEL == RAW:
        grad += by_u
    tl.store(grad_x_ptr + index, grad.to(x.dtype), mask=in_volume)


def launch_sum_instances(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums by instance and by sample, the pairs that touch, for which there is room for `pairs`, and the rest."""
    cleared, *_ = prepare(geometry, counts, pairs, sites[1].shape[1])
    sample_sums = sum_instances(cleared, x, sites, counts, geometry, activation, quantity, no_tp)
    return cleared.sums, sample_sums, cleared.pairs, cleared.touched


def sum_instances(
    tables: Cleared,
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
) -> Tensor:
    """Add the sums by instance to tables, and write the pairs that touch and the rest; gives the sums by sample."""
    (batch, *shape), (_, capacity, _) = x.shape, geometry.shape
    num_voxels = math.prod(shape)
    several = activation == ops.NONE or quantity == quantities.CROSS_ENTROPY
    block = block_size(num_voxels, LONG_SUMS_BLOCK if several else SUMS_BLOCK)
    blocks = cut(num_voxels, block)
    sizes = (batch, blocks, ops.SAMPLE_COLUMNS), (batch, ops.SAMPLE_COLUMNS)
    parts, sample_sums = (torch.empty(size, dtype=torch.float64, device=x.device) for size in sizes)
    if batch > 0 and num_voxels > 0:
        # Sums of a hard output are whole numbers, the same in any order.
        programs = adding_programs(blocks) if activation == ops.NONE else blocks
        launch(_sum_instances_kernel, (programs, batch),
            x, sites[0], counts, tables.sums, tables.excess, parts, tables.pairs, tables.touched,
            num_voxels, capacity, tables.pairs.shape[1], tables.touched.shape[1],
            quantity, no_tp, activation, block, threads(SUMS_WARPS), num_warps=SUMS_WARPS,
        )  # fmt: skip
    if batch > 0:
        sum_neighbours(tables.pairs, geometry, tables.excess, counts, parts, tables.sums, sample_sums)
    return sample_sums


def launch_sum_instances_backward(
    grad_terms: Tensor,
    slopes: Tensor,
    grad_sums: Tensor,
    grad_excess: Tensor,
    grad_sample_sums: Tensor,
    grad_pixel_sums: Tensor,
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    touched: Tensor,
    counts: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
    mistakes: int,
) -> Tensor:
    """Gradient of z from those of the sums by instance and by sample, of the pixel term's, and of the mistakes."""
    grad_x = torch.empty_like(x)
    batch, capacity, num_voxels = len(x), grad_sums.shape[1], math.prod(x.shape[1:])
    if batch * num_voxels == 0:
        return grad_x
    block = block_size(num_voxels, WIDE_GRADIENT_BLOCK if x.dtype == torch.float64 else GRADIENT_BLOCK)
    launch(_sum_instances_backward_kernel, (cut(num_voxels, block), batch),
        grad_terms, slopes, grad_sums, grad_excess, grad_sample_sums, grad_pixel_sums, x, labels, *sites,
        touched, counts, grad_x, num_voxels, capacity, touched.shape[1],
        quantity, no_tp, activation, pixel, pixel_quantity if pixel != ops.NOT_FUSED else 0, mistakes, block,
        num_warps=GRADIENT_WARPS,
    )  # fmt: skip
    return grad_x
