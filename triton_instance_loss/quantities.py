"""The per-voxel quantities phi(u, w) that criteria sum over voxels: u is predicted, w is true, phi(0, 0) = 0.

The number of a quantity is its code in the operators; the kernels hold the same five formulas (kernels/quantities.py).
"""

import torch
from torch import Tensor

MASS, SQUARE, ABSOLUTE_ERROR, SQUARED_ERROR, CROSS_ENTROPY = range(5)

CODES = {
    "mass": MASS,
    "square": SQUARE,
    "absolute_error": ABSOLUTE_ERROR,
    "squared_error": SQUARED_ERROR,
    "cross_entropy": CROSS_ENTROPY,
}

# phi(0, 1): what a true voxel costs where nothing is predicted. Logarithms end at -100, as in torch.nn.BCELoss.
UNPREDICTED = {MASS: 0.0, SQUARE: 0.0, ABSOLUTE_ERROR: 1.0, SQUARED_ERROR: 1.0, CROSS_ENTROPY: 100.0}


def phi(code: int, u: Tensor, w: Tensor | float) -> Tensor:
    """The quantity `code` of predictions `u` and truth `w`, elementwise."""
    if code == MASS:
        return u
    if code == SQUARE:
        return u * u
    if code == ABSOLUTE_ERROR:
        return (u - w).abs()
    if code == SQUARED_ERROR:
        return (u - w) ** 2
    return -(w * torch.log(u).clamp(min=-100.0) + (1.0 - w) * torch.log1p(-u).clamp(min=-100.0))


def phi_derivative(code: int, u: Tensor, w: Tensor | float) -> Tensor:
    """Derivative of `phi` in `u`; of the cross entropy as torch.nn.BCELoss has it (denominator >= 1e-12).

    A 0-d tensor where it is the same everywhere.
    """
    if code == MASS:
        return u.new_ones(())
    if code == SQUARE:
        return 2.0 * u
    if code == ABSOLUTE_ERROR:
        return torch.sign(u - w)
    if code == SQUARED_ERROR:
        return 2.0 * (u - w)
    return (u - w) / (u * (1.0 - u)).clamp(min=1e-12)


def of_numbers(code: int, u: float, w: float) -> tuple[float, float]:
    """`phi` and its derivative of two numbers; not the cross entropy, which knows no predictions above 1."""
    if code == MASS:
        return u, 1.0
    if code == SQUARE:
        return u * u, 2.0 * u
    if code == ABSOLUTE_ERROR:
        return abs(u - w), float(u > w) - float(u < w)
    return (u - w) ** 2, 2.0 * (u - w)


def truth(code: int, w: float) -> float:
    """What a true voxel of height `w` adds to the label sum of a criterion: its square if predictions are squared."""
    return w * w if code == SQUARE else w
