"""The terms of what was found, and their gradient: `evaluate` and its backward of ops.py.

They are made of launches of other rooms, one after the other.
"""

import torch
from torch import Tensor

from .. import ops
from ..ratios import numbers
from .rows import launch_rows
from .tables import add_to_rows, launch_sum_instances_backward
from .terms import add_up, launch_terms_backward


def launch_evaluate(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    pixel_sums: Tensor,
    health: Tensor,
    values: Tensor | None,
    totals: Tensor | None,
    activation: int,
    quantity: int,
    no_tp: bool,
    pairs: int,
    planar: bool,
    offset: float | None,
    proximity: bool,
    criteria: list[float],
    weights: list[float],
    classes: int,
    reduction: int,
    rates: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Terms, their sum with weights, and what the backward wants."""
    batch, *shape = x.shape
    offsets = None if offset is None else ops.reach_of_boxes(shape, planar, offset)
    cleared, owned, distances = launch_rows(
        geometry, counts, shape, pairs, sites[1].shape[1], offsets, proximity, planar
    )
    sample_sums = add_to_rows(cleared, x, sites, counts, geometry, activation, quantity, no_tp)
    sums, _, *touching, arrived = cleared
    of_criteria = numbers(tuple(criteria), shape[0] * shape[1] * shape[2], batch, classes)
    results = sums, sample_sums, pixel_sums, health, counts, geometry, owned, distances, values, totals
    terms, total, *slopes = add_up(results, of_criteria, tuple(weights), x.dtype, classes, reduction, rates, arrived)
    return terms, total, [*slopes, *touching]


def launch_evaluate_backward(
    grad_terms: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    kept: list[Tensor],
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
    """Gradients of z and of the values of the criterion."""
    slopes, of_samples, pairs, touched = kept
    of_terms = grad_terms, grad_sum, tuple(weights)
    of_mistakes, *grads = launch_terms_backward(*of_terms, slopes, of_samples, counts, pairs, masses, flows, mistakes)
    where = x, labels, sites, touched, counts
    grad_x = launch_sum_instances_backward(
        of_mistakes, slopes, *grads, *where, activation, quantity, no_tp, pixel, pixel_quantity, mistakes
    )
    if not values:
        return grad_x, slopes.new_empty(0)
    grad = slopes.new_zeros(ops.PROXIMITY + 1)
    if grad_terms is not None:
        grad += grad_terms
    if grad_sum is not None:
        grad += grad_sum * torch.tensor(weights, dtype=grad.dtype, device=grad.device)
    return grad_x, ops.gradient_of_values(grad, slopes, of_samples, counts)
