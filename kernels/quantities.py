"""Formulas of one voxel that several kernels share, and how values of many voxels are added up.

The quantities phi(u, w) of criteria and their derivatives in u are those of ../quantities.py, under the same codes:

    code              phi                                            derivative
    MASS              u                                              1
    SQUARE            u^2                                            2 u
    ABSOLUTE_ERROR    |u - w|                                        sign(u - w)
    SQUARED_ERROR     (u - w)^2                                      2 (u - w)
    CROSS_ENTROPY     -log u where w = 1, -log (1 - u) where w = 0   (u - w) / (u (1 - u))

Formulas are computed in the precision of their arguments, and added in float64.
"""

import triton
import triton.language as tl

from .. import quantities

MASS: tl.constexpr = tl.constexpr(quantities.MASS)
SQUARE: tl.constexpr = tl.constexpr(quantities.SQUARE)
ABSOLUTE_ERROR: tl.constexpr = tl.constexpr(quantities.ABSOLUTE_ERROR)
SQUARED_ERROR: tl.constexpr = tl.constexpr(quantities.SQUARED_ERROR)
CROSS_ENTROPY: tl.constexpr = tl.constexpr(quantities.CROSS_ENTROPY)
# Four parts a thread of four warps, Triton's default.
PARTS_BLOCK = 512


@triton.jit
def _at_least(value, LOWEST: tl.constexpr):
    """`value`, or LOWEST if that is larger; NaN stays NaN, as in torch.clamp."""
    return tl.where(value < LOWEST, tl.full(value.shape, LOWEST, value.dtype), value)


@triton.jit
def phi(u, w, QUANTITY: tl.constexpr):
    """What criteria measure at a voxel, for any block w; for cross entropy it holds zeros and ones."""
    if QUANTITY == MASS:
        value = u
    elif QUANTITY == SQUARE:
        value = u * u
    elif QUANTITY == ABSOLUTE_ERROR:
        value = tl.abs(u - w)
    elif QUANTITY == SQUARED_ERROR:
        value = (u - w) * (u - w)
    else:
        value = -_at_least(tl.log(tl.where(w > 0, u, 1 - u)), -100.0)  # as torch.nn.BCELoss, which ends at -100
    return value


@triton.jit
def phi_derivative(u, w, QUANTITY: tl.constexpr):
    """Derivative of `phi` in u."""
    if QUANTITY == MASS:
        derivative = tl.zeros_like(u) + 1
    elif QUANTITY == SQUARE:
        derivative = 2 * u
    elif QUANTITY == ABSOLUTE_ERROR:
        derivative = tl.where(u > w, 1.0, tl.where(u < w, -1.0, u - w)).to(u.dtype)  # u - w is 0 or NaN there
    elif QUANTITY == SQUARED_ERROR:
        derivative = 2 * (u - w)
    else:
        derivative = (u - w) / _at_least(u * (1 - u), 1e-12)
    return derivative


@triton.jit
def log_of_sum(u):
    """log(1 + u) to all digits of a small u, by what rounding has left of it."""
    whole = 1 + u
    left = whole - 1
    return tl.where(left == 0, u, tl.log(whole) * (u / tl.where(left == 0, 1.0, left).to(u.dtype)))


@triton.jit
def truth(w, QUANTITY: tl.constexpr):
    """What a true voxel adds to the label sum of a criterion: its square if predictions are squared."""
    return w * w if QUANTITY == SQUARE else w


@triton.jit
def sum_where(value, here, WHOLE: tl.constexpr = False):
    """Sum of the lanes `here`, in float64; of WHOLE numbers in int32, for which a warp has one instruction."""
    TYPE: tl.constexpr = tl.int32 if WHOLE else tl.float64
    return tl.sum(tl.where(here, value.to(TYPE), tl.zeros(value.shape, TYPE)), axis=0).to(tl.float64)


@triton.jit
def sum_parts(parts_ptr, parts, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a column of a table (parts, COLUMNS) float64, of which each program wrote a line; in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        part = (first + tl.arange(0, BLOCK)).to(tl.int64)
        total += tl.load(parts_ptr + part * COLUMNS, mask=part < parts, other=0.0)
    return tl.sum(total, axis=0)
