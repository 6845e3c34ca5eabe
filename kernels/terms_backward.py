"""Gradients of the sums of instances, from those of the terms: the backward of terms.py.

With g the gradients of the terms, D the distances and w the weights of a sample,

    dv_l = g.instance_label w_l + g.proximity s D_l,    dv_o = g.instance_output w_o - g.proximity s D_o,
    s = 2 / B (sum D_l v_l - sum D_o v_o),

and from there by the slopes to MASS, INTERSECTION and COST of each row, and to the excess of outputs (pairs.py).

Deterministic: everything is added in a fixed order. All is float64. Bytes a voxel: none; 100 for each instance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, table_programs
from .launches import bits_of, launch, of_bits
from .pairs import NEIGHBOURS_BLOCK, NEIGHBOURS_WARPS, touching
from .terms import (
    BY_CENTER,
    BY_DISTANCE,
    BY_INTERSECTION,
    BY_LABEL,
    BY_MISTAKE,
    BY_OUTPUT,
    BY_PREDICTION,
    CENTER,
    COST,
    DISTANCE,
    FALSE_INSTANCES,
    INSTANCE_LABEL,
    INSTANCE_OUTPUT,
    INTERSECTION,
    KEPT,
    LABELS,
    MISSED_INSTANCES,
    NO_WEIGHTS,
    OUTPUTS,
    PIXEL,
    PIXEL_BY_INTERSECTION,
    PIXEL_BY_PREDICTION,
    PROXIMITY,
    ROWS_BLOCK,
    SAMPLE_SLOPES_COLUMNS,
    SLOPES_COLUMNS,
    WEIGHTS,
    WHOLE_BY_INTERSECTION,
    WHOLE_BY_PREDICTION,
)

MASS: tl.constexpr = tl.constexpr(ops.MASS)
GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.GRADIENT_COLUMNS)
SAMPLE_GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_GRADIENT_COLUMNS)
WHOLE_GRADIENT_COLUMNS: tl.constexpr = tl.constexpr(ops.WHOLE_GRADIENT_COLUMNS)
BY_REST: tl.constexpr = tl.constexpr(ops.BY_REST)


@triton.jit
def _gradient_of(grad_terms_ptr, grad_total_ptr, weight, TERM: tl.constexpr):
    """Gradient of a term, from that of the terms and that of their total, either of which may be missing."""
    gradient = tl.zeros([], tl.float64)
    if grad_terms_ptr is not None:
        gradient += tl.load(grad_terms_ptr + TERM).to(tl.float64)
    if grad_total_ptr is not None:
        gradient += tl.load(grad_total_ptr).to(tl.float64) * of_bits(weight)
    return gradient


@triton.jit
def _by_criterion(row_ptr, here, by_value, by_near):
    """Gradient of the criterion of rows of slopes."""
    return by_value + by_near * tl.load(row_ptr + DISTANCE, mask=here, other=0.0)


@triton.jit(do_not_specialize=WEIGHTS)
def _terms_backward_kernel(
    weight_0: tl.int64,  # of each term in the total, a float64 in its bits
    weight_1: tl.int64,
    weight_2: tl.int64,
    weight_3: tl.int64,
    weight_4: tl.int64,
    weight_5: tl.int64,
    weight_6: tl.int64,
    grad_terms_ptr,  # (7,) of any float dtype, or None
    grad_total_ptr,  # () of any float dtype, or None
    slopes_ptr,  # (2 B, capacity, 5) float64
    sample_slopes_ptr,  # (B, 8) float64
    counts_ptr,  # (3, B) int32
    grad_sums_ptr,  # (2 B, capacity, 3) float64
    grad_excess_ptr,  # (B, capacity) float64
    grad_sample_sums_ptr,  # (B, 3) float64
    grad_pixel_sums_ptr,  # (B, 2) float64
    grad_each_ptr,  # (7,) float64: of each term, with its share of the total's
    pairs_ptr,  # (B, slots) int64
    slots,
    capacity,
    MASSES: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1)
    outputs, kept = tl.load(counts_ptr + OUTPUTS * B + sample), tl.load(counts_ptr + KEPT * B + sample)
    labels = tl.load(counts_ptr + LABELS * B + sample)
    if tl.program_id(0) >= tl.maximum(tl.maximum(outputs, labels), 1):  # there is no row for it
        return
    sample_slopes_ptr += sample * SAMPLE_SLOPES_COLUMNS
    by_label = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_1, INSTANCE_LABEL)
    by_output = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_2, INSTANCE_OUTPUT)
    by_center = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_3, CENTER)
    by_proximity = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_6, PROXIMITY)
    if tl.program_id(0) == 0:
        by_pixel = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_0, PIXEL)
        by_false = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_4, FALSE_INSTANCES)
        row_ptr = grad_pixel_sums_ptr + sample * SAMPLE_GRADIENT_COLUMNS
        tl.store(row_ptr, by_pixel * tl.load(sample_slopes_ptr + PIXEL_BY_INTERSECTION))
        tl.store(row_ptr + 1, by_pixel * tl.load(sample_slopes_ptr + PIXEL_BY_PREDICTION))
        by_mistake = by_pixel * 0.0
        if MASSES:
            by_mistake = by_false * tl.load(sample_slopes_ptr + BY_MISTAKE)
        tl.store(grad_sample_sums_ptr + sample * WHOLE_GRADIENT_COLUMNS + BY_REST, by_mistake)
        if sample == 0:
            by_missed = _gradient_of(grad_terms_ptr, grad_total_ptr, weight_5, MISSED_INSTANCES)
            tl.store(grad_each_ptr + PIXEL, by_pixel)
            tl.store(grad_each_ptr + INSTANCE_LABEL, by_label)
            tl.store(grad_each_ptr + INSTANCE_OUTPUT, by_output)
            tl.store(grad_each_ptr + CENTER, by_center)
            tl.store(grad_each_ptr + FALSE_INSTANCES, by_false)
            tl.store(grad_each_ptr + MISSED_INSTANCES, by_missed)
            tl.store(grad_each_ptr + PROXIMITY, by_proximity)
    by_distance = by_proximity * tl.load(sample_slopes_ptr + BY_DISTANCE)
    by_whole = by_distance * 0.0
    for side in tl.static_range(2):
        if side == 0:
            count, used = outputs, kept
            by_value = by_output * tl.load(sample_slopes_ptr + BY_OUTPUT)
            by_near = -by_distance
        else:
            count, used = labels, labels
            by_value = by_label * tl.load(sample_slopes_ptr + BY_LABEL)
            by_near = by_distance
        start = (side * B + sample) * capacity
        if used == 0:  # row 0 is the whole sample
            by_whole += by_value + by_near * tl.load(slopes_ptr + start * SLOPES_COLUMNS + DISTANCE)
        rows = tl.minimum(count, capacity)
        for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
            row = first + tl.arange(0, BLOCK)
            here = row < rows
            row_ptr = slopes_ptr + (start + row) * SLOPES_COLUMNS
            mass = tl.zeros((BLOCK,), tl.float64)
            intersection = tl.zeros((BLOCK,), tl.float64)
            cost = tl.zeros((BLOCK,), tl.float64)
            if MASSES:
                mass = by_center * tl.load(row_ptr + BY_CENTER, mask=here, other=0.0)
            if VALUES:
                value = _by_criterion(row_ptr, here, by_value, by_near)
                intersection = value * tl.load(row_ptr + BY_INTERSECTION, mask=here, other=0.0)
                cost = value * tl.load(row_ptr + BY_PREDICTION, mask=here, other=0.0)
            row_ptr = grad_sums_ptr + (start + row) * GRADIENT_COLUMNS
            tl.store(row_ptr + MASS, mass, mask=here)
            tl.store(row_ptr + INTERSECTION, intersection, mask=here)
            tl.store(row_ptr + COST, cost, mask=here)
    if tl.program_id(0) == 0:
        if not VALUES:
            by_whole = by_distance * 0.0
        row_ptr = grad_sample_sums_ptr + sample * WHOLE_GRADIENT_COLUMNS
        tl.store(row_ptr, by_whole * tl.load(sample_slopes_ptr + WHOLE_BY_INTERSECTION))
        tl.store(row_ptr + 1, by_whole * tl.load(sample_slopes_ptr + WHOLE_BY_PREDICTION))

    # (rows, by_value and by_near are now those of labels)
    labels_ptr = slopes_ptr + (B + sample) * capacity * SLOPES_COLUMNS
    for row in range(tl.program_id(0), tl.minimum(outputs, capacity), tl.num_programs(0)):
        brought = tl.zeros((NEIGHBOURS,), tl.float64)
        if VALUES:
            for first in range(0, tl.where(row < kept, rows, 0), NEIGHBOURS):
                lab = first + tl.arange(0, NEIGHBOURS)
                here = touching(pairs_ptr + sample * slots, row + lab * 0, lab, lab < rows, slots)
                row_ptr = labels_ptr + lab * SLOPES_COLUMNS
                cost = tl.load(row_ptr + BY_PREDICTION, mask=here, other=0.0)
                brought += cost * _by_criterion(row_ptr, here, by_value, by_near)
        tl.store(grad_excess_ptr + sample * capacity + row, tl.sum(brought, axis=0))


def launch_terms_backward(
    grad_terms: Tensor | None,
    grad_total: Tensor | None,
    weights: tuple[float, ...],
    slopes: Tensor,
    sample_slopes: Tensor,
    pairs: Tensor,
    counts: Tensor,
    masses: bool,
    values: bool,
) -> tuple[Tensor, ...]:
    """Gradient of each term, from those of the terms and of their sum.

    And of the sums of instances, of the excess of outputs, of the sums of samples and of those of the pixel term.
    """
    (_, capacity, _), (batch, slots) = slopes.shape, pairs.shape
    sizes = (len(WEIGHTS),), (2 * batch, capacity, ops.GRADIENT_COLUMNS), (batch, capacity)
    sizes += (batch, ops.WHOLE_GRADIENT_COLUMNS), (batch, ops.SAMPLE_GRADIENT_COLUMNS)
    each, *grads = (torch.empty(size, dtype=torch.float64, device=slopes.device) for size in sizes)
    if batch > 0:
        launch(_terms_backward_kernel, (max(table_programs(capacity), 1), batch),
            grad_terms, grad_total, slopes, sample_slopes, counts, *grads, each, pairs, slots, capacity, masses, values,
            block_size(capacity, ROWS_BLOCK), block_size(capacity, NEIGHBOURS_BLOCK),
            values=bits_of(weights or NO_WEIGHTS), num_warps=NEIGHBOURS_WARPS,
        )  # fmt: skip
    return each, *grads
