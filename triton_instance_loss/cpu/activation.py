"""Activation on the CPU: the foreground of both sides, the sums of the pixel term, and their derivatives.

A pass over a volume costs as much as all that is done with the few voxels it finds, so there are few, and each works on
a part that stays in the cache. What is looked at first is the largest output of each block of voxels: most blocks are
background. The sigmoid is taken only where it can decide or matters.
"""

import itertools
import math
from collections.abc import Callable
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
# Voxels whose largest output is asked first: where it is background, all of them are.
BLOCK = 64
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]
Formula = Callable[[int, Tensor, Tensor | float], Tensor]


class Foreground(NamedTuple):
    """The voxels of either side's foreground, and what is there."""

    voxels: Indices  # by their index in the batch, ascending
    x: NDArray[Any]
    p: NDArray[Any]  # the probability, or x where there is none
    labels: NDArray[Any]
    out: Mask  # whether a is foreground
    lab: Mask  # whether y is; where neither is, labels are between 0 and foreground


def find_foreground(x: Tensor, labels: Tensor, activation: int, threshold: float) -> Foreground:
    """The foreground of both sides."""
    values, truths = x.view(-1), labels.view(-1)
    threshold = float(x.numpy().dtype.type(threshold))  # once for all: a tiny one may become 0
    low = _least(threshold, activation)
    parts = zip(values.split(CHUNK), truths.split(CHUNK), strict=True)
    found = [_candidates(*part, low) + number * CHUNK for number, part in enumerate(parts)]
    voxels = np.concatenate(found)
    there, labels_there = values.numpy()[voxels], truths.numpy()[voxels]
    p = probability(torch.from_numpy(there), activation).numpy()
    out = p == 1 if activation == NONE and threshold <= 0 else p >= threshold
    foreground = Foreground(voxels, there, p, labels_there, out, labels_there > 0.5)
    sure = out | (labels_there != 0)
    return foreground if sure.all() else Foreground(*(each[sure] for each in foreground))


def _least(threshold: float, activation: int) -> float:
    """What an output is at least that may be foreground."""
    if threshold <= 0:
        return 1.0 if activation == NONE else -math.inf
    if activation != SIGMOID:
        return threshold
    low = threshold * (1.0 - SIGMOID_ERROR)
    return math.log(low / (1.0 - low))


def _candidates(values: Tensor, truths: Tensor, low: float) -> Indices:
    """The voxels where labels are not 0 or outputs at least `low`."""
    # A cast and maxima of blocks are several times faster than PyTorch's comparisons, and than NumPy's in one thread.
    some = truths.to(torch.bool, copy=True).numpy()
    whole = len(values) // BLOCK * BLOCK
    blocks = values[:whole].view(-1, BLOCK)
    low = values.numpy().dtype.type(low)
    high = np.flatnonzero(~(blocks.amax(1).numpy() < low))  # the largest of a block may be NaN
    some[:whole].reshape(-1, BLOCK)[high] |= blocks.numpy()[high] >= low
    some[whole:] |= values[whole:].numpy() >= low
    return nonzero(some.view(np.uint8))


def nonzero(flat: NDArray[np.uint8]) -> Indices:
    """`np.flatnonzero` of bytes that are mostly 0: eight at once are looked at first."""
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    some = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[some].view(np.uint8) != 0)
    found = some[inside >> 3] * 8 + (inside & 7)
    return np.append(found, whole + np.flatnonzero(flat[whole:]))


def probability(x: Tensor, activation: int) -> Tensor:
    """The probability, or x where there is none, elementwise."""
    return torch.sigmoid(x) if activation == SIGMOID else x


