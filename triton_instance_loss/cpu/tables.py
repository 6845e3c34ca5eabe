"""Sums over instances on the CPU: `sum_instances`, its backward, and `sum_neighbours` of ops.py."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import COST, EXCESS, INTERSECTION, MASS, OVERLAP, SAMPLE_COLUMNS, SUMS_COLUMNS, TOUCHED
from ..quantities import phi, phi_derivative


class _Foreground:
    """The voxels of one row map: where they are, and what the volumes hold there."""

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.voxels = np.flatnonzero(rows.numpy() != 0)
        self.rows = rows.numpy().reshape(-1)[self.voxels].astype(np.int64)
        self.samples = self.voxels // rows[0].numel()
        self.at = self.samples * capacity + self.rows - 1
        self.shape = (rows.shape[0], capacity)

    def take(self, volume: Tensor) -> NDArray[Any]:
        """The values of `volume` at the voxels."""
        taken: NDArray[Any] = volume.numpy().reshape(-1)[self.voxels]
        return taken

    def activated(self, a: Tensor) -> Tensor:
        """The activated outputs at the voxels, as floating-point numbers."""
        values = torch.from_numpy(self.take(a))
        return values.float() if values.dtype == torch.bool else values

    def table(self, columns: dict[int, Tensor | NDArray[Any]]) -> Tensor:
        """Sums over each instance, one column a quantity, (B, capacity, columns)."""
        size = self.shape[0] * self.shape[1]
        table = np.zeros((size, SUMS_COLUMNS))
        for column, values in columns.items():
            table[:, column] = np.bincount(self.at, weights=np.asarray(values), minlength=size)
        return torch.from_numpy(table).view(*self.shape, SUMS_COLUMNS)


def _inside_kept(lab: _Foreground, out_rows: Tensor, kept: Tensor) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """At the voxels of the labels: the output instance, and whether it is kept."""
    output = lab.take(out_rows)
    return output, (output > 0) & (output <= kept.numpy()[lab.samples])


def sum_instances(
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    out_capacity: int,
    lab_capacity: int,
    pair_capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `sum_instances` (ops.py)."""
    out = _Foreground(out_rows, out_capacity)
    values = out.activated(a)
    label = out.take(lab_rows)
    on_label = torch.from_numpy(label > 0)
    at_nothing = phi(quantity, values, 0.0)
    excess = phi(quantity, values * values, 0.0).masked_fill(torch.from_numpy(out.take(y)), 0.0)
    out_sums = out.table(
        {
            MASS: values,
            INTERSECTION: values.masked_fill(~on_label, 0.0),
            COST: torch.where(on_label, phi(quantity, values, 1.0), at_nothing),
            EXCESS: excess if no_tp else at_nothing,
            OVERLAP: on_label,
        }
    )
    pairs = _pairs(out, label, kept, pair_capacity)

    lab = _Foreground(lab_rows, lab_capacity)
    values = lab.activated(a)
    output, inside = _inside_kept(lab, out_rows, kept)
    outside = torch.from_numpy(~inside)
    cost = phi(quantity, values, 1.0) if no_tp else phi(quantity, values, 1.0) - phi(quantity, values, 0.0)
    lab_sums = lab.table(
        {
            MASS: values,
            INTERSECTION: values.masked_fill(outside, 0.0),
            COST: cost.masked_fill(outside, 0.0),
            TOUCHED: output > 0,
            OVERLAP: inside,
        }
    )
    return out_sums, lab_sums, _sample_sums(a, y, quantity), pairs


def _pairs(out: _Foreground, label: NDArray[np.int32], kept: Tensor, capacity: int) -> Tensor:
    """Each pair of a kept output and a label that share a voxel, once."""
    meet = (label > 0) & (out.rows <= kept.numpy()[out.samples])
    keys = out.rows[meet] << 32 | label[meet]
    samples = out.samples[meet]
    pairs = torch.zeros((len(kept), capacity), dtype=torch.int64)
    for sample in range(len(kept)):
        found = np.unique(keys[samples == sample])
        pairs[sample, : len(found)] = torch.from_numpy(found)
    return pairs


