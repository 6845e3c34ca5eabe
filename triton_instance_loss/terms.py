"""The terms of the family, SPEC section 4, and their gradients, SPEC section 5, from sums over instances.

Everything is linear in what the criteria give, and those are ratios of linear functions. So numbers describe what is
wanted, one operator evaluates all terms and their derivatives by the sums, and a second one turns gradients of terms
into the gradient of a volume. A sample without usable outputs, or without labels, has one row on that side: the
criterion on the whole sample, in row 0.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, quantities
from .activation import activation_of
from .criteria import FusedCriterion
from .instances import Search
from .options import Options, of_volume
from .ratios import describe

TERMS = (
    "pixel",
    "instance_label",
    "instance_output",
    "center",
    "false_instances",
    "missed_instances",
    "proximity",
)
# A criterion that changes at each call makes requests of which none comes again.
MOST_REQUESTS = 64
# How many of its tensors an operator's backward wants to see again.
KEPT_TENSORS = 4
_OF_INSTANCES = {"instance_label", "instance_output", "proximity"}


@dataclass(frozen=True)
class Request:
    """What is wanted of one pass, in the words of the operators; all of it is known before any volume is."""

    names: tuple[str, ...]
    wants_instances: bool  # the criterion of each instance is needed
    activation: int
    pixel: int  # what the pixel term sees
    pixel_quantity: int
    quantity: int  # what is summed over instances
    no_tp: bool
    planar: bool
    offset: float | None  # of centre boxes; None: no center
    spacing: tuple[float, ...]  # of a volume
    criteria: tuple[float, ...]
    classes: int  # that the samples of a volume belong to, in turns
    reduction: int
    rates: bool
    surrogate: bool
    flows: bool  # as published, a hard activated output passes no gradient on
    mistakes: int


def request(
    names: tuple[str, ...],
    options: Options,
    pixel: int,
    forms: tuple[FusedCriterion | None, FusedCriterion | None, FusedCriterion | None],
) -> Request:
    """What the terms `names` want, of what the pixel term sees and of fused criteria; without one, values are given.

    Kept with the options, and the criteria with it, so that each is known by its place in memory.
    """
    if torch.compiler.is_compiling():
        return _request(names, options, pixel, *forms)
    kept = options.__dict__.setdefault("_requests", {})
    key = names, pixel, *map(id, forms)
    if key not in kept:
        if len(kept) >= MOST_REQUESTS:
            kept.clear()
        kept[key] = _request(names, options, pixel, *forms), forms
    wanted: Request = kept[key][0]
    return wanted


def _request(
    names: tuple[str, ...],
    options: Options,
    pixel: int,
    pixel_form: FusedCriterion | None,
    instance_form: FusedCriterion | None,
    center_form: FusedCriterion | None,
) -> Request:
    wants_instances = not _OF_INSTANCES.isdisjoint(names)
    fused = (
        pixel_form if "pixel" in names else None,
        instance_form if wants_instances else None,
        center_form if "center" in names else None,
    )
    reduction = ops.BY_MEAN if options.reduce_segmentation == "mean" else ops.BY_SUM
    mistakes = ops.OF_LOGARITHM if options.gradients == "log" and options.hard else ops.OF_MEAN
    return Request(
        names,
        wants_instances,
        activation_of(options)[0],
        pixel if "pixel" in names else ops.NOT_FUSED,
        quantities.MASS if pixel_form is None else pixel_form.code,
        quantities.MASS if instance_form is None else instance_form.code,
        options.instance_wise_loss_no_tp,
        options.spatial_dims == 2,
        float(options.centroid_offset) if "center" in names else None,
        of_volume(options.spacing, options.spatial_dims),
        describe(*fused, options.smoother),
        len(options.classes),
        ops.BY_INSTANCE if options.instance_wise_reduce == "instance" else reduction,
        options.rate_instead_number,
        options.surrogate,
        options.surrogate or not options.hard,
        mistakes if options.surrogate else ops.NO_GRADIENT,
    )


class OnceDifferentiable(torch.autograd.Function):
    """A gradient that raises when it is differentiated; torch's `once_differentiable` looks at what flows in alone."""

    @staticmethod
    def forward(grad: Tensor, carrier: Tensor) -> Tensor:
        """The gradient; `carrier` connects it to the graph."""
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """There is nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """There is no second derivative."""
        raise RuntimeError("trying to differentiate twice a loss that has a first derivative only")


class FusedTerms(torch.autograd.Function):
    """The terms of a request as a function of the volume that gradients flow into, and of values that are given.

    Of what was found or, without that, of what there is to be found.
    """

    @staticmethod
    def forward(
        carrier: Tensor,
        values: Tensor | None,
        x: Tensor | None,
        labels: Tensor,
        wanted: Request,
        weights: tuple[float, ...],
        how: Search,
        where: Tensor | None,
        which: Tensor | None,
        counts: Tensor | None,
        geometry: Tensor | None,
        pixel_sums: Tensor | None,
        health: Tensor | None,
        totals: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """All terms, (7,), 0 where not wanted, and their sum with weights; and what the backward wants to know.

        With weights, the sum alone is differentiable. x is None where it is the carrier; what comes after `how` is None
        if nothing was found before.
        """
        evaluation = (
            wanted.quantity,
            wanted.no_tp,
            how.pairs,
            wanted.planar,
            wanted.offset,
            wanted.spacing,
            "proximity" in wanted.names,
            wanted.criteria,
            wanted.classes,
            wanted.reduction,
            wanted.rates,
        )
        volume = carrier if x is None else x
        if counts is None:
            search = volume, labels, how.ids, weights, *how.options
            terms, total, kept, sites, counts = ops.find_and_evaluate(*search, *evaluation)
            return terms, total, *kept, *sites, counts
        tables = volume, [where, which], counts, geometry, pixel_sums, health
        given = None if values is None else values.double(), totals
        terms, total, kept = ops.evaluate(*tables, *given, weights, wanted.activation, *evaluation)
        return terms, total, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward wants to know."""
        carrier, values, x, labels, ctx.wanted, ctx.weights, _, *sites_and_counts, _, _, _, _ = inputs
        terms, _, *made = output
        if sites_and_counts[0] is None:
            sites_and_counts = made[KEPT_TENSORS:]
        ctx.values_type = None if values is None else values.dtype
        # (who wants the sum has nothing flow into the terms)
        ctx.mark_non_differentiable(*made, *([terms] if ctx.weights else []))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(carrier, carrier if x is None else x, labels, *sites_and_counts, *made[:KEPT_TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of the volume and of the values that were given."""
        of_terms, of_total, *_ = grads
        if of_terms is None and (of_total is None or not ctx.weights):
            return (None,) * 14
        carrier, x, labels, where, which, counts, *kept = ctx.saved_tensors
        wanted: Request = ctx.wanted
        with_graph = torch.is_grad_enabled()  # a graph of the backward was asked for
        with torch.no_grad() if with_graph else contextlib.nullcontext():
            grad_x, grad_values = ops.evaluate_backward(
                x,
                labels,
                [where, which],
                counts,
                kept,
                None if of_terms is None else of_terms.contiguous(),
                of_total if ctx.weights else None,
                ctx.weights,
                wanted.activation,
                wanted.quantity,
                wanted.no_tp,
                ops.NOT_FUSED if wanted.pixel == ops.HARD and not wanted.flows else wanted.pixel,
                wanted.pixel_quantity,
                wanted.surrogate,
                wanted.flows,
                wanted.mistakes,
                ctx.values_type is not None,
            )
            of_values = None if ctx.values_type is None else grad_values.to(ctx.values_type)
        if with_graph:
            grad_x = OnceDifferentiable.apply(grad_x, carrier)  # type: ignore[no-untyped-call]
            if of_values is not None:
                of_values = OnceDifferentiable.apply(of_values, carrier)  # type: ignore[no-untyped-call]
        return (grad_x, of_values, *(None,) * 12)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """`function.apply`, without looking its signature up at each call where nothing asks for that."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)  # type: ignore[no-any-return]
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc, no-any-return]
