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
OUT, LAB, LABELLED = 1, 2, 4  # bits of a voxel: a is, y is, labels are not 0
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]


class Foreground(NamedTuple):
    """The voxels of either side's foreground, by their index in the batch, ascending; and what is there."""

    voxels: Indices
    bits: NDArray[np.uint8]  # OUT, LAB and LABELLED

    def where(self, bit: int) -> Indices:
        """Where a bit is set, as positions in the list."""
        return np.flatnonzero((self.bits & bit) != 0)


def find_foreground(x: Tensor, labels: Tensor, activation: int, threshold: float) -> Foreground:
    """The foreground of both sides."""
    values, truth = x.numpy().reshape(-1), labels.numpy().reshape(-1)
    # A cast is several times faster than any comparison of PyTorch's, and than NumPy's in one thread.
    seen = labels.bool().numpy().reshape(-1).view(np.uint8) * np.uint8(LABELLED)
    seen |= _perhaps(values, activation, threshold).view(np.uint8)  # True is OUT
    voxels = nonzero(seen)
    bits = seen[voxels]
    bits |= (truth[voxels] == 1).view(np.uint8) * np.uint8(LAB)
    foreground = Foreground(voxels, bits)
    return _sure(foreground, values, threshold) if activation == SIGMOID and threshold > 0 else foreground


def _perhaps(values: NDArray[Any], activation: int, threshold: float) -> Mask:
    """Where instances of the outputs are looked for; of a sigmoid, where that can be."""
    threshold = float(values.dtype.type(threshold))
    if activation != SIGMOID:
        found: Mask = values == 1 if activation == NONE and threshold <= 0 else values >= threshold
    elif threshold <= 0:
        found = ~np.isnan(values)
    else:
        low = threshold * (1.0 - SIGMOID_ERROR)
        found = values >= values.dtype.type(math.log(low / (1.0 - low)))
    return found


def _sure(foreground: Foreground, values: NDArray[Any], threshold: float) -> Foreground:
    """The foreground less the voxels whose sigmoid is below the threshold after all."""
    voxels, bits = foreground
    outputs = foreground.where(OUT)
    below = torch.sigmoid(torch.from_numpy(values[voxels[outputs]])).numpy() < values.dtype.type(threshold)
    if not below.any():
        return foreground
    bits[outputs[below]] ^= OUT
    return Foreground(voxels[bits != 0], bits[bits != 0])


def nonzero(flat: NDArray[np.uint8]) -> Indices:
    """`np.flatnonzero` of bytes that are mostly 0: eight at once are looked at first."""
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    some = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[some].view(np.uint8) != 0)
    found = some[inside >> 3] * 8 + (inside & 7)
    return np.append(found, whole + np.flatnonzero(flat[whole:]))


def slope(x: Tensor, activation: int) -> Tensor:
    """Derivative of what gradients flow into by `x`, elementwise."""
    if activation != SIGMOID:
        return torch.ones_like(x)
    probability = torch.sigmoid(x)
    return probability * (1.0 - probability)


class _Pixel(NamedTuple):
    """The pixel term: what it sees and sums, of which volumes."""

    x: Tensor
    labels: Tensor
    foreground: Foreground
    pixel: int
    quantity: int
    soft: bool  # whether u is a sigmoid

    @classmethod
    def of(
        cls, x: Tensor, labels: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int
    ) -> "_Pixel":
        """From the arguments of the operators."""
        soft = pixel == PROBABILITY and activation == SIGMOID
        return cls(x, labels, foreground, pixel, quantity, soft)

    def labelled(self) -> Indices:
        """Where the truth is not 0, as positions in the foreground."""
        return self.foreground.where(LAB if self.pixel == PROBABILITY else LABELLED)

    def truth(self, at: Indices) -> Tensor:
        """The truth there, float64."""
        if self.pixel == PROBABILITY or (self.foreground.bits[at] & LAB).all():
            return torch.ones(len(at), dtype=torch.float64)
        return torch.from_numpy(self.labels.numpy().reshape(-1)[self.foreground.voxels[at]]).double()

    def u(self, at: Indices) -> Tensor:
        """The prediction there, float64."""
        if self.pixel == HARD:
            return torch.from_numpy(self.foreground.bits[at] & OUT).double()
        x = torch.from_numpy(self.x.numpy().reshape(-1)[self.foreground.voxels[at]])
        return (torch.sigmoid(x) if self.soft else x).double()