def _sample_sums(a: Tensor, y: Tensor, quantity: int) -> Tensor:
    """Sums of a * y, phi(a, y) and y over each sample."""
    sums = torch.zeros((a.shape[0], SAMPLE_COLUMNS), dtype=torch.float64)
    for sample, (values, truth) in enumerate(zip(a.flatten(1), y.flatten(1), strict=True)):
        labelled = np.flatnonzero(truth.numpy())
        on_label = torch.from_numpy(values.numpy()[labelled]).double()
        if a.dtype == torch.bool:
            one = torch.ones((), dtype=torch.float64)
            cost = int(np.count_nonzero(values.numpy())) * phi(quantity, one, 0.0)
        else:
            cost = phi(quantity, values, 0.0).sum(dtype=torch.float64)
        cost = cost + (phi(quantity, on_label, 1.0) - phi(quantity, on_label, 0.0)).sum()
        sums[sample, 0], sums[sample, 1], sums[sample, 2] = on_label.sum(), cost, float(len(labelled))
    return sums


def sum_instances_backward(
    grad_out_sums: Tensor,
    grad_lab_sums: Tensor,
    grad_sample_sums: Tensor,
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Operator `sum_instances_backward` (ops.py)."""
    grad = torch.zeros(a.shape, dtype=dtype)
    slopes = grad.numpy().reshape(-1)

    out = _Foreground(out_rows, grad_out_sums.shape[1])
    grads = torch.from_numpy(grad_out_sums.numpy().reshape(-1, SUMS_COLUMNS)[out.at])
    values = out.activated(a)
    on_label = torch.from_numpy(out.take(lab_rows) > 0)
    at_nothing = phi_derivative(quantity, values, 0.0)
    cost = torch.where(on_label, phi_derivative(quantity, values, 1.0), at_nothing)
    squared = phi_derivative(quantity, values * values, 0.0) * values
    excess = squared.masked_fill(torch.from_numpy(out.take(y)), 0.0) if no_tp else at_nothing
    slope = grads[:, MASS] + on_label * grads[:, INTERSECTION] + grads[:, COST] * cost + grads[:, EXCESS] * excess
    slopes[out.voxels] = slope.numpy()

    lab = _Foreground(lab_rows, grad_lab_sums.shape[1])
    grads = torch.from_numpy(grad_lab_sums.numpy().reshape(-1, SUMS_COLUMNS)[lab.at])
    values = lab.activated(a)
    _, inside = _inside_kept(lab, out_rows, kept)
    cost = phi_derivative(quantity, values, 1.0)
    if not no_tp:
        cost = cost - phi_derivative(quantity, values, 0.0)
    matched = grads[:, INTERSECTION] + grads[:, COST] * cost
    slope = grads[:, MASS] + matched.masked_fill(torch.from_numpy(~inside), 0.0)
    slopes[lab.voxels] += slope.numpy()

    for sample, (on_intersection, on_cost, _) in enumerate(grad_sample_sums.tolist()):
        if on_intersection != 0.0 or on_cost != 0.0:
            whole, truth = a[sample].to(dtype), y[sample].to(dtype)
            grad[sample] += on_intersection * truth + on_cost * phi_derivative(quantity, whole, truth)
    return grad


def sum_neighbours(values: Tensor, pairs: Tensor, to_labels: bool, capacity: int) -> Tensor:
    """Operator `sum_neighbours` (ops.py)."""
    sample, slot = pairs.nonzero(as_tuple=True)
    keys = pairs[sample, slot]
    out, lab = (keys >> 32) - 1, (keys & 0xFFFFFFFF) - 1
    source, target = (out, lab) if to_labels else (lab, out)
    sums = torch.zeros((values.shape[0], capacity), dtype=values.dtype)
    return sums.index_put_((sample, target), values[sample, source], accumulate=True)
