"""Sums over instances on the CPU: `sum_instances` and its backward of ops.py."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import quantities
from ..ops import (
    COST,
    INTERSECTION,
    KEPT,
    LABEL,
    MASS,
    NONE,
    OVERLAP,
    SAMPLE_COLUMNS,
    SAMPLE_GRADIENT_COLUMNS,
    SIZE,
    SUMS_COLUMNS,
    TOUCHED,
)
from ..quantities import phi, phi_derivative
from .activation import LAB, OUT, Indices, Numbers, pixel_gradient, slope
from .instances import Sites, row_maps


class _Groups:
    """The sites of a call, and what is summed over them.

    A hard output a is the same for all voxels of a group, which then stand for themselves as often as there are some;
    otherwise each voxel has its own. What a and y are given for is called *places*.
    """

    def __init__(self, x: Tensor, sites: Sites, activation: int) -> None:
        self.sites, self.hard = sites, activation != NONE
        y = (sites.bits & LAB) != 0
        if self.hard:
            self.a = torch.from_numpy((sites.bits & OUT) != 0).double()
            self.y = torch.from_numpy(y)
        else:
            self.a = torch.from_numpy(x.numpy().reshape(-1)[sites.voxels])
            self.y = torch.from_numpy(y[sites.group])

    def sum(self, values: Tensor) -> Numbers:
        """Values of places, summed over the voxels of each group."""
        numbers, size = values.numpy(), self.sites.size
        sums: NDArray[Any] = numbers * size if self.hard else np.bincount(self.sites.group, numbers, len(size))
        return sums

    def spread(self, values: Numbers) -> Tensor:
        """Values of groups, one for each place."""
        return torch.from_numpy(values if self.hard else values[self.sites.group])

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `sum_instances` (ops.py)."""
    read = Sites.read(sites)
    groups, kept = _Groups(x, read, activation), counts[KEPT].numpy()
    batch, capacity = len(x), geometry.shape[1]
    inside, on_label = groups.kept(kept), read.lab > 0
    mass = groups.sum(groups.a)
    if quantity == quantities.MASS:  # phi is a itself
        at_nothing = at_label = mass
    else:
        at_nothing = groups.sum(phi(quantity, groups.a, 0.0))
        at_label = groups.sum(phi(quantity, groups.a, 1.0))
    if no_tp:
        excess = groups.sum(phi(quantity, groups.a * groups.a, 0.0).masked_fill(groups.y, 0.0))
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
    # The backward needs no list of pairs: its groups name them.
    no_pairs = torch.empty((batch, 0), dtype=torch.int64)
    return torch.from_numpy(sums), _sample_sums(x, groups, counts, quantity), no_pairs


def _sample_sums(x: Tensor, groups: _Groups, counts: Tensor, quantity: int) -> Tensor:
    """Sums of a * y, phi(a, y) and y over each sample that they are read of, zeros elsewhere."""
    sums = np.zeros((len(x), SAMPLE_COLUMNS))
    read = (counts[KEPT:] == 0).any(0).numpy()
    if read.any():
        truth = groups.y.to(groups.a.dtype)
        cost = phi(quantity, groups.a, truth)
        if not groups.hard:  # elsewhere a is not 0
            sums[:, 1] = phi(quantity, x, 0.0).sum(-1, dtype=torch.float64).sum((1, 2)).numpy()
            cost = cost - phi(quantity, groups.a, 0.0)
        for column, values in enumerate((groups.a * truth, cost, truth)):
            sums[:, column] += np.bincount(groups.sites.sample, weights=groups.sum(values), minlength=len(x))
        sums[~read] = 0.0
    return torch.from_numpy(sums)


def sum_instances_backward(
    grad_sums: Tensor,
    grad_sample_sums: Tensor,
    grad_pixel_sums: Tensor,
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    pairs: Tensor,
    counts: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
) -> Tensor:
    """Operator `sum_instances_backward` (ops.py)."""
    read = Sites.read(sites)
    grad, on_top = pixel_gradient(grad_pixel_sums, x, labels, read.foreground(), activation, pixel, pixel_quantity)
    if bool(grad_sample_sums.any()):
        _, y, _, _ = maps = row_maps(x, sites)
        a = x if activation == NONE else maps[0].to(x.dtype)
        by_intersection, by_cost = grad_sample_sums.view(len(x), SAMPLE_GRADIENT_COLUMNS, 1, 1, 1).unbind(1)
        by_whole = by_intersection * y + by_cost * phi_derivative(quantity, a, y.to(x.dtype))
        # Other samples are left out: zero times a slope that is not finite would be NaN.
        some = grad_sample_sums.any(1)
        grad[some] += (by_whole * slope(x, activation))[some].to(x.dtype)

    groups, kept = _Groups(x, read, activation), counts[KEPT].numpy()
    inside, on_label = groups.kept(kept), read.lab > 0
    out, lab = (groups.gather(*side) for side in zip((read.out, read.lab), np.split(grad_sums.numpy(), 2), strict=True))
    # What each group multiplies 1, phi'(a, 1), phi'(a, 0) and the derivative of the excess by.
    cost = np.where(inside, lab[COST], 0.0)
    constant = out[MASS] + lab[MASS] + np.where(on_label, out[INTERSECTION], 0.0)
    constant += np.where(inside, lab[INTERSECTION], 0.0)
    of_label = np.where(on_label, out[COST], 0.0) + cost
    of_nothing = np.where(on_label, 0.0, out[COST])
    met = groups.met(kept)
    brought = np.zeros(len(cost))
    brought[met] = lab[COST][met]
    brought = groups.by_row(read.out, brought, grad_sums.shape[1], len(x))[:, :, None]
    (excess,) = groups.gather(read.out, brought)
    if not no_tp:
        of_nothing += excess - cost

    if quantity == quantities.MASS:  # both derivatives are 1
        by_a = groups.spread(constant + of_label + of_nothing)
    else:
        by_a = groups.spread(constant)
        by_a += groups.spread(of_label) * phi_derivative(quantity, groups.a, 1.0)
        by_a += groups.spread(of_nothing) * phi_derivative(quantity, groups.a, 0.0)
    if no_tp:
        slope_of_excess = phi_derivative(quantity, groups.a * groups.a, 0.0) * groups.a
        by_a += groups.spread(excess) * slope_of_excess.masked_fill(groups.y, 0.0)
    by_voxel = by_a.numpy()[read.group] if groups.hard else by_a.numpy()
    values = torch.from_numpy(x.numpy().reshape(-1)[read.voxels])
    on_top += by_voxel * slope(values, activation).numpy()
    grad.numpy().reshape(-1)[read.voxels] += on_top
    return grad
