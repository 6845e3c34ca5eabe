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
# Voxels of which a pass computes formulas at once: so many that all threads have work, so few that what stands in
# between needs no new memory from the system, whose pages take longer to touch than the formulas.
CHUNK = 2**20
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


def slope(x: Tensor, activation: int) -> Tensor:
    """Derivative of what gradients flow into by `x`, elementwise."""
    if activation != SIGMOID:
        return torch.ones_like(x)
    probability = torch.sigmoid(x)
    return probability * (1.0 - probability)


class _Pixel(NamedTuple):
    """The pixel term: what it sees and sums, of which volumes."""

    x: Tensor
    foreground: Foreground
    pixel: int
    quantity: int
    soft: bool  # whether u is a sigmoid

    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the truth is not 0: voxels, samples, u (float64) and truth (float64)."""
        at = self.foreground.lab if self.pixel == PROBABILITY else self.foreground.labelled
        voxels = torch.from_numpy(at)
        truth = torch.ones(len(at)) if self.pixel == PROBABILITY else torch.from_numpy(self.foreground.truth)
        if self.pixel == HARD:
            u = torch.from_numpy(np.isin(at, self.foreground.out, assume_unique=True))
        else:
            u = torch.from_numpy(self.x.numpy().reshape(-1)[at])
        samples = torch.div(voxels, self.x[0].numel(), rounding_mode="floor")
        return voxels, samples, (torch.sigmoid(u) if self.soft else u).double(), truth.double()


def _read(x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int) -> _Pixel:
    return _Pixel(x, foreground, pixel, quantity, pixel == PROBABILITY and activation == SIGMOID)


def pixel_sums(x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int) -> tuple[Tensor, Tensor]:
    """Sums of the pixel term, (B, 3) float64, and the health of `x`."""
    rows = x.sum(-1)  # not finite if anything in it is not; or, rarely, too large
    healthy = bool(rows.isfinite().all()) or bool(x.isfinite().all())
    health = torch.tensor(1.0 if healthy else math.nan, dtype=torch.float64)
    sums = torch.zeros((x.shape[0], SAMPLE_COLUMNS), dtype=torch.float64)
    if pixel == NOT_FUSED:
        return sums, health
    term = _read(x, foreground, activation, pixel, quantity)
    if pixel == HARD:
        one = torch.ones((), dtype=torch.float64)
        counts = np.bincount(foreground.out // x[0].numel(), minlength=len(x))
        sums[:, 1] = torch.from_numpy(counts) * phi(quantity, one, 0.0)
    elif quantity == MASS and not term.soft:
        sums[:, 1] = rows.double().sum((1, 2))
    else:
        u = torch.empty(CHUNK, dtype=x.dtype)
        for sample, volume in enumerate(x.flatten(1)):
            for part in volume.split(CHUNK):
                seen = torch.sigmoid(part, out=u[: len(part)]) if term.soft else part
                sums[sample, 1] += phi(quantity, seen, 0.0).sum().double()
    _, samples, u, truth = term.labelled()
    sums[:, 0].index_add_(0, samples, u * truth)
    if quantity not in (MASS, SQUARE):
        sums[:, 1].index_add_(0, samples, phi(quantity, u, truth) - phi(quantity, u, 0.0))
    sums[:, 2].index_add_(0, samples, truth * truth if quantity == SQUARE else truth)
    return sums, health


def pixel_gradient(
    grads: Tensor, x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int
) -> Tensor:
    """Gradient of `x` from those of the first two sums of the pixel term, (B, 2)."""
    # From NumPy, which asks the system for large pages: without them, touching new memory takes longer than all else.
    grad = torch.from_numpy(np.empty(x.shape, dtype=x.numpy().dtype))
    if pixel == NOT_FUSED or not bool(grads.any()):
        return grad.zero_()
    term = _read(x, foreground, activation, pixel, quantity)
    flat = grad.view(-1)
    nothing, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for volume, into, by_cost in zip(x.flatten(1), grad.flatten(1), grads[:, 1].tolist(), strict=True):
        if pixel == HARD or (quantity == MASS and not term.soft):
            into.fill_(by_cost * float(phi_derivative(quantity, nothing, 0.0)))
            continue
        for part, by_part in zip(volume.split(CHUNK), into.split(CHUNK), strict=True):
            u = torch.sigmoid(part, out=by_part) if term.soft else part
            by_u = by_cost * phi_derivative(quantity, u, 0.0)
            torch.mul(by_u, u * (1.0 - u) if term.soft else one.to(x.dtype), out=by_part)
    if pixel == HARD:
        more = phi_derivative(quantity, one, 0.0) - phi_derivative(quantity, nothing, 0.0)
        outputs = torch.from_numpy(foreground.out)
        flat[outputs] += (grads[:, 1] * more)[outputs // x[0].numel()].to(x.dtype)
    voxels, samples, u, truth = term.labelled()
    by_intersection, by_cost_at = grads[samples].unbind(1)
    by_u = by_intersection * truth
    if quantity not in (MASS, SQUARE):
        by_u += by_cost_at * (phi_derivative(quantity, u, truth) - phi_derivative(quantity, u, 0.0))
    flat[voxels] += (by_u * (u * (1.0 - u)) if term.soft else by_u).to(x.dtype)
    return grad
