"""Sums over instances on the CPU: `sum_instances` and its backward of ops.py."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import quantities
from ..ops import (
    BY_FALSE,
    COST,
    FALSE_INSTANCES,
    HARD,
    INTERSECTION,
    KEPT,
    LABEL,
    MASS,
    MISSED_INSTANCES,
    NO_GRADIENT,
    NONE,
    NOT_FUSED,
    OF_LOGARITHM,
    OF_MEAN,
    OVERLAP,
    PROBABILITY,
    RAW,
    SAMPLE_COLUMNS,
    SAMPLE_GRADIENT_COLUMNS,
    SIZE,
    SUMS_COLUMNS,
    TOUCHED,
)
from ..quantities import phi, phi_derivative
from .activation import Indices, Numbers, pixel_gradient, probability, what_truth_changes
from .instances import FRACTION, LAB, OUT, Sites, row_maps


class _Groups:
    """The sites of a call, and what is summed over them.

    Where all that matters about a voxel is the same for all of its group, groups stand for their voxels; elsewhere each
    voxel stands for itself. What has a value of its own is called a *place*.
    """

    def __init__(self, sites: Sites, alike: bool) -> None:
        self.sites, self.alike = sites, alike
        self.bits = sites.bits if alike else sites.bits[sites.group]

    def has(self, bit: int) -> Tensor:
        """Where a bit is set, by place."""
        return torch.from_numpy((self.bits & bit) != 0)

    def of_voxels(self, volume: Tensor) -> Tensor:
        """What a volume holds, by voxel."""
        return torch.from_numpy(volume.numpy().reshape(-1)[self.sites.voxels])

    def a(self, x: Tensor, activation: int) -> Tensor:
        """The activated output, by place."""
        return self.of_voxels(x) if activation == NONE else self.has(OUT).double()

    def sum(self, values: Tensor) -> Numbers:
        """Values of places, summed over the voxels of each group."""
        numbers, size = values.numpy(), self.sites.size
        sums: NDArray[Any] = numbers * size if self.alike else np.bincount(self.sites.group, numbers, len(size))
        return sums

    def spread(self, values: Numbers) -> Tensor:
        """Values of groups, one for each place."""
        return torch.from_numpy(values if self.alike else values[self.sites.group])

    def to_voxels(self, values: Tensor) -> Tensor:
        """Values of places, one for each voxel."""
        return torch.from_numpy(values.numpy()[self.sites.group]) if self.alike else values

    def kept(self, kept: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which groups lie inside a kept output."""
        inside: NDArray[np.bool_] = (self.sites.out > 0) & (self.sites.out <= kept[self.sites.sample])
        return inside

    def met(self, kept: NDArray[np.int32]) -> Indices:
        """One group of each pair of a kept output and a label that touch."""
        at = np.flatnonzero(self.kept(kept) & (self.sites.lab > 0))
        sample, out, lab = self.sites.sample[at], self.sites.out[at], self.sites.lab[at]
        # Groups of a pair follow each other.
        new = np.ones(len(at), dtype=bool)
        new[1:] = (np.diff(sample) != 0) | (np.diff(out) != 0) | (np.diff(lab) != 0)
        return at[new]

    def by_row(self, side: Indices, values: NDArray[Any], capacity: int, batch: int) -> Numbers:
        """Values of groups, summed over each row of one side, (B, capacity); groups without a row are left out."""
        at = self.sites.sample * (capacity + 1) + side
        sums: NDArray[Any] = np.bincount(at, weights=values, minlength=batch * (capacity + 1))
        return sums.reshape(batch, capacity + 1)[:, 1:]

    def gather(self, side: Indices, table: Numbers) -> Numbers:
        """For each group, its row of `table` (B, capacity, columns), zeros where it has none: (columns, groups)."""
        batch, capacity, columns = table.shape
        padded = np.zeros((batch, capacity + 1, columns))
        padded[:, 1:] = table
        gathered: Numbers = padded[self.sites.sample, side].T
        return gathered


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
    read = Sites.read(sites)
    groups, kept = _Groups(read, alike=activation != NONE), counts[KEPT].numpy()
    a, y = groups.a(x, activation), groups.has(LAB)
    batch, capacity = len(x), geometry.shape[1]
    inside, on_label = groups.kept(kept), read.lab > 0
    mass = groups.sum(a)
    if quantity == quantities.MASS:  # phi is a itself
        at_nothing = at_label = mass
    else:
        at_nothing = groups.sum(phi(quantity, a, 0.0))
        at_label = groups.sum(phi(quantity, a, 1.0))
    if no_tp:
        excess = groups.sum(phi(quantity, a * a, 0.0).masked_fill(y, 0.0))
        cost = at_label
    else:
        excess = at_nothing
        cost = at_label - at_nothing
    met = groups.met(kept)
    label_sizes, brought = np.zeros((2, len(mass)))
    label_sizes[met] = geometry.numpy()[batch + read.sample[met], read.lab[met] - 1, SIZE]
    brought[met] = groups.by_row(read.out, excess, capacity, batch)[read.sample[met], read.out[met] - 1]
    out_columns = {
        MASS: mass,
        INTERSECTION: np.where(on_label, mass, 0.0),
        COST: np.where(on_label, at_label, at_nothing),
        LABEL: label_sizes,
        OVERLAP: np.where(on_label, read.size, 0),
    }
    lab_columns = {
        MASS: mass,
        INTERSECTION: np.where(inside, mass, 0.0),
        COST: np.where(inside, cost, 0.0) + brought,
        TOUCHED: np.where(read.out > 0, read.size, 0),
        OVERLAP: np.where(inside, read.size, 0),
    }

    sums = np.empty((2 * batch, capacity, SUMS_COLUMNS))
    for column in range(SUMS_COLUMNS):
        sums[:batch, :, column] = groups.by_row(read.out, out_columns[column], capacity, batch)
        sums[batch:, :, column] = groups.by_row(read.lab, lab_columns[column], capacity, batch)
    # The backward needs no list of pairs: its groups name them. And all outputs have a row.
    no_pairs, no_rest = (torch.empty((batch, 0), dtype=dtype) for dtype in (torch.int64, torch.bool))
    return torch.from_numpy(sums), _sample_sums(x, groups, a, y, counts, quantity), no_pairs, no_rest


