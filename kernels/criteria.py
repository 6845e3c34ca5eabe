"""Criteria as functions of sums, and what one instance or mistake adds to an average, as parts of a program.

With I, P and L the intersection, prediction and label of a criterion, n its four numbers above and m below the line,

    v = (n0 I + n1 P + n2 L + n3) / (m0 I + m1 P + m2 L + m3),   dv / dI = (n0 - v m0) / below,   dv / dP likewise.
"""

import triton
import triton.language as tl

from .. import ops

CENTER_RATIO: tl.constexpr = tl.constexpr(ops.CENTER_RATIO)
CENTER_SLOPES: tl.constexpr = tl.constexpr(ops.CENTER_SLOPES)
SMOOTHER: tl.constexpr = tl.constexpr(ops.SMOOTHER)
BY_INSTANCE: tl.constexpr = tl.constexpr(ops.BY_INSTANCE)
BY_MEAN: tl.constexpr = tl.constexpr(ops.BY_MEAN)
# Samples whose counts are added at once.
SAMPLES_BLOCK: tl.constexpr = tl.constexpr(32)


@triton.jit
def _linear(numbers_ptr, first, second, third):
    """A linear function of three sums: what each is multiplied by, and a constant."""
    sums = tl.load(numbers_ptr) * first + tl.load(numbers_ptr + 1) * second
    return sums + tl.load(numbers_ptr + 2) * third + tl.load(numbers_ptr + 3)


@triton.jit
def criterion(numbers_ptr, intersection, prediction, label, used):
    """A ratio of two linear functions, and its derivatives by intersection and prediction; 0 where it is not used."""
    # No division by the zeros of unused rows.
    above = tl.where(used, _linear(numbers_ptr, intersection, prediction, label), 0.0)
    below = tl.where(used, _linear(numbers_ptr + 4, intersection, prediction, label), 1.0)
    value = above / below
    by_intersection = (tl.load(numbers_ptr) - value * tl.load(numbers_ptr + 4)) / below
    by_prediction = (tl.load(numbers_ptr + 1) - value * tl.load(numbers_ptr + 5)) / below
    return value, tl.where(used, by_intersection, 0.0), tl.where(used, by_prediction, 0.0)


@triton.jit
def weight(counts_ptr, totals_ptr, sample, count, B, classes, REDUCTION: tl.constexpr):
    """What each of the `count` rows of a sample adds to the average over the instances of B samples, class by class."""
    weight = 1.0 / B.to(tl.float64)
    if REDUCTION == BY_INSTANCE:
        if totals_ptr is not None:
            total = tl.load(totals_ptr + sample % classes)
        else:
            rows = tl.zeros((SAMPLES_BLOCK,), tl.int64)
            for first in range(0, B, SAMPLES_BLOCK):
                other = first + tl.arange(0, SAMPLES_BLOCK)
                alike = (other < B) & (other % classes == sample % classes)
                rows += tl.where(alike, tl.maximum(tl.load(counts_ptr + other, mask=alike, other=0), 1), 0)
            total = tl.sum(rows, axis=0).to(tl.float64)
        weight = 1.0 / (classes * total)
    elif REDUCTION == BY_MEAN:
        weight = weight / tl.maximum(count, 1).to(tl.float64)
    return weight


@triton.jit
def share(numbers_ptr, count, B, RATES: tl.constexpr):
    """What one mistake in a sample adds to the mean, over B samples, of their number or rate."""
    total = tl.zeros_like(count).to(tl.float64) + 1.0
    if RATES:
        total = count.to(tl.float64) + tl.load(numbers_ptr + SMOOTHER)
    return 1.0 / (total * B)


@triton.jit
def _count_owned(owned_ptr, count, BLOCK: tl.constexpr):
    """Voxels of the boxes of one side that lie outside and inside those of the other side."""
    outside = tl.zeros((BLOCK,), tl.int64)
    inside = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, count, BLOCK):
        row = first + tl.arange(0, BLOCK)
        outside += tl.load(owned_ptr + 2 * row, mask=row < count, other=0)
        inside += tl.load(owned_ptr + 2 * row + 1, mask=row < count, other=0)
    return tl.sum(outside, axis=0).to(tl.float64), tl.sum(inside, axis=0).to(tl.float64)


@triton.jit
def center_criterion(out_owned_ptr, lab_owned_ptr, kept, num_labels, numbers_ptr, BLOCK: tl.constexpr):
    """The criterion on centre boxes, and how it grows with an output's box for each voxel inside and outside others."""
    output, both = _count_owned(out_owned_ptr, kept, BLOCK)
    label, _ = _count_owned(lab_owned_ptr, num_labels, BLOCK)
    above = _linear(numbers_ptr + CENTER_RATIO, both, output, label)
    below = _linear(numbers_ptr + CENTER_RATIO + 4, both, output, label)
    value = above / below
    slopes_ptr = numbers_ptr + CENTER_SLOPES
    by_inside = (tl.load(slopes_ptr) - value * tl.load(slopes_ptr + 2)) / below
    by_outside = (tl.load(slopes_ptr + 1) - value * tl.load(slopes_ptr + 3)) / below
    return value, by_inside, by_outside
