"""The terms and their slopes from sums over instances.

The criterion v of an instance and its derivatives follow from I, P and L (criteria.py). For a label, I = INTERSECTION,
L = its size; for a kept output, I = INTERSECTION, L = LABEL; and P = COST + missing (L - OVERLAP), where missing =
phi(0, 1). A side of a sample without rows has the value of the whole sample in row 0.

`_terms_kernel`, one program a sample, goes over the rows of both sides, up to the counts, which only the device knows.
It adds up what they contribute to the terms, and writes the slopes of each row. The program that is done last adds up
what the samples contribute, in their order.

Deterministic: sums of a sample are added in a fixed order. All is float64. Bytes a voxel: none; 200 for each instance.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size
from .criteria import center_criterion, criterion, share, weight
from .launches import aside, bits_of, launch, of_bits

GEOMETRY_COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
SUMS_COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
INTERSECTION: tl.constexpr = tl.constexpr(ops.INTERSECTION)
COST: tl.constexpr = tl.constexpr(ops.COST)
LABEL: tl.constexpr = tl.constexpr(ops.LABEL)
TOUCHED: tl.constexpr = tl.constexpr(ops.TOUCHED)
OVERLAP: tl.constexpr = tl.constexpr(ops.OVERLAP)

OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
PIXEL: tl.constexpr = tl.constexpr(ops.PIXEL)
INSTANCE_LABEL: tl.constexpr = tl.constexpr(ops.INSTANCE_LABEL)
INSTANCE_OUTPUT: tl.constexpr = tl.constexpr(ops.INSTANCE_OUTPUT)
CENTER: tl.constexpr = tl.constexpr(ops.CENTER)
FALSE_INSTANCES: tl.constexpr = tl.constexpr(ops.FALSE_INSTANCES)
MISSED_INSTANCES: tl.constexpr = tl.constexpr(ops.MISSED_INSTANCES)
PROXIMITY: tl.constexpr = tl.constexpr(ops.PROXIMITY)
TERMS: tl.constexpr = tl.constexpr(ops.PROXIMITY + 1)

PIXEL_RATIO: tl.constexpr = tl.constexpr(ops.PIXEL_RATIO)
INSTANCE_RATIO: tl.constexpr = tl.constexpr(ops.INSTANCE_RATIO)
MISSING: tl.constexpr = tl.constexpr(ops.MISSING)

BY_CENTER: tl.constexpr = tl.constexpr(ops.BY_CENTER)
BY_FALSE: tl.constexpr = tl.constexpr(ops.BY_FALSE)
BY_INTERSECTION: tl.constexpr = tl.constexpr(ops.BY_INTERSECTION)
BY_PREDICTION: tl.constexpr = tl.constexpr(ops.BY_PREDICTION)
DISTANCE: tl.constexpr = tl.constexpr(ops.DISTANCE)
SLOPES_COLUMNS: tl.constexpr = tl.constexpr(ops.SLOPES_COLUMNS)
PIXEL_BY_INTERSECTION: tl.constexpr = tl.constexpr(ops.PIXEL_BY_INTERSECTION)
PIXEL_BY_PREDICTION: tl.constexpr = tl.constexpr(ops.PIXEL_BY_PREDICTION)
BY_LABEL: tl.constexpr = tl.constexpr(ops.BY_LABEL)
BY_OUTPUT: tl.constexpr = tl.constexpr(ops.BY_OUTPUT)
BY_DISTANCE: tl.constexpr = tl.constexpr(ops.BY_DISTANCE)
BY_MISTAKE: tl.constexpr = tl.constexpr(ops.BY_MISTAKE)
WHOLE_BY_INTERSECTION: tl.constexpr = tl.constexpr(ops.WHOLE_BY_INTERSECTION)
WHOLE_BY_PREDICTION: tl.constexpr = tl.constexpr(ops.WHOLE_BY_PREDICTION)
SAMPLE_SLOPES_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_SLOPES_COLUMNS)

# Weights come by value, so that they may change from step to step: as bits, since Triton takes no float64 by value.
WEIGHTS = [f"weight_{term}" for term in range(ops.PROXIMITY + 1)]
NO_WEIGHTS = (0.0,) * len(WEIGHTS)
# Samples of which the parts are added at once.
SAMPLES_BLOCK = 16
# One lane a thread: samples rarely have more instances, and the float64 arithmetic wants the registers.
ROWS_BLOCK = 128


@triton.jit
def _add_rows(
    sums_ptr,
    geometry_ptr,
    owned_ptr,
    distances_ptr,
    values_ptr,
    numbers_ptr,
    slopes_ptr,
    start,
    count,
    used_count,
    whole,
    mistake,
    by_inside,
    by_outside,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Go over the rows of one side of a sample, from row `start` of the tables, and write their slopes.

    Returns the sum of the criterion, of the criterion times the distance, and how many rows are correct or detected.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    met = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, tl.maximum(count, 1), BLOCK):
        row = first + tl.arange(0, BLOCK)
        here, used = row < count, row < used_count
        valued, at = row < tl.maximum(used_count, 1), start + row
        size = tl.load(geometry_ptr + at * GEOMETRY_COLUMNS + SIZE, mask=here, other=1).to(tl.float64)
        row_ptr = sums_ptr + at * SUMS_COLUMNS
        overlap = tl.load(row_ptr + OVERLAP, mask=here, other=0.0)
        if OUTPUTS:
            label, untouched = tl.load(row_ptr + LABEL, mask=used, other=0.0), overlap == 0
        else:
            label, untouched = size, tl.load(row_ptr + TOUCHED, mask=here, other=0.0) == 0
        met += (used & (overlap > 0)).to(tl.int32)

        value = tl.zeros((BLOCK,), tl.float64)
        by_intersection = tl.zeros((BLOCK,), tl.float64)
        by_prediction = tl.zeros((BLOCK,), tl.float64)
        if values_ptr is not None:
            value = tl.load(values_ptr + at, mask=valued, other=0.0)
        else:
            intersection = tl.load(row_ptr + INTERSECTION, mask=used, other=0.0)
            prediction = tl.load(row_ptr + COST, mask=used, other=0.0)
            prediction += tl.load(numbers_ptr + MISSING) * (label - overlap)
            value, by_intersection, by_prediction = criterion(
                numbers_ptr + INSTANCE_RATIO, intersection, prediction, label, used
            )
            value = tl.where(valued & ~used, whole, value)
        distance = tl.zeros((BLOCK,), tl.float64)
        if distances_ptr is not None:
            distance = tl.load(distances_ptr + at, mask=valued, other=0.0)
        by_center = tl.zeros((BLOCK,), tl.float64)
        if owned_ptr is not None:
            by_center = by_outside * tl.load(owned_ptr + 2 * at, mask=used, other=0).to(tl.float64)
            by_center += by_inside * tl.load(owned_ptr + 2 * at + 1, mask=used, other=0).to(tl.float64)
            by_center = tl.where(used, by_center / size, 0.0)
        total += value
        weighted += distance * value

        row_ptr = slopes_ptr + at * SLOPES_COLUMNS
        written = row < tl.maximum(count, 1)
        tl.store(row_ptr + BY_CENTER, by_center, mask=written)
        tl.store(row_ptr + BY_FALSE, tl.where(here & untouched, mistake / size, 0.0), mask=written)
        tl.store(row_ptr + BY_INTERSECTION, by_intersection, mask=written)
        tl.store(row_ptr + BY_PREDICTION, by_prediction, mask=written)
        tl.store(row_ptr + DISTANCE, distance, mask=written)
    return tl.sum(total, axis=0), tl.sum(weighted, axis=0), tl.sum(met, axis=0)


@triton.jit
def _health_of_all(health_ptr, B, BLOCK: tl.constexpr):
    """1, or NaN if a sample is broken: then all are."""
    broken = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, B, BLOCK):
        sample = first + tl.arange(0, BLOCK)
        broken += 0.0 * tl.load(health_ptr + sample, mask=sample < B, other=1.0)
    return 1.0 + tl.sum(broken, axis=0)


@triton.jit
def _weighted(terms, weight, TERM: tl.constexpr):
    """One of eight terms times its weight, 0 in the place of all others."""
    return tl.where(tl.arange(0, 8) == TERM, terms * of_bits(weight), 0.0)


@triton.jit
def _add_samples(
    weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, parts_ptr, terms_ptr, total_ptr, B,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the terms, and their sum with weights."""
    term, sample = tl.arange(0, 8), tl.arange(0, BLOCK)
    terms = tl.zeros((8,), tl.float64)
    for first in range(0, B, BLOCK):
        part_ptr = parts_ptr + (first + sample)[:, None] * TERMS + term[None, :]
        here = (first + sample < B)[:, None] & (term < TERMS)[None, :]
        terms += tl.sum(tl.load(part_ptr, mask=here, other=0.0), axis=0)
    total = _weighted(terms, weight_0, 0) + _weighted(terms, weight_1, 1) + _weighted(terms, weight_2, 2)
    total += _weighted(terms, weight_3, 3) + _weighted(terms, weight_4, 4) + _weighted(terms, weight_5, 5)
    total += _weighted(terms, weight_6, 6)
    tl.store(terms_ptr + term, terms, mask=term < TERMS)
    tl.store(total_ptr, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=WEIGHTS)
