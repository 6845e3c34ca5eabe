"""Sums of the activated output over instances, the pairs that touch, and the gradient of the sums.

At a voxel: a the activated output, y its label, o and l the rows of its output and label instance (0 = none), inside
= (1 <= o <= kept), phi(a, w) the quantity of the criterion. Then (columns as in ops.py)

    output o:  MASS a     INTERSECTION a [l > 0]     COST phi(a, [l > 0])     EXCESS e     OVERLAP [l > 0]
    label l:   MASS a     INTERSECTION a [inside]    COST c [inside]          TOUCHED [o > 0]   OVERLAP [inside]
    sample:    a y, phi(a, y), y

with e = phi(a s, 0) [y = 0], s = a held constant, c = phi(a, 1); without no_tp e = phi(a, 0), c = phi(a, 1) - phi(a,
0). All voxels of a block with the same pair (o, l) go the same way, so the block adds up by pairs: while lanes
remain, take the largest pair, reduce a, phi(a, 0), phi(a, 1) and e over its lanes, send scalar atomics to both rows,
drop those lanes. If the pair touches, it goes into a hash table of one sample (linear probing; a slot is taken by
compare-and-swap, never freed).

Backward, G the gradients of the tables, phi' the derivative in a:

    da = G_o.MASS + G_o.INTERSECTION [l > 0] + G_o.COST phi'(a, [l > 0]) + G_o.EXCESS e'
       + G_l.MASS + [inside] (G_l.INTERSECTION + G_l.COST c') + G_s.0 y + G_s.1 phi'(a, y)

with e' = phi'(a a, 0) a [y = 0], c' = phi'(a, 1); without no_tp e' = phi'(a, 0), c' = phi'(a, 1) - phi'(a, 0).

phi is computed in the precision of a (float32 for a hard a) and added in float64. Deterministic where the values are
integers, as for a hard a; otherwise atomics add in any order, which shows in the last bits of a float64. The backward
is deterministic; the order of the pairs is not. Bytes a voxel: forward 9 + the size of a, read once; backward the
same and one gradient written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size

MASS: tl.constexpr = tl.constexpr(ops.MASS)
INTERSECTION: tl.constexpr = tl.constexpr(ops.INTERSECTION)
COST: tl.constexpr = tl.constexpr(ops.COST)
EXCESS: tl.constexpr = tl.constexpr(ops.EXCESS)
TOUCHED: tl.constexpr = tl.constexpr(ops.TOUCHED)
OVERLAP: tl.constexpr = tl.constexpr(ops.OVERLAP)
COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
# One warp, for two reasons: it reduces without barriers, and all its threads see one slot of the hash table alike.
SUMS_BLOCK, SUMS_WARPS = 256, 1
THREADS: tl.constexpr = tl.constexpr(32 * SUMS_WARPS)
GRADIENT_BLOCK = 512
PAIRS_BLOCK = 256
# Odd multipliers with well spread bits (from the golden ratio and from MurmurHash3), below 2^32, so that a product with
# a row stays below 2^63. The low bits of a product are the worst mixed.
OUT_FACTOR: tl.constexpr = tl.constexpr(0x9E3779B1)
LAB_FACTOR: tl.constexpr = tl.constexpr(0x85EBCA6B)
HASH_SHIFT: tl.constexpr = tl.constexpr(15)


@triton.jit
def _at_least(value, LOWEST: tl.constexpr):
    """`value`, or LOWEST if that is larger; NaN stays NaN, as in torch.clamp."""
    return tl.where(value < LOWEST, tl.full(value.shape, LOWEST, value.dtype), value)


@triton.jit
def _phi(u, w, QUANTITY: tl.constexpr):
    """phi(u, w) for a block w of zeros and ones: u, u^2, |u - w|, (u - w)^2 or binary cross entropy."""
    if QUANTITY == 0:
        phi = u
    elif QUANTITY == 1:
        phi = u * u
    elif QUANTITY == 2:
        phi = tl.abs(u - w)
    elif QUANTITY == 3:
        phi = (u - w) * (u - w)
    else:
        phi = -_at_least(tl.log(tl.where(w > 0, u, 1 - u)), -100.0)
    return phi


@triton.jit
def _phi_derivative(u, w, QUANTITY: tl.constexpr):
    """Derivative of phi(u, w) in u."""
    if QUANTITY == 0:
        derivative = tl.zeros_like(u) + 1
    elif QUANTITY == 1:
        derivative = 2 * u
    elif QUANTITY == 2:
        derivative = tl.where(u > w, 1.0, tl.where(u < w, -1.0, u - w)).to(u.dtype)  # u - w is 0 or NaN there
    elif QUANTITY == 3:
        derivative = 2 * (u - w)
    else:
        derivative = (u - w) / _at_least(u * (1 - u), 1e-12)
    return derivative


@triton.jit
def _sum(value, here):
    """Sum of the lanes `here`, in float64."""
    return tl.sum(tl.where(here, value.to(tl.float64), 0.0), axis=0)


@triton.jit
def _times(grad, slope, here):
    """Chain rule in float64 on the lanes `here`; 0 elsewhere, even where the slope is not finite."""
    return tl.where(here, grad * slope.to(tl.float64), 0.0)


@triton.jit
def _insert_pair(pairs_ptr, out, lab, slots):
    """Put a pair of rows into the hash table of `slots` (a power of two), unless it is there or the table is full."""
    key = (out << 32) | lab
    slot = (((out * OUT_FACTOR) ^ (lab * LAB_FACTOR)) >> HASH_SHIFT) & (slots - 1)
    empty = tl.zeros((THREADS,), tl.int64)
    probes = 0
    while probes < slots:
        found = tl.load(pairs_ptr + slot)
        if found == 0:
            # All threads try to take the slot: Triton up to 3.4 can't assemble a scalar compare-and-swap of 64 bits.
            # If one of them did, the next ones found the key there.
            found = tl.max(tl.atomic_cas(pairs_ptr + slot + empty, empty, empty + key, sem="relaxed"), axis=0)
        probes = tl.where(found == key, slots, probes + 1)
        slot = (slot + 1) & (slots - 1)


@triton.jit
def _sum_instances_kernel(
    a_ptr,  # (B, V) bool, float32 or float64
    y_ptr,  # (B, V) bool
    out_rows_ptr,  # (B, V) int32
    lab_rows_ptr,  # (B, V) int32
    kept_ptr,  # (B,) int32
    out_sums_ptr,  # (B, out_capacity, 5) float64
    lab_sums_ptr,  # (B, lab_capacity, 5) float64
    sample_sums_ptr,  # (B, programs, 3) float64
    pairs_ptr,  # (B, pair_capacity) int64
    V,
    out_capacity,
    lab_capacity,
    pair_capacity,
    QUANTITY: tl.constexpr,
    NO_TP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    index = sample * V + voxel
    in_volume = voxel < V
    a = tl.load(a_ptr + index, mask=in_volume, other=0).to(PRECISION)
    y = tl.load(y_ptr + index, mask=in_volume, other=0).to(PRECISION)
    key = tl.load(out_rows_ptr + index, mask=in_volume, other=0).to(tl.int64) << 32
    key = key | tl.load(lab_rows_ptr + index, mask=in_volume, other=0)
    kept = tl.load(kept_ptr + sample)

    partial_ptr = sample_sums_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * SAMPLE_COLUMNS
    tl.store(partial_ptr, _sum(a * y, in_volume))
    tl.store(partial_ptr + 1, _sum(_phi(a, y, QUANTITY), in_volume))
    tl.store(partial_ptr + 2, _sum(y, in_volume))

    phi_0 = _phi(a, tl.zeros_like(a), QUANTITY)
    phi_1 = _phi(a, tl.zeros_like(a) + 1, QUANTITY)
    excess = tl.where(y > 0, 0.0, _phi(a * a, tl.zeros_like(a), QUANTITY)) if NO_TP else phi_0
    while tl.max(key, axis=0) > 0:
        largest = tl.max(key, axis=0)
        here = key == largest
        out, lab = largest >> 32, largest & 0xFFFFFFFF
        inside = (out > 0) & (out <= kept)
        count = _sum(tl.zeros_like(a) + 1, here)
        mass, cost_0, cost_1 = _sum(a, here), _sum(phi_0, here), _sum(phi_1, here)
        if (out > 0) & (out <= out_capacity):
            row_ptr = out_sums_ptr + (sample * out_capacity + out - 1) * COLUMNS
            tl.atomic_add(row_ptr + MASS, mass, sem="relaxed")
            tl.atomic_add(row_ptr + COST, tl.where(lab > 0, cost_1, cost_0), sem="relaxed")
            tl.atomic_add(row_ptr + EXCESS, _sum(excess, here), sem="relaxed")
            if lab > 0:
                tl.atomic_add(row_ptr + INTERSECTION, mass, sem="relaxed")
                tl.atomic_add(row_ptr + OVERLAP, count, sem="relaxed")
        if (lab > 0) & (lab <= lab_capacity):
            row_ptr = lab_sums_ptr + (sample * lab_capacity + lab - 1) * COLUMNS
            tl.atomic_add(row_ptr + MASS, mass, sem="relaxed")
            if out > 0:
                tl.atomic_add(row_ptr + TOUCHED, count, sem="relaxed")
            if inside:
                tl.atomic_add(row_ptr + INTERSECTION, mass, sem="relaxed")
                tl.atomic_add(row_ptr + COST, cost_1 if NO_TP else cost_1 - cost_0, sem="relaxed")
                tl.atomic_add(row_ptr + OVERLAP, count, sem="relaxed")
                _insert_pair(pairs_ptr + sample * pair_capacity, out, lab, pair_capacity)
        key = tl.where(here, 0, key)


@triton.jit
def _sum_instances_backward_kernel(
    grad_out_sums_ptr,  # (B, out_capacity, 5) float64
    grad_lab_sums_ptr,  # (B, lab_capacity, 5) float64
    grad_sample_sums_ptr,  # (B, 3) float64
    a_ptr,  # (B, V) bool, float32 or float64
    y_ptr,  # (B, V) bool
    out_rows_ptr,  # (B, V) int32
    lab_rows_ptr,  # (B, V) int32
    kept_ptr,  # (B,) int32
    grad_a_ptr,  # (B, V) float32 or float64
    V,
    out_capacity,
    lab_capacity,
    QUANTITY: tl.constexpr,
    NO_TP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    index = sample * V + voxel
    in_volume = voxel < V
    a = tl.load(a_ptr + index, mask=in_volume, other=0).to(PRECISION)
    y = tl.load(y_ptr + index, mask=in_volume, other=0).to(PRECISION)
    out = tl.load(out_rows_ptr + index, mask=in_volume, other=0)
    lab = tl.load(lab_rows_ptr + index, mask=in_volume, other=0)
    kept = tl.load(kept_ptr + sample)

    in_out = (out > 0) & (out <= out_capacity)
    in_lab = (lab > 0) & (lab <= lab_capacity)
    inside = in_lab & (out > 0) & (out <= kept)
    on_label = (lab > 0).to(PRECISION)
    slope_0 = _phi_derivative(a, tl.zeros_like(a), QUANTITY)
    slope_1 = _phi_derivative(a, tl.zeros_like(a) + 1, QUANTITY)
    excess = tl.where(y > 0, 0.0, _phi_derivative(a * a, tl.zeros_like(a), QUANTITY) * a) if NO_TP else slope_0

    row_ptr = grad_out_sums_ptr + (sample * out_capacity + out - 1) * COLUMNS
    grad = tl.load(row_ptr + MASS, mask=in_out, other=0.0)
    grad += tl.load(row_ptr + INTERSECTION, mask=in_out & (lab > 0), other=0.0)
    grad += _times(tl.load(row_ptr + COST, mask=in_out, other=0.0), _phi_derivative(a, on_label, QUANTITY), in_out)
    grad += _times(tl.load(row_ptr + EXCESS, mask=in_out, other=0.0), excess, in_out)

    row_ptr = grad_lab_sums_ptr + (sample * lab_capacity + lab - 1) * COLUMNS
    grad += tl.load(row_ptr + MASS, mask=in_lab, other=0.0)
    grad += tl.load(row_ptr + INTERSECTION, mask=inside, other=0.0)
    slope = slope_1 if NO_TP else slope_1 - slope_0
    grad += _times(tl.load(row_ptr + COST, mask=inside, other=0.0), slope, inside)

    row_ptr = grad_sample_sums_ptr + sample * SAMPLE_COLUMNS
    grad += tl.load(row_ptr) * y.to(tl.float64)
    grad += tl.load(row_ptr + 1) * _phi_derivative(a, y, QUANTITY).to(tl.float64)
    tl.store(grad_a_ptr + index, grad.to(grad_a_ptr.dtype.element_ty), mask=in_volume)


@triton.jit
def _sum_neighbours_kernel(
    values_ptr,  # (B, R) float64
    pairs_ptr,  # (B, P) int64
    sums_ptr,  # (B, capacity) float64
    R,
    P,
    capacity,
    TO_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    pair = tl.load(pairs_ptr + sample * P + slot, mask=slot < P, other=0)
    out, lab = pair >> 32, pair & 0xFFFFFFFF
    source, target = (out, lab) if TO_LABELS else (lab, out)
    here = (pair > 0) & (source <= R) & (target <= capacity)
    value = tl.load(values_ptr + sample * R + source - 1, mask=here, other=0.0)
    tl.atomic_add(sums_ptr + sample * capacity + target - 1, value, mask=here, sem="relaxed")


def _precision(a: Tensor) -> tl.dtype:
    """What phi is computed in."""
    return tl.float64 if a.dtype == torch.float64 else tl.float32


def launch_sum_instances(
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    out_capacity: int,
    lab_capacity: int,
    pair_capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums by output, by label and by sample, and the pairs that touch; `pair_capacity` is a power of two."""
    if pair_capacity < 1 or pair_capacity & (pair_capacity - 1):
        raise ValueError(f"pair_capacity must be a power of two, got {pair_capacity}.")
    batch, num_voxels = a.shape[0], a[0].numel() if a.shape[0] else 0
    out_sums = torch.zeros((batch, out_capacity, ops.SUMS_COLUMNS), dtype=torch.float64, device=a.device)
    lab_sums = torch.zeros((batch, lab_capacity, ops.SUMS_COLUMNS), dtype=torch.float64, device=a.device)
    pairs = torch.zeros((batch, pair_capacity), dtype=torch.int64, device=a.device)
    block = block_size(num_voxels, SUMS_BLOCK)
    programs = triton.cdiv(num_voxels, block)
    sample_sums = torch.empty((batch, programs, ops.SAMPLE_COLUMNS), dtype=torch.float64, device=a.device)
    if a.numel() > 0:
        _sum_instances_kernel[(programs, batch)](
            a, y, out_rows, lab_rows, kept, out_sums, lab_sums, sample_sums, pairs,
            num_voxels, out_capacity, lab_capacity, pair_capacity,
            quantity, no_tp, _precision(a), block, num_warps=SUMS_WARPS,
        )  # fmt: skip
    return out_sums, lab_sums, sample_sums.sum(dim=1), pairs


