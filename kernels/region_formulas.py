"""What losses on regions make of the sums over the regions of one sample: its own value, and the slopes of it.

S, T, I, Q, E and n are the sums of p, y, p y, p^2 and cross entropy over a region, and its voxels; s is `smooth`, K the
count. Region 0, B, is what is in no instance. With the numbers of a kind (../ops.py):

    BLOB       mean over G of dice (1 - (2 S_G + s) / b) + ce (E_G + E_B + o log 2) / (n_G + n_B + o), where
               b = S_G + S_B + n_G + o / 2 + s, and o the voxels of other instances, or 0
    CELLS      mean over cells of dice d + ce E / n; d = 1 - (2 I + s) / max(S + T + s, 1e-8) where T > 0 and, without
               instances, in region 0; else Q / max(S, 1e-8), S held constant
    TVERSKY    1 - (h + s) / (h + alpha f + beta m + s), h the sum of w S_G, m that of w (n_G - S_G),
               f = background S_B, w = (n_G + epsilon)^-gamma
    FALSE      the sum of S / n over the regions that are chosen

Rows are added in a fixed order, in float64. Row 0 of the slopes holds zeros before.
"""

import math

import triton
import triton.language as tl

from .. import ops

# Columns of the table of sums.
MASS: tl.constexpr = tl.constexpr(0)
TRUTH: tl.constexpr = tl.constexpr(1)
TRUE_MASS: tl.constexpr = tl.constexpr(2)
SQUARES: tl.constexpr = tl.constexpr(3)
CROSS_ENTROPY: tl.constexpr = tl.constexpr(4)
SIZE: tl.constexpr = tl.constexpr(5)
COLUMNS: tl.constexpr = tl.constexpr(6)
BY_MASS: tl.constexpr = tl.constexpr(ops.BY_MASS)
BY_TRUE_MASS: tl.constexpr = tl.constexpr(ops.BY_TRUE_MASS)
BY_SQUARES: tl.constexpr = tl.constexpr(ops.BY_SQUARES)
BY_CROSS_ENTROPY: tl.constexpr = tl.constexpr(ops.BY_CROSS_ENTROPY)
SLOPES: tl.constexpr = tl.constexpr(ops.REGION_SLOPES)
LOG_2: tl.constexpr = tl.constexpr(math.log(2))
# The least denominator of the Dice of a cell, as published.
LEAST: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def _number(value: tl.constexpr):
    """A constant as a float64; a bare one would be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def _at_least(sums):
    """A denominator that is not too small; NaN stays NaN."""
    return tl.where(sums < _number(LEAST), _number(LEAST), sums)


@triton.jit
def _store(slopes_ptr, row, here, mass, true_mass, squares, cost):
    """The slopes of some rows."""
    row_ptr = slopes_ptr + row * SLOPES
    tl.store(row_ptr + BY_MASS, mass, mask=here)
    tl.store(row_ptr + BY_TRUE_MASS, true_mass, mask=here)
    tl.store(row_ptr + BY_SQUARES, squares, mask=here)
    tl.store(row_ptr + BY_CROSS_ENTROPY, cost, mask=here)


@triton.jit
def _sum(values, here):
    """Sum over the rows `here`."""
    return tl.sum(tl.where(here, values, 0.0), axis=0)


@triton.jit
def nothing(sums_ptr, count, BLOCK: tl.constexpr):
    """0, or NaN where any region, used or not, has a sum that is not finite."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += 0.0 * tl.load(sums_ptr + row * COLUMNS + MASS, mask=row <= count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def blob(sums_ptr, slopes_ptr, count, dice, ce, smooth, by_logits, BLOCK: tl.constexpr):
    """Each instance against all that is background."""
    rest_mass, rest_size = tl.load(sums_ptr + MASS), tl.load(sums_ptr + SIZE)
    rest_cost = tl.load(sums_ptr + CROSS_ENTROPY)
    total = tl.zeros([], tl.float64)  # voxels of all instances
    for first in range(1, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(sums_ptr + row * COLUMNS + SIZE, mask=row <= count, other=0.0), axis=0)
    number = tl.maximum(count, 1).to(tl.float64)
    value = tl.zeros([], tl.float64)
    by_rest_mass = tl.zeros([], tl.float64)
    by_rest_cost = tl.zeros([], tl.float64)
    for first in range(1, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here, row_ptr = row <= count, sums_ptr + row * COLUMNS
        mass = tl.load(row_ptr + MASS, mask=here, other=0.0)
        cost = tl.load(row_ptr + CROSS_ENTROPY, mask=here, other=0.0)
        size = tl.load(row_ptr + SIZE, mask=here, other=1.0)
        # As published, logits of other instances are 0: they count as p = 1/2.
        others = by_logits * (total - size)
        below = mass + rest_mass + size + others / 2 + smooth
        ratio = (2 * mass + smooth) / below
        voxels = size + rest_size + others
        cost = (cost + rest_cost + others * _number(LOG_2)) / voxels
        value += _sum(dice * (1 - ratio) + ce * cost, here)
        by_rest_mass += _sum(dice * ratio / below, here)
        by_rest_cost += _sum(ce / voxels, here)
        none = tl.zeros_like(mass)
        _store(slopes_ptr, row, here, dice * (ratio - 2) / below / number, none, none, ce / voxels / number)
    tl.store(slopes_ptr + BY_MASS, by_rest_mass / number)
    tl.store(slopes_ptr + BY_CROSS_ENTROPY, by_rest_cost / number)
    return value / number


@triton.jit
def cells(sums_ptr, slopes_ptr, count, dice, ce, smooth, BLOCK: tl.constexpr):
    """Each cell by itself; a sample without instances is one."""
    begin = tl.minimum(count, 1)
    end = begin + tl.maximum(count, 1)
    number = tl.maximum(count, 1).to(tl.float64)
    value = tl.zeros([], tl.float64)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here, row_ptr = row < end, sums_ptr + row * COLUMNS
        mass = tl.load(row_ptr + MASS, mask=here, other=0.0)
        truth = tl.load(row_ptr + TRUTH, mask=here, other=0.0)
        true_mass = tl.load(row_ptr + TRUE_MASS, mask=here, other=0.0)
        squares = tl.load(row_ptr + SQUARES, mask=here, other=0.0)
        cost = tl.load(row_ptr + CROSS_ENTROPY, mask=here, other=0.0)
        size = tl.maximum(tl.load(row_ptr + SIZE, mask=here, other=1.0), 1.0)
        true = (truth > 0) | (count == 0)
        whole = mass + truth + smooth
        below, least = _at_least(whole), _at_least(mass)
        ratio = (2 * true_mass + smooth) / below
        of_dice = tl.where(true, 1 - ratio, squares / least)
        value += _sum(dice * of_dice + ce * cost / size, here)
        none = tl.zeros_like(mass)
        by_mass = tl.where(true & ~(whole < _number(LEAST)), dice * ratio / below / number, none)
        by_true_mass = tl.where(true, -2 * dice / below / number, none)
        by_squares = tl.where(true, none, dice / least / number)
        _store(slopes_ptr, row, here, by_mass, by_true_mass, by_squares, ce / size / number)
    return value / number


@triton.jit
def tversky(
    sums_ptr, slopes_ptr, count, alpha, beta, gamma, epsilon, background_weight, smooth, BLOCK: tl.constexpr
):  # fmt: skip
    """Instances weighted by their size, and the background."""
    hit = tl.zeros([], tl.float64)
    missed = tl.zeros([], tl.float64)
    for first in range(1, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here = row <= count
        mass = tl.load(sums_ptr + row * COLUMNS + MASS, mask=here, other=0.0)
        size = tl.load(sums_ptr + row * COLUMNS + SIZE, mask=here, other=1.0)
        weight = tl.exp(-gamma * tl.log(size + epsilon))
        hit += _sum(weight * mass, here)
        missed += _sum(weight * (size - mass), here)
    false = background_weight * tl.load(sums_ptr + MASS)
    below = hit + alpha * false + beta * missed + smooth
    # Without anything to hit or to miss, nothing is wrong.
    ratio = tl.where(below != 0, (hit + smooth) / tl.where(below != 0, below, 1.0), 1.0)
    below = tl.where(below != 0, below, 1.0)
    for first in range(1, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here = row <= count
        size = tl.load(sums_ptr + row * COLUMNS + SIZE, mask=here, other=1.0)
        weight = tl.exp(-gamma * tl.log(size + epsilon))
        none = tl.zeros_like(size)
        _store(slopes_ptr, row, here, weight * (ratio * (1 - beta) - 1) / below, none, none, none)
    tl.store(slopes_ptr + BY_MASS, ratio * alpha * background_weight / below)
    return 1 - ratio


@triton.jit
def false(sums_ptr, slopes_ptr, chosen_ptr, count, BLOCK: tl.constexpr):
    """The means of p over regions that should not be there, added up, and how many there are."""
    value = tl.zeros([], tl.float64)
    number = tl.zeros([], tl.float64)
    for first in range(1, count + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        here = row <= count
        meant = here & (tl.load(chosen_ptr + row - 1, mask=here, other=0) != 0)
        mass = tl.load(sums_ptr + row * COLUMNS + MASS, mask=meant, other=0.0)
        size = tl.maximum(tl.load(sums_ptr + row * COLUMNS + SIZE, mask=meant, other=1.0), 1.0)
        value += _sum(mass / size, meant)
        number += tl.sum(meant.to(tl.float64), axis=0)
        none = tl.zeros_like(mass)
        _store(slopes_ptr, row, here, tl.where(meant, 1 / size, none), none, none, none)
    return value, number
