"""Activation on the CPU: `activate` of ops.py, and its derivative.

Comparisons are NumPy's, one vector pass each; the sigmoid is taken only where it can decide or matters.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..activation import HARD, NONE, NOT_FUSED, PROBABILITY, SIGMOID
from ..ops import SAMPLE_COLUMNS
from ..quantities import MASS, SQUARE, phi, phi_derivative

# Relative error that a computed sigmoid surely does not have: what is farther below the threshold need not be computed.
SIGMOID_ERROR = 1e-5


def activate(
    x: Tensor, labels: Tensor, activation: int, threshold: float, pixel: int, quantity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `activate` (ops.py)."""
    foreground = torch.from_numpy(_foreground(x, activation, threshold))
    y = torch.from_numpy(labels.numpy() == 1)
    rows = x.sum(-1)  # not finite if anything in it is not; or, rarely, too large
    healthy = bool(rows.isfinite().all()) or bool(x.isfinite().all())
    health = torch.tensor(1.0 if healthy else math.nan, dtype=torch.float64)
    if pixel == NOT_FUSED:
        return foreground, y, torch.zeros((x.shape[0], SAMPLE_COLUMNS), dtype=torch.float64), health

    if pixel == HARD:
        u: Tensor = foreground.to(x.dtype)
    elif pixel == PROBABILITY and activation == SIGMOID:
        u = torch.sigmoid(x)
    else:
        u = x
    if quantity != MASS:
        rows = phi(quantity, u, 0.0).sum(-1)
    elif u is not x:
        rows = u.sum(-1)
    cost = rows.double().sum((1, 2))
    w = y if pixel == PROBABILITY else labels
    sums = torch.zeros((x.shape[0], SAMPLE_COLUMNS), dtype=torch.float64)
    for sample, (predicted, true) in enumerate(zip(u.flatten(1), w.flatten(1), strict=True)):
        labelled, truth = _where(true)
        at = torch.from_numpy(predicted.numpy()[labelled]).double()
        sums[sample, 0] = (at * truth).sum()
        sums[sample, 1] = cost[sample]
        if quantity not in (MASS, SQUARE):
            sums[sample, 1] += (phi(quantity, at, truth) - phi(quantity, at, 0.0)).sum()
        sums[sample, 2] = (truth * truth if quantity == SQUARE else truth).sum()
    return foreground, y, sums, health


def _foreground(x: Tensor, activation: int, threshold: float) -> NDArray[np.bool_]:
    """Where instances of the outputs are looked for."""
    values = x.numpy()
    threshold = float(values.dtype.type(threshold))
    if activation != SIGMOID:
        only_ones = activation == NONE and threshold <= 0
        found: NDArray[np.bool_] = values == 1 if only_ones else values >= threshold
        return found
    if threshold <= 0:
        return ~np.isnan(values)
    low = threshold * (1.0 - SIGMOID_ERROR)
    found = values >= values.dtype.type(math.log(low / (1.0 - low)))
    perhaps = np.flatnonzero(found)
    sure = torch.sigmoid(torch.from_numpy(values.reshape(-1)[perhaps])).numpy() >= threshold
    found.reshape(-1)[perhaps] = sure
    return found


def _where(labels: Tensor) -> tuple[NDArray[np.intp], Tensor]:
    """The voxels of a sample where labels are not 0, and what they are there, float64."""
    values = labels.numpy().reshape(-1)
    labelled = np.flatnonzero(values if values.dtype == np.bool_ else values != 0)
    return labelled, torch.from_numpy(values[labelled]).double()


def slope(x: Tensor, activation: int) -> Tensor:
    """Derivative of what gradients flow into by `x`, elementwise."""
    if activation != SIGMOID:
        return torch.ones_like(x)
    probability = torch.sigmoid(x)
    return probability - probability * probability


def pixel_gradient(
    grads: Tensor, x: Tensor, labels: Tensor, foreground: Tensor, y: Tensor, activation: int, pixel: int, quantity: int
) -> Tensor:
    """Gradient of `x` from those of the sums of the pixel term, (B, 3)."""
    grad = torch.empty_like(x)
    for sample, (by_intersection, by_cost, _) in enumerate(grads.tolist()):
        if by_intersection == 0.0 and by_cost == 0.0:
            grad[sample] = 0.0
            continue
        u = x[sample]
        if pixel == HARD:
            u = foreground[sample].to(x.dtype)
        elif pixel == PROBABILITY and activation == SIGMOID:
            u = torch.sigmoid(u)
        by_u = grad[sample]
        if quantity == MASS:
            by_u.fill_(by_cost)
        else:
            torch.mul(phi_derivative(quantity, u, 0.0), by_cost, out=by_u)
        labelled, truth = _where((y if pixel == PROBABILITY else labels)[sample])
        more = by_intersection * truth
        if quantity not in (MASS, SQUARE):
            at = torch.from_numpy(u.numpy().reshape(-1)[labelled]).double()
            more += by_cost * (phi_derivative(quantity, at, truth) - phi_derivative(quantity, at, 0.0))
        by_u.numpy().reshape(-1)[labelled] += more.numpy()
        if pixel == PROBABILITY and activation == SIGMOID:
            by_u *= u.sub_(u * u)
        elif pixel == HARD:
            by_u *= slope(x[sample], activation)
    return grad