def launch_sum_instances_backward(
    grad_out_sums: Tensor,
    grad_lab_sums: Tensor,
    grad_sample_sums: Tensor,
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of `a`, of `dtype`, from the gradients of the three tables of sums."""
    grad_a = torch.empty(a.shape, dtype=dtype, device=a.device)
    if a.numel() == 0:
        return grad_a
    # Autograd hands over expanded gradients as they are.
    grads = [grad.contiguous() for grad in (grad_out_sums, grad_lab_sums, grad_sample_sums)]
    num_voxels = a[0].numel()
    block = block_size(num_voxels, GRADIENT_BLOCK)
    _sum_instances_backward_kernel[(triton.cdiv(num_voxels, block), a.shape[0])](
        *grads, a, y, out_rows, lab_rows, kept, grad_a,
        num_voxels, grad_out_sums.shape[1], grad_lab_sums.shape[1],
        quantity, no_tp, _precision(a), block,
    )  # fmt: skip
    return grad_a


def launch_sum_neighbours(values: Tensor, pairs: Tensor, to_labels: bool, capacity: int) -> Tensor:
    """For each of `capacity` rows of one side, the sum of `values` (B, R) float64 over the rows it is paired with."""
    (batch, rows), slots = values.shape, pairs.shape[1]
    sums = torch.zeros((batch, capacity), dtype=torch.float64, device=values.device)
    if min(batch, rows, slots, capacity) == 0:
        return sums
    block = block_size(slots, PAIRS_BLOCK)
    _sum_neighbours_kernel[(triton.cdiv(slots, block), batch)](
        values.contiguous(), pairs, sums, rows, slots, capacity, to_labels, block
    )
    return sums