def pixel_sums(x: Tensor, foreground: Foreground, activation: int, pixel: int, quantity: int) -> tuple[Tensor, Tensor]:
    """Sums of the pixel term, (B, 3) float64, and the health of `x` and the labels."""
    volumes = x.flatten(1)
    of_all = volumes.sum(1)  # not finite if anything in it is not; or, rarely, too large
    healthy = bool(of_all.isfinite().all()) or bool(x.isfinite().all())
    healthy = healthy and bool(((foreground.labels >= -0.5) & (foreground.labels <= 1.5)).all())
    health = torch.tensor(1.0 if healthy else math.nan, dtype=torch.float64)
    sums = np.zeros((len(x), SAMPLE_COLUMNS))
    if pixel == NOT_FUSED:
        return torch.from_numpy(sums), health
    # What all voxels add as if nothing were true, ...
    soft = pixel == PROBABILITY and activation == SIGMOID
    if quantity == MASS and pixel != HARD and not soft:
        sums[:, 1] = of_all
    elif pixel != HARD:
        u = torch.empty(min(CHUNK, volumes.shape[1]), dtype=x.dtype)
        for sample, volume in enumerate(volumes):
            for part in volume.split(CHUNK):
                seen = torch.sigmoid(part, out=u[: len(part)]) if soft else part
                sums[sample, 1] += float(phi(quantity, seen, 0.0).sum())
    # ... and the foreground on top.
    u, w = seen_in_foreground(foreground, pixel)
    columns = [u * w, what_truth_changes(phi, u, w, pixel, quantity), w * w if quantity == SQUARE else w]
    ends = np.searchsorted(foreground.voxels, volumes.shape[1] * np.arange(len(x) + 1)).tolist()
    for sample, (start, end) in enumerate(itertools.pairwise(ends)):
        sums[sample] += [float(column[start:end].sum()) for column in columns]
    return torch.from_numpy(sums), health


def seen_in_foreground(foreground: Foreground, pixel: int) -> tuple[Tensor, Tensor]:
    """Prediction u and truth w of the pixel term, float64."""
    u = foreground.p if pixel == PROBABILITY else foreground.out if pixel == HARD else foreground.x
    w = foreground.lab if pixel == PROBABILITY else foreground.labels
    return torch.from_numpy(u.astype(np.float64)), torch.from_numpy(w.astype(np.float64))


def what_truth_changes(formula: Formula, u: Tensor, w: Tensor, pixel: int, quantity: int) -> Tensor:
    """A formula at the foreground, less what `pixel_sums` and `pixel_gradient` count for all voxels."""
    if pixel != HARD and quantity in (MASS, SQUARE):
        return torch.zeros_like(u)
    if pixel == HARD:
        return formula(quantity, u, w)
    # Without truth nothing changes, even where both are infinite.
    return (formula(quantity, u, w) - formula(quantity, u, 0.0)).masked_fill(w == 0, 0.0)


def pixel_gradient(grads: Tensor, x: Tensor, activation: int, pixel: int, quantity: int) -> Tensor:
    """Gradient of z from those of the first two sums of the pixel term, (B, 2), as if nothing were true."""
    # From NumPy, which asks the system for large pages: without them, touching new memory takes longer than all else.
    grad = torch.from_numpy(np.empty(x.shape, dtype=x.numpy().dtype))
    if pixel in (NOT_FUSED, HARD):  # a hard output has a derivative in the foreground alone
        return grad.zero_()
    soft = pixel == PROBABILITY and activation != NONE
    nothing = torch.zeros((), dtype=torch.float64)
    for volume, into, by_cost in zip(x.flatten(1), grad.flatten(1), grads[:, 1].tolist(), strict=True):
        if by_cost == 0 or (quantity == MASS and not soft):
            into.fill_(by_cost * float(phi_derivative(quantity, nothing, 0.0)))
            continue
        for part, by_part in zip(volume.split(CHUNK), into.split(CHUNK), strict=True):
            if soft:
                u = torch.sigmoid(part, out=by_part) if activation == SIGMOID else part
                by_u = by_cost * phi_derivative(quantity, u, 0.0)
                torch.ops.aten.sigmoid_backward.grad_input(by_u, u, grad_input=by_part)
            else:
                torch.mul(phi_derivative(quantity, part, 0.0), by_cost, out=by_part)
    return grad
