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
from .activation import Indices, pixel_gradient, slope
from .instances import LAB, OUT, Sites, row_maps


class _Pairs:
    """The sites, gathered by the pair (output row, label row) that they belong to; 0 = none.

    All voxels of a pair go the same way, so voxels are summed by pair, and the few pairs are sorted into the tables.
    """

    def __init__(self, x: Tensor, sites: Sites, activation: int) -> None:
        self.voxels = sites.voxels
        volume = x[0].numel()
        rows = (int(sites.out.max(initial=0)) + 1, int(sites.lab.max(initial=0)) + 1)
        key = sites.out * rows[1] + sites.lab
        if len(x) > 1:
            key += self.voxels // volume * (rows[0] * rows[1])
        if len(x) * rows[0] * rows[1] <= len(key):
            self.of_voxel, pairs = key, np.arange(len(x) * rows[0] * rows[1])
        else:
            pairs, self.of_voxel = np.unique(key, return_inverse=True)
        sample_out, self.lab = np.divmod(pairs, rows[1])
        self.sample, self.out = np.divmod(sample_out, rows[0])
        self.sizes = np.bincount(self.of_voxel, minlength=len(pairs))
        is_output = (sites.bits & OUT) != 0
        values = x.numpy().reshape(-1)[self.voxels] if activation == NONE else is_output.astype(np.float32)
        self.a = torch.from_numpy(values)
        self.y = torch.from_numpy((sites.bits & LAB) != 0)

    def kept(self, kept: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which pairs lie inside a kept output."""
        inside: NDArray[np.bool_] = (self.out > 0) & (self.out <= kept[self.sample])
        return inside

    def sum(self, values: Tensor) -> NDArray[Any]:
        """Sum the values of the voxels of each pair."""
        sums: NDArray[Any] = np.bincount(self.of_voxel, weights=values.numpy(), minlength=len(self.sizes))
        return sums

    def met(self, kept: NDArray[np.int32]) -> Indices:
        """The pairs of a kept output and a label that touch."""
        return np.flatnonzero(self.kept(kept) & (self.lab > 0) & (self.sizes > 0))

    def by_row(self, side: Indices, values: NDArray[Any], capacity: int, batch: int) -> NDArray[np.float64]:
        """Values of pairs, summed over each row of one side, (B, capacity); pairs without a row there are left out."""
        at = self.sample * (capacity + 1) + side
        sums: NDArray[Any] = np.bincount(at, weights=values, minlength=batch * (capacity + 1))
        return sums.reshape(batch, capacity + 1)[:, 1:]

    def gather(self, side: Indices, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each pair, its row of `table` (B, capacity, columns), zeros where it has none: (columns, pairs)."""
        batch, capacity, columns = table.shape
        padded = np.zeros((batch, capacity + 1, columns))
        padded[:, 1:] = table
        gathered: NDArray[np.float64] = padded[self.sample, side].T
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
    read = Sites.read(sites[0])
    pairs, kept = _Pairs(x, read, activation), counts[KEPT].numpy()
    batch, capacity = len(x), geometry.shape[1]
    inside, on_label = pairs.kept(kept), pairs.lab > 0
    mass = pairs.sum(pairs.a)
    if quantity == quantities.MASS:  # phi is a itself
        at_nothing = at_label = mass
    else:
        at_nothing = pairs.sum(phi(quantity, pairs.a, 0.0))
        at_label = pairs.sum(phi(quantity, pairs.a, 1.0))
    if no_tp:
        excess = pairs.sum(phi(quantity, pairs.a * pairs.a, 0.0).masked_fill(pairs.y, 0.0))
        cost = at_label
    else:
        excess = at_nothing
        cost = at_label - at_nothing
    met = pairs.met(kept)
    sizes = np.zeros(len(mass))
    sizes[met] = geometry.numpy()[batch + pairs.sample[met], pairs.lab[met] - 1, SIZE]
    brought = np.zeros(len(mass))
    brought[met] = pairs.by_row(pairs.out, excess, capacity, batch)[pairs.sample[met], pairs.out[met] - 1]
    out_columns = {
        MASS: mass,
        INTERSECTION: np.where(on_label, mass, 0.0),
        COST: np.where(on_label, at_label, at_nothing),
        LABEL: sizes,
        OVERLAP: np.where(on_label, pairs.sizes, 0),
    }
    lab_columns = {
        MASS: mass,
        INTERSECTION: np.where(inside, mass, 0.0),
        COST: np.where(inside, cost, 0.0) + brought,
        TOUCHED: np.where(pairs.out > 0, pairs.sizes, 0),
        OVERLAP: np.where(inside, pairs.sizes, 0),
    }

    sums = np.empty((2 * batch, capacity, SUMS_COLUMNS))
    for column in range(SUMS_COLUMNS):
        sums[:batch, :, column] = pairs.by_row(pairs.out, out_columns[column], capacity, batch)
        sums[batch:, :, column] = pairs.by_row(pairs.lab, lab_columns[column], capacity, batch)
    sample_sums = _sample_sums(x, read, pairs, activation, quantity)
    # The backward makes the pairs anew.
    return torch.from_numpy(sums), sample_sums, torch.empty((batch, 0), dtype=torch.int64)


def _sample_sums(x: Tensor, sites: Sites, pairs: _Pairs, activation: int, quantity: int) -> Tensor:
    """Sums of a * y, phi(a, y) and y over each sample."""
    sums = torch.zeros((len(x), SAMPLE_COLUMNS), dtype=torch.float64)
    sample = torch.from_numpy(sites.voxels // x[0].numel())
    a, truth = pairs.a.double(), pairs.y.double()
    cost = phi(quantity, a, truth)
    if activation == NONE:  # elsewhere a is not 0
        sums[:, 1] = phi(quantity, x, 0.0).sum(-1, dtype=torch.float64).sum((1, 2))
        cost = cost - phi(quantity, a, 0.0)
    for column, values in enumerate((a * truth, cost, truth)):
        sums[:, column].index_add_(0, sample, values)
    return sums


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
    read = Sites.read(sites[0])
    grad = pixel_gradient(grad_pixel_sums, x, read.foreground(labels), activation, pixel, pixel_quantity)
    if bool(grad_sample_sums.any()):
        _, y, _, _ = maps = row_maps(x, sites)
        a = x if activation == NONE else maps[0].to(x.dtype)
        by_intersection, by_cost = grad_sample_sums.view(len(x), SAMPLE_GRADIENT_COLUMNS, 1, 1, 1).unbind(1)
        by_whole = by_intersection * y + by_cost * phi_derivative(quantity, a, y.to(x.dtype))
        # Other samples are left out: zero times a slope that is not finite would be NaN.
        some = grad_sample_sums.any(1)
        grad[some] += (by_whole * slope(x, activation))[some].to(x.dtype)

    groups, kept = _Pairs(x, read, activation), counts[KEPT].numpy()
    inside, on_label = groups.kept(kept), groups.lab > 0
    out, lab = (
        groups.gather(*side) for side in zip((groups.out, groups.lab), np.split(grad_sums.numpy(), 2), strict=True)
    )
    # What each pair multiplies 1, phi'(a, 1), phi'(a, 0) and the derivative of the excess by.
    cost = np.where(inside, lab[COST], 0.0)
    constant = out[MASS] + lab[MASS] + np.where(on_label, out[INTERSECTION], 0.0)
    constant += np.where(inside, lab[INTERSECTION], 0.0)
    of_label = np.where(on_label, out[COST], 0.0) + cost
    of_nothing = np.where(on_label, 0.0, out[COST])
    met = groups.met(kept)
    brought = np.zeros(len(cost))
    brought[met] = lab[COST][met]
    brought = groups.by_row(groups.out, brought, grad_sums.shape[1], len(x))[:, :, None]
    (excess,) = groups.gather(groups.out, brought)
    if not no_tp:
        of_nothing += excess - cost

    if quantity == quantities.MASS:  # both derivatives are 1
        by_a = torch.from_numpy((constant + of_label + of_nothing)[groups.of_voxel])
    else:
        by_a = torch.from_numpy(constant[groups.of_voxel])
        by_a += torch.from_numpy(of_label[groups.of_voxel]) * phi_derivative(quantity, groups.a, 1.0)
        by_a += torch.from_numpy(of_nothing[groups.of_voxel]) * phi_derivative(quantity, groups.a, 0.0)
    if no_tp:
        slope_of_excess = phi_derivative(quantity, groups.a * groups.a, 0.0) * groups.a
        by_a += torch.from_numpy(excess[groups.of_voxel]) * slope_of_excess.masked_fill(groups.y, 0.0)
    by_a *= slope(torch.from_numpy(x.numpy().reshape(-1)[groups.voxels]), activation)
    grad.numpy().reshape(-1)[groups.voxels] += by_a.numpy()
    return grad
