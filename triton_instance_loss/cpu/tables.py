"""Sums over instances on the CPU, and the gradient of all sums: `sum_instances` and its backward of ops.py.

The formulas are those of kernels/tables.py, which says them in full, at each place, with i and j for its rows o and l.
Everywhere else nothing is true: there, sums and the gradient come from passes over the volume, which go first.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops, quantities
from ..ops import BY_FALSE, COST, HARD, INTERSECTION, KEPT, LABEL, MASS, NOT_FUSED, OVERLAP, RAW, SIZE, TOUCHED
from . import compiled
from .activation import Indices, Numbers, Rows, gather, pixel_gradient, seen_by_pixel
from .instances import read_sites
from .quantities import phi, phi_derivative


@compiled
def note_pairs(ends: Indices, out: Rows, lab: Rows, kept: Rows, capacity: int) -> tuple[Indices, Indices]:
    """The pairs of a kept output and a label that touch, each as one number, and how many places each run of one has.

    A pair that touches in several runs of places comes several times.
    """
    pairs, lengths, count, last = np.empty(len(out), np.int64), np.empty(len(out), np.int64), 0, -1
    for sample in range(len(kept)):
        for place in range(ends[sample], ends[sample + 1]):
            if 0 < out[place] <= kept[sample] and lab[place] > 0:
                pair = ((sample * capacity) + out[place] - 1) * capacity + lab[place] - 1
                if pair != last:
                    pairs[count], lengths[count], last = pair, 0, pair
                    count += 1
                lengths[count - 1] += 1
    return pairs[:count], lengths[:count]


def _pairs(ends: Indices, out: Rows, lab: Rows, kept: Rows, capacity: int) -> tuple[Indices, Indices]:
    """The pairs that touch, once each: rows in the tables of all samples of one side."""
    pairs, _ = note_pairs(ends, out, lab, kept, capacity)
    outputs, labels = np.divmod(np.unique(pairs), capacity)
    return outputs, outputs // capacity * capacity + labels


@compiled
def _add_up(
    ends: Indices, out: Rows, lab: Rows, x: Numbers, kept: Rows, code: int, no_tp: bool, hard: bool, sums: Numbers,
    excess: Numbers, sample_sums: Numbers,
) -> None:  # fmt: skip
    """Add places to the rows of their instances, their excess to that of their output, and all to their sample.

    Those that follow each other and belong to the same two are added up first.
    """
    for sample in range(len(kept)):
        place, end, of_sample = ends[sample], ends[sample + 1], sample_sums[sample]
        while place < end:
            i, j, count = out[place], lab[place], 0
            mass, at_nothing, at_label, squares = 0.0, 0.0, 0.0, 0.0
            while place < end and out[place] == i and lab[place] == j:
                a = x[place] if not hard else 1.0 if i != 0 else 0.0
                mass += a
                at_nothing += phi(code, a, 0.0)
                at_label += phi(code, a, 1.0)
                squares += phi(code, a * a, 0.0)
                count += 1
                place += 1
            if hard:  # of a soft output, phi(a, 0) is there already
                of_sample[1] += at_nothing
            if j != 0:
                of_sample[0] += mass
                of_sample[1] += at_label - at_nothing
                of_sample[2] += count
            if i > 0:
                line = sums[0, sample, i - 1]
                line[MASS] += mass
                line[COST] += at_label if j > 0 else at_nothing
                if j > 0:
                    line[INTERSECTION] += mass
                    line[OVERLAP] += count
                if not no_tp:
                    excess[sample, i - 1] += at_nothing
                elif j == 0:
                    excess[sample, i - 1] += squares
            if j > 0:
                line = sums[1, sample, j - 1]
                line[MASS] += mass
                if i > 0:
                    line[TOUCHED] += count
                if 0 < i <= kept[sample]:
                    line[INTERSECTION] += mass
                    line[COST] += at_label if no_tp else at_label - at_nothing
                    line[OVERLAP] += count


def sum_instances(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pair_capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `sum_instances` (ops.py)."""
    hard, batch, capacity, kept = activation != ops.NONE, len(x), geometry.shape[1], counts[KEPT].numpy()
    ends, out, lab, values, _, _ = gather(*read_sites(sites), x, x, ops.NONE, NOT_FUSED)
    sums, excess = np.zeros((2, batch, capacity, ops.SUMS_COLUMNS)), np.zeros((batch, capacity))
    sample_sums = np.zeros((batch, ops.SAMPLE_COLUMNS))
    if not hard and bool((counts[KEPT:] == 0).any()):  # sums of samples are read, in which a is not 0 elsewhere
        sample_sums[:, 1] = quantities.phi(quantity, x, 0.0).sum(-1, dtype=torch.float64).sum((1, 2)).numpy()
    _add_up(ends, out, lab, values, kept, quantity, no_tp, hard, sums, excess, sample_sums)
    outputs, truths = _pairs(ends, out, lab, kept, capacity)
    of_outputs, of_labels = sums.reshape(2, -1, ops.SUMS_COLUMNS)
    np.add.at(of_labels[:, COST], truths, excess.reshape(-1)[outputs])
    np.add.at(of_outputs[:, LABEL], outputs, geometry.numpy()[batch:, :, SIZE].reshape(-1)[truths])
    # The backward finds the pairs again. And all outputs have a row.
    no_pairs, no_rest = (torch.empty((batch, 0), dtype=dtype) for dtype in (torch.int64, torch.bool))
    return torch.from_numpy(sums).flatten(0, 1), torch.from_numpy(sample_sums), no_pairs, no_rest