def _sample_sums(x: Tensor, groups: _Groups, a: Tensor, y: Tensor, counts: Tensor, quantity: int) -> Tensor:
    """Sums of a * y, phi(a, y) and y over each sample that they are read of, zeros elsewhere."""
    sums = np.zeros((len(x), SAMPLE_COLUMNS))
    read = (counts[KEPT:] == 0).any(0).numpy()
    if read.any():
        truth = y.to(a.dtype)
        cost = phi(quantity, a, truth)
        if not groups.alike:  # a is not 0 elsewhere
            sums[:, 1] = phi(quantity, x, 0.0).sum(-1, dtype=torch.float64).sum((1, 2)).numpy()
            cost = cost - phi(quantity, a, 0.0)
        for column, values in enumerate((a * truth, cost, truth)):
            sums[:, column] += np.bincount(groups.sites.sample, weights=groups.sum(values), minlength=len(x))
        sums[~read] = 0.0
    return torch.from_numpy(sums)


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
    read = Sites.read(sites)
    grad = pixel_gradient(grad_pixel_sums, x, activation, pixel, pixel_quantity)
    grad_sample_sums = grad_sample_sums[:, :SAMPLE_GRADIENT_COLUMNS]
    hard = activation != NONE
    if not hard and bool(grad_sample_sums.any()):
        grad += _by_whole_volumes(grad_sample_sums, x, sites, quantity)
    grad[grad_sample_sums.isnan().any(1)] = torch.nan  # where something is broken, also what is right

    binary = pixel in (PROBABILITY, NOT_FUSED) or not bool((read.bits & FRACTION).any())
    linear = pixel in (HARD, NOT_FUSED) or pixel_quantity in (quantities.MASS, quantities.SQUARE)
    groups = _Groups(read, alike=hard and binary and linear)
    a = groups.a(x, activation)
    by_a = _by_activated(groups, grad_sums.numpy(), a, counts[KEPT].numpy(), quantity, no_tp)
    if hard:
        by_a = by_a + _by_whole(groups, grad_sample_sums, a, quantity)
    by_u = _by_seen(groups, grad_pixel_sums, x, labels, activation, pixel, pixel_quantity)
    false, missed = _by_mistake(groups, grad_terms.numpy(), slopes.numpy(), mistakes)
    if mistakes == OF_MEAN:
        by_a = by_a + false + missed
    if not hard:
        by_voxel = groups.to_voxels(by_a + by_u)
    else:
        p = probability(groups.of_voxels(x), activation)
        if pixel == RAW:  # the pixel term does not look through the sigmoid
            by_voxel = groups.to_voxels(by_a) * (p * (1.0 - p)) + groups.to_voxels(by_u)
        else:
            by_voxel = groups.to_voxels(by_a + by_u) * (p * (1.0 - p))
        if mistakes == OF_LOGARITHM:
            by_voxel = by_voxel + groups.to_voxels(false) * p + groups.to_voxels(missed) * (1.0 - p)
    grad.numpy().reshape(-1)[read.voxels] += by_voxel.numpy()
    return grad


