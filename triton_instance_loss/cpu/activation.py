"""Activation on the CPU: the foreground of both sides, the sums of the pixel term, and their derivatives.

A pass over a volume costs as much as all that is done with the few voxels it finds, so there are few: comparisons are
NumPy's, and the sigmoid is taken only where it can decide or matters.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import HARD, NONE, NOT_FUSED, PROBABILITY, SAMPLE_COLUMNS, SIGMOID
from ..quantities import MASS, SQUARE, phi, phi_derivative

# Relative error that a computed sigmoid surely does not have: what is farther below the threshold need not be computed.
SIGMOID_ERROR = 1e-5
Indices = NDArray[np.int64]


class Foreground(NamedTuple):
    """Voxels of a batch, by their index in it, ascending."""

    out: Indices  # where instances of the outputs are looked for
    labelled: Indices  # where labels are not 0
    truth: NDArray[Any]  # the labels there
    lab: Indices  # where y is


def find_foreground(x: Tensor, labels: Tensor, activation: int, threshold: float) -> Foreground:
    """The foreground of both sides."""
    values = labels.numpy().reshape(-1)
    labelled = np.flatnonzero(values if values.dtype == np.bool_ else values != 0)
    truth = values[labelled]
    ones = truth == 1
    lab = labelled if ones.all() else labelled[ones]
    return Foreground(_find_outputs(x.numpy().reshape(-1), activation, threshold), labelled, truth, lab)


def _find_outputs(values: NDArray[Any], activation: int, threshold: float) -> Indices:
    """Where instances of the outputs are looked for."""
    threshold = float(values.dtype.type(threshold))
    if activation != SIGMOID:
        return np.flatnonzero(values == 1 if activation == NONE and threshold <= 0 else values >= threshold)
    if threshold <= 0:
        return np.flatnonzero(~np.isnan(values))
    low = threshold * (1.0 - SIGMOID_ERROR)
    perhaps = np.flatnonzero(values >= values.dtype.type(math.log(low / (1.0 - low))))
    sure: NDArray[np.bool_] = torch.sigmoid(torch.from_numpy(values[perhaps])).numpy() >= threshold
    return perhaps[sure]


def pixel_sums(x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int) -> tuple[Tensor, Tensor]:
    """Sums of the pixel term, (B, 3) float64, and the health of `x`."""
    rows = x.sum(-1)  # not finite if anything in it is not; or, rarely, too large
    healthy = bool(rows.isfinite().all()) or bool(x.isfinite().all())
    health = torch.tensor(1.0 if healthy else math.nan, dtype=torch.float64)
    sums = torch.zeros((x.shape[0], SAMPLE_COLUMNS), dtype=torch.float64)
    if pixel == NOT_FUSED:
        return sums, health
    u = _seen(x, foreground.out, activation, pixel)
    if quantity != MASS:
        rows = phi(quantity, u, 0.0).sum(-1)
    elif u is not x:
        rows = u.sum(-1)
    sums[:, 1] = rows.double().sum((1, 2))
    at, truth = _labelled(u, foreground, pixel)
    predicted = torch.from_numpy(u.numpy().reshape(-1)[at]).double()
    sample = torch.from_numpy(at // x[0].numel())
    sums[:, 0].index_add_(0, sample, predicted * truth)
    if quantity not in (MASS, SQUARE):
        sums[:, 1].index_add_(0, sample, phi(quantity, predicted, truth) - phi(quantity, predicted, 0.0))
    sums[:, 2].index_add_(0, sample, truth * truth if quantity == SQUARE else truth)
    return sums, health


def _seen(x: Tensor, out: Indices, activation: int, pixel: int) -> Tensor:
    """The prediction of the pixel term."""
    if pixel == HARD:
        u = torch.zeros_like(x)
        u.view(-1)[torch.from_numpy(out)] = 1.0
        return u
    return torch.sigmoid(x) if pixel == PROBABILITY and activation == SIGMOID else x


def _labelled(u: Tensor, foreground: Foreground, pixel: int) -> tuple[Indices, Tensor]:
    """The voxels where the truth of the pixel term is not 0, and what it is there, float64."""
    if pixel == PROBABILITY:
        return foreground.lab, torch.ones(len(foreground.lab), dtype=torch.float64)
    return foreground.labelled, torch.from_numpy(foreground.truth).double()


def slope(x: Tensor, activation: int) -> Tensor:
    """Derivative of what gradients flow into by `x`, elementwise."""
    if activation != SIGMOID:
        return torch.ones_like(x)
    probability = torch.sigmoid(x)
    return probability - probability * probability


def pixel_gradient(
    grads: Tensor, x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int
) -> Tensor:
    """Gradient of `x` from those of the sums of the pixel term, (B, 3)."""
    if pixel == NOT_FUSED or not bool(grads.any()):
        return torch.from_numpy(np.zeros(x.shape, dtype=x.numpy().dtype))
    u = _seen(x, foreground.out, activation, pixel)
    # From NumPy, which asks the system for large pages: without them, touching new memory takes longer than all else.
    grad = torch.from_numpy(np.empty(x.shape, dtype=x.numpy().dtype))
    for sample, by_cost in enumerate(grads[:, 1].tolist()):
        if quantity == MASS:
            grad[sample].fill_(by_cost)
        else:
            torch.mul(phi_derivative(quantity, u[sample], 0.0), by_cost, out=grad[sample])
    at, truth = _labelled(u, foreground, pixel)
    by_intersection, by_cost_of = grads[torch.from_numpy(at // x[0].numel())].unbind(1)[:2]
    more = by_intersection * truth
    if quantity not in (MASS, SQUARE):
        predicted = torch.from_numpy(u.numpy().reshape(-1)[at]).double()
        more += by_cost_of * (phi_derivative(quantity, predicted, truth) - phi_derivative(quantity, predicted, 0.0))
    grad.numpy().reshape(-1)[at] += more.numpy()
    if pixel == HARD:
        grad *= slope(x, activation)
    elif u is not x:
        grad *= u.sub_(u * u)
    return grad