def pixel_sums(
    x: Tensor, labels: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int
) -> tuple[Tensor, Tensor]:
    """Sums of the pixel term, (B, 3) float64, and the health of `x`."""
    volumes = x.flatten(1)
    of_all = volumes.sum(1)  # not finite if anything in it is not; or, rarely, too large
    healthy = bool(of_all.isfinite().all()) or bool(x.isfinite().all())
    health = torch.tensor(1.0 if healthy else math.nan, dtype=torch.float64)
    sums = np.zeros((len(x), SAMPLE_COLUMNS))
    if pixel == NOT_FUSED:
        return torch.from_numpy(sums), health
    term = _Pixel.of(x, labels, foreground, activation, pixel, quantity)
    if pixel == HARD:
        one = torch.ones((), dtype=torch.float64)
        counts = np.bincount(foreground.voxels[foreground.where(OUT)] // volumes.shape[1], minlength=len(x))
        sums[:, 1] = counts * float(phi(quantity, one, 0.0))
    elif quantity == MASS and not term.soft:
        sums[:, 1] = of_all
    else:
        u = torch.empty(CHUNK, dtype=x.dtype)
        for sample, volume in enumerate(volumes):
            for part in volume.split(CHUNK):
                seen = torch.sigmoid(part, out=u[: len(part)]) if term.soft else part
                sums[sample, 1] += float(phi(quantity, seen, 0.0).sum())
    at = term.labelled()
    samples, u, truth = foreground.voxels[at] // volumes.shape[1], term.u(at), term.truth(at)
    sums[:, 0] = np.bincount(samples, weights=u * truth, minlength=len(x))
    if quantity not in (MASS, SQUARE):
        more = phi(quantity, u, truth) - phi(quantity, u, 0.0)
        sums[:, 1] += np.bincount(samples, weights=more, minlength=len(x))
    sums[:, 2] = np.bincount(samples, weights=truth * truth if quantity == SQUARE else truth, minlength=len(x))
    return torch.from_numpy(sums), health


def pixel_gradient(
    grads: Tensor, x: Tensor, labels: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int
) -> tuple[Tensor, Numbers]:
    """Gradient of `x` from those of the first two sums of the pixel term, (B, 2).

    It comes in two parts: what all voxels have, and what the foreground has on top.
    """
    # From NumPy, which asks the system for large pages: without them, touching new memory takes longer than all else.
    grad, on_top = torch.from_numpy(np.empty(x.shape, dtype=x.numpy().dtype)), np.zeros(len(foreground.voxels))
    if pixel == NOT_FUSED or not bool(grads.any()):
        return grad.zero_(), on_top
    term = _Pixel.of(x, labels, foreground, activation, pixel, quantity)
    nothing, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for volume, into, by_cost in zip(x.flatten(1), grad.flatten(1), grads[:, 1].tolist(), strict=True):
        if pixel == HARD or (quantity == MASS and not term.soft):
            into.fill_(by_cost * float(phi_derivative(quantity, nothing, 0.0)))
            continue
        for part, by_part in zip(volume.split(CHUNK), into.split(CHUNK), strict=True):
            if term.soft:
                u = torch.sigmoid(part, out=by_part)
                by_u = by_cost * phi_derivative(quantity, u, 0.0)
                torch.ops.aten.sigmoid_backward.grad_input(by_u, u, grad_input=by_part)
            else:
                torch.mul(phi_derivative(quantity, part, 0.0), by_cost, out=by_part)
    by_intersection, by_costs = grads.numpy().T
    if pixel == HARD:
        more = float(phi_derivative(quantity, one, 0.0) - phi_derivative(quantity, nothing, 0.0))
        outputs = foreground.where(OUT)
        on_top[outputs] = by_costs[foreground.voxels[outputs] // x[0].numel()] * more
    at = term.labelled()
    samples, truth = foreground.voxels[at] // x[0].numel(), term.truth(at)
    by_x = torch.from_numpy(by_intersection[samples]) * truth
    if term.soft or quantity not in (MASS, SQUARE):
        u = term.u(at)
        if quantity not in (MASS, SQUARE):
            more_at = phi_derivative(quantity, u, truth) - phi_derivative(quantity, u, 0.0)
            by_x += torch.from_numpy(by_costs[samples]) * more_at
        if term.soft:
            by_x *= u * (1.0 - u)
    on_top[at] += by_x.numpy()
    return grad, on_top