def _terms_kernel(
    weight_0: tl.int64,  # of each term in the total, a float64 in its bits
    weight_1: tl.int64,
    weight_2: tl.int64,
    weight_3: tl.int64,
    weight_4: tl.int64,
    weight_5: tl.int64,
    weight_6: tl.int64,
    sums_ptr,  # (2 B, capacity, 5) float64
    sample_sums_ptr,  # (B, 3) float64
    pixel_sums_ptr,  # (B, 3) float64
    health_ptr,  # (B,) float64
    counts_ptr,  # (3, B) int32
    geometry_ptr,  # (2 B, capacity, 10) int64
    owned_ptr,  # (2 B, capacity, 2) int64, or None: no center
    distances_ptr,  # (2 B, capacity) float64, or None: no proximity
    values_ptr,  # (2 B, capacity) float64, or None: the criterion follows from the sums
    totals_ptr,  # (2, classes) float64, or None: instances are averaged over the batch
    numbers_ptr,  # (30,) float64
    parts_ptr,  # (B, 7) float64: what each sample adds to the terms
    finished_ptr,  # () int32, 0: programs that are done
    terms_ptr,  # (7,) of any float dtype
    total_ptr,  # () of that dtype
    slopes_ptr,  # (2 B, capacity, 5) float64
    sample_slopes_ptr,  # (B, 8) float64
    capacity,
    classes,
    REDUCTION: tl.constexpr,
    RATES: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0)
    num_outputs = tl.load(counts_ptr + OUTPUTS * B + sample)
    kept = tl.load(counts_ptr + KEPT * B + sample)
    num_labels = tl.load(counts_ptr + LABELS * B + sample)
    health = _health_of_all(health_ptr, B, SAMPLES)
    out, lab = sample * capacity, (B + sample) * capacity  # first rows
    part_ptr = parts_ptr + sample * TERMS
    sample_slopes_ptr += sample * SAMPLE_SLOPES_COLUMNS

    row_ptr = pixel_sums_ptr + sample * SAMPLE_COLUMNS
    pixel, by_intersection, by_prediction = criterion(
        numbers_ptr + PIXEL_RATIO, tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), sample >= 0
    )
    tl.store(part_ptr + PIXEL, health * pixel)
    tl.store(sample_slopes_ptr + PIXEL_BY_INTERSECTION, health * by_intersection)
    tl.store(sample_slopes_ptr + PIXEL_BY_PREDICTION, health * by_prediction)

    row_ptr = sample_sums_ptr + sample * SAMPLE_COLUMNS
    alone = (num_labels == 0) | (kept == 0)
    whole, by_intersection, by_prediction = criterion(
        numbers_ptr + INSTANCE_RATIO, tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), alone
    )
    tl.store(sample_slopes_ptr + WHOLE_BY_INTERSECTION, by_intersection)
    tl.store(sample_slopes_ptr + WHOLE_BY_PREDICTION, by_prediction)

    center, by_inside, by_outside = whole * 0.0, whole * 0.0, whole * 0.0
    if owned_ptr is not None:
        center, by_inside, by_outside = center_criterion(
            owned_ptr + 2 * out, owned_ptr + 2 * lab, kept, num_labels, numbers_ptr, BLOCK
        )
    tl.store(part_ptr + CENTER, health * center / B)

    out_share, lab_share = share(numbers_ptr, num_outputs, B, RATES), share(numbers_ptr, num_labels, B, RATES)
    rows = tl.minimum(num_outputs, capacity)
    out_total, out_weighted, correct = _add_rows(
        sums_ptr, geometry_ptr, owned_ptr, distances_ptr, values_ptr, numbers_ptr, slopes_ptr, out, rows, kept,
        whole, health * out_share, health * by_inside / B, health * by_outside / B, True, BLOCK,
    )  # fmt: skip
    lab_total, lab_weighted, detected = _add_rows(
        sums_ptr, geometry_ptr, None, distances_ptr, values_ptr, numbers_ptr, slopes_ptr, lab, num_labels, num_labels,
        whole, -health * lab_share, whole, whole, False, BLOCK,
    )  # fmt: skip
    tl.store(part_ptr + FALSE_INSTANCES, health * out_share * (num_outputs - correct))
    tl.store(sample_slopes_ptr + BY_MISTAKE, health * out_share)
    tl.store(part_ptr + MISSED_INSTANCES, health * lab_share * (num_labels - detected))
    by_output = health * weight(counts_ptr + KEPT * B, totals_ptr, sample, kept, B, classes, REDUCTION)
    label_totals_ptr = None if totals_ptr is None else totals_ptr + classes
    by_label = health * weight(counts_ptr + LABELS * B, label_totals_ptr, sample, num_labels, B, classes, REDUCTION)
    tl.store(sample_slopes_ptr + BY_OUTPUT, by_output)
    tl.store(sample_slopes_ptr + BY_LABEL, by_label)
    tl.store(part_ptr + INSTANCE_OUTPUT, by_output * out_total)
    tl.store(part_ptr + INSTANCE_LABEL, by_label * lab_total)

    difference = lab_weighted - out_weighted
    proximity = difference * difference
    if distances_ptr is not None:
        proximity += tl.where(kept == 0, num_outputs, 0).to(tl.float64)  # too many
    tl.store(part_ptr + PROXIMITY, health * proximity / B)
    tl.store(sample_slopes_ptr + BY_DISTANCE, health * 2.0 * difference / B)

    tl.debug_barrier()  # what all threads have written comes before one of them says so
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == B - 1:
        _add_samples(
            weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, parts_ptr, terms_ptr, total_ptr, B,
            SAMPLES,
        )  # fmt: skip