@compiled
def _by_activated(
    i: int, j: int, a: float, kept: int, of_outputs: Numbers, of_labels: Numbers, of_excess: Numbers,
    of_sample: Numbers, code: int, no_tp: bool, hard: bool,
) -> float:  # fmt: skip
    """The gradient of the activated output at a place."""
    grad, y = 0.0, 1.0 if j != 0 else 0.0
    slope_0, slope_1 = phi_derivative(code, a, 0.0), phi_derivative(code, a, 1.0)
    if i > 0:
        line = of_outputs[i - 1]
        grad += line[MASS] + line[COST] * (slope_1 if j > 0 else slope_0)
        if j > 0:
            grad += line[INTERSECTION]
        if not no_tp:
            grad += of_excess[i - 1] * slope_0
        elif j == 0:
            grad += of_excess[i - 1] * phi_derivative(code, a * a, 0.0) * a
    if j > 0:
        line = of_labels[j - 1]
        grad += line[MASS]
        if 0 < i <= kept:
            grad += line[INTERSECTION] + line[COST] * (slope_1 if no_tp else slope_1 - slope_0)
    # (zero times a slope that is not finite would be NaN)
    if (i != 0 or j != 0 or not hard) and (of_sample[0] != 0 or of_sample[1] != 0):
        grad += of_sample[0] * y + of_sample[1] * phi_derivative(code, a, y)
    return grad


@compiled
def _gradient(
    voxels: Indices, ends: Indices, out: Rows, lab: Rows, x: Numbers, p: Numbers, labels: Numbers, kept: Rows,
    grad_terms: Numbers, slopes: Numbers, grad_sums: Numbers, grad_excess: Numbers, grad_sample_sums: Numbers,
    grad_pixel_sums: Numbers, hard: bool, code: int, no_tp: bool, pixel: int, pixel_code: int, mistakes: int,
    grads: NDArray[Any],
) -> None:  # fmt: skip
    """Write the gradient of z at each place."""
    for sample in range(len(kept)):
        last_i, last_j, by_a, false, missed = -2, -2, 0.0, 0.0, 0.0
        of_outputs, of_labels, of_excess = grad_sums[0, sample], grad_sums[1, sample], grad_excess[sample]
        of_sample, of_pixel = grad_sample_sums[sample], grad_pixel_sums[sample]
        for place in range(ends[sample], ends[sample + 1]):
            i, j = out[place], lab[place]
            if i != last_i or j != last_j or not hard:  # a hard output is the same as at the place before
                last_i, last_j = i, j
                by_a = _by_activated(
                    i, j, x[place] if not hard else 1.0 if i != 0 else 0.0, kept[sample], of_outputs, of_labels,
                    of_excess, of_sample, code, no_tp, hard,
                )  # fmt: skip
                if mistakes != ops.NO_GRADIENT:
                    false = grad_terms[ops.FALSE_INSTANCES] * slopes[0, sample, i - 1, BY_FALSE] if i > 0 else 0.0
                    missed = grad_terms[ops.MISSED_INSTANCES] * slopes[1, sample, j - 1, BY_FALSE] if j > 0 else 0.0
                if mistakes == ops.OF_MEAN:
                    by_a += false + missed
            grad, by_u, s = by_a, 0.0, p[place] * (1.0 - p[place]) if hard else 1.0
            if pixel != NOT_FUSED and (i != 0 or j != 0 or pixel != HARD):
                u, w = seen_by_pixel(x[place], p[place], i != 0, j != 0, labels[place], pixel)
                by_u = of_pixel[0] * w + of_pixel[1] * phi_derivative(pixel_code, u, w)
            grad = grad * s + by_u if pixel == RAW else (grad + by_u) * s
            if mistakes == ops.OF_LOGARITHM:
                grad += false * p[place] + missed * (1.0 - p[place])
            grads[voxels[place]] = grad


def sum_instances_backward(
    grad_terms: Tensor,
    slopes: Tensor,
    grad_sums: Tensor,
    grad_sample_sums: Tensor,
    grad_pixel_sums: Tensor,
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    pairs: Tensor,
    touched: Tensor,
    counts: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
    mistakes: int,
) -> Tensor:
    """Operator `sum_instances_backward` (ops.py)."""
    hard, capacity, kept = activation != ops.NONE, grad_sums.shape[1], counts[KEPT].numpy()
    of_samples = grad_sample_sums[:, : ops.SAMPLE_GRADIENT_COLUMNS].numpy()
    grad = pixel_gradient(grad_pixel_sums, x, activation, pixel, pixel_quantity)
    for into, values, (by_intersection, by_cost) in zip(grad, x, of_samples.tolist(), strict=True):
        if math.isnan(by_intersection + by_cost):
            into.fill_(math.nan)  # where something is broken, also what is right
        elif not hard and by_cost != 0:
            into += by_cost * quantities.phi_derivative(quantity, values, 0.0)

    voxels, out, lab = read_sites(sites)
    places = gather(voxels, out, lab, x, labels, activation, pixel)
    of_rows, of_slopes = (each.numpy().reshape(2, len(x), capacity, -1) for each in (grad_sums, slopes))
    grad_excess = np.zeros((len(x), capacity))
    outputs, truths = _pairs(places.ends, out, lab, kept, capacity)
    np.add.at(grad_excess.reshape(-1), outputs, of_rows[1].reshape(-1, ops.GRADIENT_COLUMNS)[truths, COST])
    _gradient(
        voxels, *places, kept, grad_terms.numpy(), of_slopes, of_rows, grad_excess, np.ascontiguousarray(of_samples),
        grad_pixel_sums.numpy(), hard, quantity, no_tp, pixel, pixel_quantity, mistakes, grad.numpy().reshape(-1),
    )  # fmt: skip
    return grad
