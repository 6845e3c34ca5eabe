"""The terms of what was found, and their gradient: `evaluate`, `find_and_evaluate` and their backward of ops.py.

They are made of launches of other rooms, one after the other.
"""

from typing import Any

from torch import Tensor

from .. import ops
from ..ratios import numbers
from .instances import launch_find
from .prepare import prepare
from .tables import launch_sum_instances_backward, sum_instances
from .terms import launch_terms
from .terms_backward import launch_terms_backward


def launch_evaluate(
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
    """Terms, their sum with weights, and what the backward wants."""
    batch, *shape = x.shape
    reach = None if offset is None else ops.reach_of_boxes(shape, planar, offset, spacing)
    steps = spacing if proximity else None
    tables, owned, distances = prepare(geometry, counts, pairs, sites[1].shape[1], shape, reach, planar, steps)
    sample_sums = sum_instances(tables, x, sites, counts, geometry, activation, quantity, no_tp)
    of_criteria = numbers(tuple(criteria), shape[0] * shape[1] * shape[2], batch, classes)
    results = tables.sums, sample_sums, pixel_sums, health, counts, geometry, owned, distances, values, totals
    touching, finished = [tables.pairs, tables.touched], tables.finished
    del tables  # the excess goes before the slopes come
    terms, total, *slopes = launch_terms(
        *results, of_criteria, classes, reduction, rates, tuple(weights), x.dtype, finished
    )
    return terms, total, [*slopes, *touching]


def launch_find_and_evaluate(
    x: Tensor, labels: Tensor, ids: Tensor | None, weights: list[float], *options: Any
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """Terms, their sum with weights, what the backward wants, sites and counts."""
    return ops.find_then_evaluate(launch_find, launch_evaluate, x, labels, ids, weights, *options)


def launch_evaluate_backward(
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
    """Gradients of z and of the values of the criterion."""
    slopes, of_samples, pairs, touched = kept
    each, *grads = launch_terms_backward(
        grad_terms, grad_sum, tuple(weights), slopes, of_samples, pairs, counts, masses, flows
    )
    where = x, labels, sites, touched, counts
    grad_x = launch_sum_instances_backward(
        each, slopes, *grads, *where, activation, quantity, no_tp, pixel, pixel_quantity, mistakes
    )
    return grad_x, ops.gradient_of_values(each, slopes, of_samples, counts) if values else slopes.new_empty(0)
