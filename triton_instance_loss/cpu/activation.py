"""Activation on the CPU: where the foreground of both sides is, the sums of the pixel term, and its gradient elsewhere.

At a voxel, with x the volume, p = sigmoid(x) where that is the activation and x elsewhere, t the threshold:

    foreground = [p >= t], but [x == 1] without activation if t <= 0
    y          = [label > 0.5]

NaN compares as false, so it is background. Since p grows with x, one pass compares x with the least output that is
foreground. Voxels where a label is not 0 are *places*, too. Passes over every voxel give what the pixel term is if
nothing is true, and loops over places what is there.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops, quantities
from ..ops import HARD, NOT_FUSED, PROBABILITY, RAW
from ..quantities import MASS
from . import compiled
from .quantities import phi, phi_derivative, truth

# Voxels of which a pass computes formulas at once: so many that all threads have work, so few that what stands in
# between needs no new memory from the system, whose pages take longer to touch than the formulas.
CHUNK = 2**17
OUT, LAB = 1, 2  # bits of a mark: a is foreground, y is; 4: the label is not 0
Indices = NDArray[np.int64]
Rows = NDArray[np.int32]
Marks = NDArray[np.uint8]
Numbers = NDArray[np.float64]


@functools.lru_cache(maxsize=64)
def _least(threshold: float, activation: int, name: str) -> Any:
    """The least output that is foreground, in the dtype that is named."""
    dtype = np.dtype(name).type
    threshold = dtype(threshold)  # as PyTorch and NumPy compare: a tiny one may become 0
    if activation != ops.SIGMOID:
        return threshold
    if threshold <= 0:
        return dtype(-math.inf)
    low, high = dtype(-1000.0), dtype(1000.0)
    with np.errstate(over="ignore"):
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if 1 / (1 + np.exp(-middle)) >= threshold else (middle, high)
    return high


@compiled
def _mark(
    x: NDArray[Any], labels: NDArray[Any], least: float, only_ones: bool, limits: NDArray[Any], marks: Marks
) -> tuple[int, bool]:
    """Mark all voxels; how many places there are, and whether all is as it must be."""
    lowest, half, highest, places, broken = limits[0], limits[1], limits[2], 0, 0
    for voxel in range(len(x)):
        value, label = x[voxel], labels[voxel]
        out = (value == 1) if only_ones else (value >= least)
        mark = np.uint8(out) | np.uint8(label > half) << np.uint8(1) | np.uint8(label != 0) << np.uint8(2)
        marks[voxel] = mark
        places += mark != 0
        broken += not ((abs(value) < np.inf) & (label >= lowest) & (label <= highest))
    return places, broken == 0


@compiled
def collect(marks: Marks, count: int) -> tuple[Indices, Marks]:
    """The `count` voxels whose mark is not 0, and their marks; eight at once are looked at first."""
    words = marks[: len(marks) // 8 * 8].view(np.uint64)
    voxels, there, place = np.empty(count + 1, np.int64), np.empty(count + 1, np.uint8), 0
    for word in range(len(words) + 1):
        rest = word == len(words)
        if rest or words[word] != 0:
            for voxel in range(8 * word, len(marks) if rest else 8 * word + 8):
                voxels[place], there[place] = voxel, marks[voxel]
                place += marks[voxel] != 0
    return voxels[:count], there[:count]


def find_foreground(x: Tensor, labels: Tensor, activation: int, threshold: float) -> tuple[Indices, Marks, bool]:
    """The places of both sides, ascending; their marks; and whether all x are finite and all labels in [-0.5, 1.5]."""
    values, truths = x.numpy().reshape(-1), labels.numpy().reshape(-1)
    truths = truths.view(np.uint8) if truths.dtype == np.bool_ else truths
    limits = np.array([-0.5, 0.5, 1.5]).astype(truths.dtype)  # of whole numbers 0, 0, 1
    marks, least = np.empty(len(values), dtype=np.uint8), _least(threshold, activation, values.dtype.name)
    count, healthy = _mark(values, truths, least, activation == ops.NONE and least <= 0, limits, marks)
    return *collect(marks, count), healthy


class Places(NamedTuple):
    """What is at the places of a call; an array that nothing looks at is another one."""

    ends: Indices  # sample s has places ends[s] up to ends[s + 1]
    out: Rows  # rows of both sides (instances.py)
    lab: Rows
    x: Numbers
    p: Numbers  # the probability, or x where there is none
    labels: Numbers


def ends_of_samples(voxels: Indices, x: Tensor) -> Indices:
    """Where the places of each sample end, and the first begin: (B + 1,)."""
    return np.searchsorted(voxels, (x[0].numel() if len(x) else 0) * np.arange(len(x) + 1))


def gather(voxels: Indices, out: Rows, lab: Rows, x: Tensor, labels: Tensor, activation: int, pixel: int) -> Places:
    """What is at some voxels, as far as the activation and the pixel term look at it."""
    there = x.numpy().reshape(-1)[voxels]
    p = (torch.from_numpy(there).sigmoid_().numpy() if activation == ops.SIGMOID else there).astype(np.float64)
    values = truths = p
    if activation == ops.SIGMOID and pixel == RAW:
        values = x.numpy().reshape(-1)[voxels].astype(np.float64)
    if pixel in (RAW, HARD):
        truths = labels.numpy().reshape(-1)[voxels].astype(np.float64)
    return Places(ends_of_samples(voxels, x), out, lab, values, p, truths)


@compiled
def seen_by_pixel(x: float, p: float, foreground: bool, y: bool, label: float, pixel: int) -> tuple[float, float]:
    """Prediction u and truth w of the pixel term."""
    if pixel == RAW:
        return x, label
    if pixel == PROBABILITY:
        return p, 1.0 if y else 0.0
    return 1.0 if foreground else 0.0, label


@compiled
def _add_places(
    ends: Indices, out: Rows, lab: Rows, x: Numbers, p: Numbers, labels: Numbers, pixel: int, code: int, sums: Numbers
) -> None:
    """Add what places add to the sums of the pixel term; unless the output is hard, phi(u, 0) is there already."""
    for sample in range(len(sums)):
        intersection, cost, label = 0.0, 0.0, 0.0
        for place in range(ends[sample], ends[sample + 1]):
            u, w = seen_by_pixel(x[place], p[place], out[place] != 0, lab[place] != 0, labels[place], pixel)
            intersection += u * w
            if pixel == HARD or w != 0:
                cost += phi(code, u, w) - (0.0 if pixel == HARD else phi(code, u, 0.0))
            label += truth(code, w)
        line = sums[sample]
        line[0], line[1], line[2] = intersection, line[1] + cost, label


def pixel_sums(x: Tensor, places: Places, activation: int, pixel: int, code: int) -> Tensor:
    """Sums of the pixel term, (B, 3) float64."""
    sums = np.zeros((len(x), ops.SAMPLE_COLUMNS))
    if pixel not in (NOT_FUSED, HARD):
        soft = pixel == PROBABILITY and activation == ops.SIGMOID
        u = torch.empty(CHUNK if soft else 0, dtype=x.dtype)
        for sample, volume in enumerate(x.flatten(1)):
            for part in volume.split(CHUNK):
                seen = torch.sigmoid(part, out=u[: len(part)]) if soft else part
                sums[sample, 1] += float(quantities.phi(code, seen, 0.0).sum())
    if pixel != NOT_FUSED:
        _add_places(*places, pixel, code, sums)
    return torch.from_numpy(sums)


@compiled
def _differentiate(u: NDArray[Any], by_cost: float, code: int, soft: bool, grads: NDArray[Any]) -> None:
    """Gradient of z where nothing is true, from what the pixel term sees."""
    if code == MASS and soft:  # what the defaults have; a loop without a choice is carried out by vectors
        one, factor = u.dtype.type(1), u.dtype.type(by_cost)
        for voxel in range(len(u)):
            grads[voxel] = factor * (u[voxel] * (one - u[voxel]))
        return
    for voxel in range(len(u)):
        slope = u[voxel] * (1 - u[voxel]) if soft else 1
        grads[voxel] = by_cost * phi_derivative(code, u[voxel], 0.0) * slope


def pixel_gradient(grads: Tensor, x: Tensor, activation: int, pixel: int, code: int) -> Tensor:
    """Gradient of z from those of the first two sums of the pixel term, (B, 2), where nothing is true."""
    # From NumPy, which asks the system for large pages: without them, touching new memory takes longer than all else.
    grad = torch.from_numpy(np.empty(x.shape, dtype=x.numpy().dtype))
    if pixel in (NOT_FUSED, HARD):  # a hard output has a derivative in the foreground alone
        return grad.zero_()
    soft = pixel == PROBABILITY and activation != ops.NONE
    for volume, into, by_cost in zip(x.flatten(1), grad.flatten(1), grads[:, 1].tolist(), strict=True):
        for part, by_part in zip(volume.split(CHUNK), into.split(CHUNK), strict=True):
            u = torch.sigmoid(part, out=by_part) if soft and activation == ops.SIGMOID else part
            _differentiate(u.numpy(), by_cost, code, soft, by_part.numpy())
    return grad
