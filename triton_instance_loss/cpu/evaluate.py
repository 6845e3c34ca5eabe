"""The terms of what was found, and their gradient, on the CPU: `evaluate`, `find_and_evaluate` and their backward."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ratios import numbers
from .centers import center_overlaps
from .instances import find
from .proximity import proximity_minima
from .tables import sum_instances, sum_instances_backward
from .terms import terms, terms_backward


def evaluate(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    pixel_sums: Tensor,
    health: Tensor,
    values: Tensor | None,
    totals: Tensor | None,
    weights: list[float],
    activation: int,
    quantity: int,
    no_tp: bool,
    pairs: int,
    planar: bool,
    offset: float | None,
    spacing: list[float],
    proximity: bool,
    criteria: list[float],
    classes: int,
    reduction: int,
    rates: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Operator `evaluate` (ops.py)."""
    batch, *shape = x.shape
    sums, sample_sums, *touching = sum_instances(x, sites, counts, geometry, activation, quantity, no_tp, pairs)
    owned = distances = None
    if offset is not None:
        owned = center_overlaps(geometry, counts, shape, ops.reach_of_boxes(shape, planar, offset, spacing))
    if proximity:
        distances = proximity_minima(geometry, counts, shape, planar, spacing)
    of_criteria = list(numbers(tuple(criteria), x[0].numel(), batch, classes))
    results = sums, sample_sums, pixel_sums, health, counts, geometry, owned, distances, values, totals, of_criteria
    all_terms, slopes, of_samples = terms(*results, classes, reduction, rates)
    total = torch.dot(all_terms, all_terms.new_tensor(weights or [0.0] * len(all_terms)))
    return all_terms.to(x.dtype), total.to(x.dtype), [slopes, of_samples, *touching]


def find_and_evaluate(
    x: Tensor, labels: Tensor, ids: Tensor | None, weights: list[float], *options: Any
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """Operator `find_and_evaluate` (ops.py)."""
    return ops.find_then_evaluate(find, evaluate, x, labels, ids, weights, *options)


def evaluate_backward(
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    kept: list[Tensor],
    grad_terms: Tensor | None,
    grad_sum: Tensor | None,
    weights: list[float],
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
    masses: bool,
    flows: bool,
    mistakes: int,
    values: bool,
) -> tuple[Tensor, Tensor]:
    """Operator `evaluate_backward` (ops.py)."""
    slopes, of_samples, pairs, touched = kept
    grad = slopes.new_zeros(ops.PROXIMITY + 1)
    if grad_terms is not None:
        grad += grad_terms
    if grad_sum is not None:
        grad += grad_sum * grad.new_tensor(weights)
    grads = terms_backward(grad, slopes, of_samples, counts, masses, flows)
    grad_x = sum_instances_backward(
        grad, slopes, *grads, x, labels, sites, pairs, touched, counts, activation, quantity, no_tp, pixel,
        pixel_quantity, mistakes,
    )  # fmt: skip
    return grad_x, ops.gradient_of_values(grad, slopes, of_samples, counts) if values else slopes.new_empty(0)
