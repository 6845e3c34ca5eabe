"""The quantities phi(u, w) of criteria and their derivatives in u, of one voxel, as in ../quantities.py."""

import numpy as np

from ..quantities import ABSOLUTE_ERROR, MASS, SQUARE, SQUARED_ERROR
from . import compiled


@compiled
def phi(code: int, u: float, w: float) -> float:
    """What criteria measure at a voxel."""
    if code == MASS:
        return u
    if code == SQUARE:
        return u * u
    if code == ABSOLUTE_ERROR:
        return abs(u - w)
    if code == SQUARED_ERROR:
        return (u - w) * (u - w)
    cost = 0.0  # logarithms end at -100, as in torch.nn.BCELoss
    if w != 0:
        cost -= w * np.maximum(np.log(u), -100.0)
    if w != 1:
        cost -= (1.0 - w) * np.maximum(np.log1p(-u), -100.0)
    return cost


@compiled
def phi_derivative(code: int, u: float, w: float) -> float:
    """Derivative of `phi` in u."""
    if code == MASS:
        return 1.0
    if code == SQUARE:
        return 2.0 * u
    if code == ABSOLUTE_ERROR:
        return 1.0 if u > w else -1.0 if u < w else u - w  # which is 0 or NaN there
    if code == SQUARED_ERROR:
        return 2.0 * (u - w)
    return (u - w) / float(np.maximum(u * (1.0 - u), 1e-12))


@compiled
def truth(code: int, w: float) -> float:
    """What a true voxel adds to the label sum of a criterion: its square if predictions are squared."""
    return w * w if code == SQUARE else w