@functools.cache
def _table_of(numbers: tuple[float, ...], pinned: bool) -> Tensor:
    """The numbers in memory of the host; pinned, where a device can read it, too.

    Kept for good, as what a CUDA graph reads in each replay. So there is nothing to copy in a step.
    """
    with aside():
        table = torch.tensor(numbers, dtype=torch.float64)
        return table.pin_memory() if pinned else table


def launch_terms(
    sums: Tensor,
    sample_sums: Tensor,
    pixel_sums: Tensor,
    health: Tensor,
    counts: Tensor,
    geometry: Tensor,
    owned: Tensor | None,
    distances: Tensor | None,
    values: Tensor | None,
    totals: Tensor | None,
    numbers: Sequence[float],
    classes: int,
    reduction: int,
    rates: bool,
    weights: tuple[float, ...],
    dtype: torch.dtype,
    finished: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms and their sum with `weights`, of that dtype, and the slopes of instances and of samples.

    `finished`, 0-d int32, is 0 and belongs to this call.
    """
    (_, capacity, _), batch, device = sums.shape, len(sample_sums), sums.device
    terms, total = torch.empty(len(WEIGHTS), dtype=dtype, device=device), torch.empty((), dtype=dtype, device=device)
    sizes = (batch, len(WEIGHTS)), (2 * batch, capacity, ops.SLOPES_COLUMNS), (batch, ops.SAMPLE_SLOPES_COLUMNS)
    parts, slopes, sample_slopes = (torch.empty(size, dtype=torch.float64, device=device) for size in sizes)
    if batch == 0:
        return terms.zero_(), total.zero_(), slopes, sample_slopes
    launch(_terms_kernel, (batch,),
        sums, sample_sums, pixel_sums, health, counts, geometry, owned, distances, values, totals,
        _table_of(tuple(numbers), device.type == "cuda"), parts, finished, terms, total, slopes, sample_slopes,
        capacity, classes, reduction, rates, block_size(capacity, ROWS_BLOCK), SAMPLES_BLOCK,
        values=bits_of(weights or NO_WEIGHTS),
    )  # fmt: skip
    return terms, total, slopes, sample_slopes