def _by_whole_volumes(grads: Tensor, x: Tensor, sites: list[Tensor], quantity: int) -> Tensor:
    """Gradient of the volume from those of the sums of whole samples, for outputs that may be anything everywhere."""
    y = row_maps(x, sites)[1].to(x.dtype)
    by_intersection, by_cost = grads[:, :, None, None, None].unbind(1)
    by_whole = by_intersection * y + by_cost * phi_derivative(quantity, x, y)
    # Other samples are left out: zero times a slope that is not finite would be NaN.
    return torch.where(grads.any(1)[:, None, None, None], by_whole, 0.0).to(x.dtype)


def _by_whole(groups: _Groups, grads: Tensor, a: Tensor, quantity: int) -> Tensor:
    """The same by place, for a hard output: it has a derivative where it or the label is 1."""
    if not bool(grads.any()):
        return torch.zeros_like(a)
    y = groups.has(LAB).to(a.dtype)
    by_intersection, by_cost = (groups.spread(each[groups.sites.sample]) for each in grads.numpy().T)
    by_whole = by_intersection * y + by_cost * phi_derivative(quantity, a, y)
    return by_whole.masked_fill(~groups.has(OUT | LAB), 0.0)


def _by_mistake(groups: _Groups, grad_terms: Numbers, slopes: Numbers, mistakes: int) -> tuple[Tensor, Tensor]:
    """Gradients of false and of missed instances, by place, before they meet the slope of the activation."""
    if mistakes == NO_GRADIENT:
        return (groups.spread(np.zeros(len(groups.sites.out))),) * 2
    sides = zip((groups.sites.out, groups.sites.lab), np.split(slopes[..., BY_FALSE : BY_FALSE + 1], 2), strict=True)
    false, missed = (groups.gather(*side)[0] for side in sides)
    return groups.spread(grad_terms[FALSE_INSTANCES] * false), groups.spread(grad_terms[MISSED_INSTANCES] * missed)


def _by_activated(
    groups: _Groups, grad_sums: Numbers, a: Tensor, kept: NDArray[np.int32], quantity: int, no_tp: bool
) -> Tensor:
    """Gradient of the activated output from those of the sums by instance, by place."""
    sites, (sides, capacity, _) = groups.sites, grad_sums.shape
    inside, on_label = groups.kept(kept), sites.lab > 0
    out, lab = (groups.gather(*side) for side in zip((sites.out, sites.lab), np.split(grad_sums, 2), strict=True))
    # What each group multiplies 1, phi'(a, 1), phi'(a, 0) and the derivative of the excess by.
    cost = np.where(inside, lab[COST], 0.0)
    constant = out[MASS] + lab[MASS] + np.where(on_label, out[INTERSECTION], 0.0)
    constant += np.where(inside, lab[INTERSECTION], 0.0)
    of_label = np.where(on_label, out[COST], 0.0) + cost
    of_nothing = np.where(on_label, 0.0, out[COST])
    met = groups.met(kept)
    brought = np.zeros(len(cost))
    brought[met] = lab[COST][met]
    brought = groups.by_row(sites.out, brought, capacity, sides // 2)[:, :, None]
    (excess,) = groups.gather(sites.out, brought)
    if not no_tp:
        of_nothing += excess - cost

    if quantity == quantities.MASS:  # both derivatives are 1
        by_a = groups.spread(constant + of_label + of_nothing)
    else:
        by_a = groups.spread(constant)
        by_a = by_a + groups.spread(of_label) * phi_derivative(quantity, a, 1.0)
        by_a += groups.spread(of_nothing) * phi_derivative(quantity, a, 0.0)
    if no_tp:
        slope_of_excess = phi_derivative(quantity, a * a, 0.0) * a
        by_a = by_a + groups.spread(excess) * slope_of_excess.masked_fill(groups.has(LAB), 0.0)
    return by_a


def _by_seen(
    groups: _Groups, grads: Tensor, x: Tensor, labels: Tensor, activation: int, pixel: int, quantity: int
) -> Tensor:
    """Gradient of what the pixel term sees, by place: what is due to the truth there."""
    w = groups.has(LAB).double()
    if pixel == NOT_FUSED:
        return torch.zeros_like(w)
    if pixel == HARD:
        u = groups.has(OUT).double()
    elif groups.alike:  # then it does not matter
        u = torch.zeros_like(w)
    else:
        values = groups.of_voxels(x)
        u = (probability(values, activation) if pixel == PROBABILITY else values).double()
    if pixel != PROBABILITY and not groups.alike:
        w = groups.of_voxels(labels).double()
    by_intersection, by_cost = (groups.spread(each[groups.sites.sample]) for each in grads.numpy().T)
    by_seen = by_intersection * w + by_cost * what_truth_changes(phi_derivative, u, w, pixel, quantity)
    return by_seen.masked_fill(~groups.has(OUT | LAB), 0.0) if pixel == HARD else by_seen
