"""The terms of the family, SPEC section 4, and their gradients, SPEC section 5, as functions of tables.

A table is (B, rows) float64, one row an instance; masks keep unused rows out, so that no shape depends on how many
instances there are. A sample without usable outputs, or without labels, has one row on that side: the criterion on the
whole sample, in row 0. Everything is linear in what the criteria give, and those are ratios of linear functions, so the
derivatives are written out here; autograd would take several times as many operations.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, quantities
from .activation import activation_of
from .criteria import FusedCriterion
from .instances import Found, first_rows
from .options import Options

TERMS = (
    "pixel",
    "instance_label",
    "instance_output",
    "center",
    "false_instances",
    "missed_instances",
    "proximity",
)


@dataclass(frozen=True)
class Request:
    """What is wanted of one pass: the terms, in the order of TERMS, and the criteria behind them."""

    names: tuple[str, ...]
    options: Options
    pixel: int  # code of ops.py: what the pixel term sees
    pixel_form: FusedCriterion | None  # None, if the term is not among them
    instance_form: FusedCriterion | None  # None: values are given
    center_form: FusedCriterion | None  # None, if the term is not among them
    pair_capacity: int

    @property
    def wants_instances(self) -> bool:
        """Whether the criterion of each instance is needed."""
        return not {"instance_label", "instance_output", "proximity"}.isdisjoint(self.names)

    @property
    def quantity(self) -> int:
        """Code of the quantity that is summed over instances."""
        return quantities.MASS if self.instance_form is None else self.instance_form.code

    @property
    def pixel_quantity(self) -> int:
        """Code of the quantity that is summed for the pixel term."""
        return quantities.MASS if self.pixel_form is None else self.pixel_form.code


class Sums(NamedTuple):
    """Results of the operator `sum_instances`."""

    out: Tensor  # (B, output rows, 5)
    lab: Tensor  # (B, label rows, 5)
    sample: Tensor  # (B, 3)
    pairs: Tensor  # (B, slots) int64


class Slopes(NamedTuple):
    """Derivatives of a criterion by intersection and by prediction, of the rows of one table."""

    intersection: Tensor
    prediction: Tensor


def value_and_slopes(
    form: FusedCriterion,
    voxels: int,
    intersection: Tensor,
    prediction: Tensor,
    label: Tensor,
    used: Tensor | None = None,
) -> tuple[Tensor, Slopes]:
    """A criterion from sums, elementwise, and its derivatives; 0 in rows that are not used."""
    ratio = form.ratio(voxels)
    below = ratio.below(intersection, prediction, label)
    above = ratio.above(intersection, prediction, label)
    if used is not None:
        # No division by the zeros of unused rows.
        below, above = torch.where(used, below, 1.0), torch.where(used, above, 0.0)
    value, scale = above / below, 1.0 / below
    if used is not None:
        scale = torch.where(used, scale, 0.0)
    by_intersection = (ratio.intersection - value * ratio.intersection_below) * scale
    by_prediction = (ratio.prediction - value * ratio.prediction_below) * scale
    return value, Slopes(by_intersection, by_prediction)


# --- the criterion of each instance -----------------------------------------------------------------------------------


class Values(NamedTuple):
    """The criterion of each label and each kept output, and of whole samples; unused rows are 0."""

    labels: Tensor  # (B, label rows)
    outputs: Tensor  # (B, output rows)
    slopes: tuple[Slopes, Slopes, Slopes] | None  # of labels, outputs and (B, 1) whole samples; None: values are given


def instance_values(found: Found, sums: Sums, form: FusedCriterion, voxels: int) -> Values:
    """SPEC section 6: everything is sums. Labels, outputs and whole samples are evaluated as rows of one table."""
    rows = sums.lab.shape[1], sums.out.shape[1], 1
    is_label, is_kept = first_rows(found.num_labels, rows[0]), first_rows(found.kept, rows[1])
    sizes = found.lab_geometry[..., ops.SIZE].double()
    # Label mass of each output, and what its outputs bring into each label.
    touched = ops.sum_neighbours(sizes, sums.pairs, False, rows[1])
    excess = ops.sum_neighbours(sums.out[..., ops.EXCESS].contiguous(), sums.pairs, True, rows[0])
    in_labels = sums.lab[..., ops.COST] + excess
    in_outputs = sums.out[..., ops.COST]
    missing = quantities.UNPREDICTED[form.code]
    if missing:
        in_labels = in_labels + missing * (sizes - sums.lab[..., ops.OVERLAP])
        in_outputs = in_outputs + missing * (touched - sums.out[..., ops.OVERLAP])
    intersection, prediction, label = sums.sample.unsqueeze(1).unbind(2)
    intersection = torch.cat((sums.lab[..., ops.INTERSECTION], sums.out[..., ops.INTERSECTION], intersection), 1)
    prediction = torch.cat((in_labels, in_outputs, prediction), 1)
    label = torch.cat((sizes, touched, label), 1)
    alone = ~(is_label[:, :1] & is_kept[:, :1])
    used = torch.cat((is_label, is_kept, alone), 1)
    value, slopes = value_and_slopes(form, voxels, intersection, prediction, label, used)
    labels, outputs, whole = value.split(rows, 1)
    by = [Slopes(*parts) for parts in zip(slopes[0].split(rows, 1), slopes[1].split(rows, 1), strict=True)]
    return Values(_with_whole(labels, is_label, whole), _with_whole(outputs, is_kept, whole), (by[0], by[1], by[2]))


def _with_whole(values: Tensor, rows: Tensor, whole: Tensor) -> Tensor:
    """Values with that of the whole sample in row 0 where a sample has no row."""
    return torch.cat((torch.where(rows[:, :1], values[:, :1], whole), values[:, 1:]), 1)


def weights(counts: Tensor, options: Options) -> Tensor:
    """(B,) -> (B, 1): what each row of a sample adds to its reduction; a sample without instances has one row."""
    counts = counts.clamp(min=1).double()[:, None]
    if options.instance_wise_reduce == "instance":
        return (1.0 / counts.sum()).expand_as(counts)
    each = 1.0 / counts if options.reduce_segmentation == "mean" else torch.ones_like(counts)
    return each / counts.shape[0]


# --- counts, centres, distances ---------------------------------------------------------------------------------------


def _per_voxel(geometry: Tensor) -> Tensor:
    """(B, rows): one over the size of each instance, the derivative of the mean of a over it."""
    return 1.0 / geometry[..., ops.SIZE].clamp(min=1).double()


def _share(counts: Tensor, options: Options) -> Tensor:
    """(B,): what one instance of each sample adds to a count or rate, a mean over samples."""
    total = counts.double() + options.smoother if options.rate_instead_number else torch.ones_like(counts).double()
    return 1.0 / (total * counts.shape[0])


def false_instances(found: Found, sums: Sums, options: Options) -> tuple[Tensor, Tensor]:
    """Outputs that are not correct; and the derivative by their mass, of all that touch no label."""
    rows = sums.out.shape[1]
    touches = sums.out[..., ops.OVERLAP] > 0
    correct = (touches & first_rows(found.kept, rows)).sum(1)
    share = _share(found.num_outputs, options)
    false = first_rows(found.num_outputs, rows) & ~touches
    slope = torch.where(false, share[:, None] * _per_voxel(found.out_geometry), 0.0)
    return (share * (found.num_outputs - correct)).sum(), slope


def missed_instances(found: Found, sums: Sums, options: Options) -> tuple[Tensor, Tensor]:
    """Labels that no kept output touches; and the derivative by their mass, of all that no output touches."""
    detected = (sums.lab[..., ops.OVERLAP] > 0).sum(1)
    share = _share(found.num_labels, options)
    missed = first_rows(found.num_labels, sums.lab.shape[1]) & (sums.lab[..., ops.TOUCHED] == 0)
    slope = torch.where(missed, -share[:, None] * _per_voxel(found.lab_geometry), 0.0)
    return (share * (found.num_labels - detected)).sum(), slope


def place_of_centers(shape: torch.Size, options: Options) -> tuple[list[int], list[int]]:
    """Spatial shape (D, H, W), and how far a centre box reaches along each axis."""
    size = list(shape[1:])
    # An image is a volume of one plane, which any reach of at least one covers.
    spatial = size if options.spatial_dims == 3 else size[1:]
    offsets = [math.ceil(length / max(spatial) * options.centroid_offset) for length in spatial]
    return size, offsets if options.spatial_dims == 3 else [1, *offsets]


def center(found: Found, form: FusedCriterion, shape: torch.Size, options: Options) -> tuple[Tensor, Tensor]:
    """The criterion on the centre boxes; and the derivative by the mass of each output, through its box's height."""
    place = place_of_centers(shape, options)
    owned, alone = ops.center_overlaps(found.out_geometry, found.lab_geometry, found.kept, found.num_labels, *place)
    outside, inside = owned.double().unbind(-1)
    alone = alone.double()
    height = torch.full((), 1.0 + options.smoother, dtype=torch.float64, device=owned.device)
    peak, code = 1.0 + options.smoother, form.code
    prediction = quantities.phi(code, height, peak) * inside.sum(1) + quantities.phi(code, height, 0.0) * outside.sum(1)
    prediction = prediction + quantities.phi(code, torch.zeros_like(height), peak) * alone
    label = quantities.truth(code, peak) * (inside.sum(1) + alone)
    intersection = peak * peak * inside.sum(1)
    value, slopes = value_and_slopes(form, math.prod(place[0]), intersection, prediction, label)
    at_label, at_nothing = (quantities.phi_derivative(code, height, w) for w in (peak, 0.0))
    by_height = slopes.intersection[:, None] * peak * inside
    by_height = by_height + slopes.prediction[:, None] * (at_label * inside + at_nothing * outside)
    return value.mean(), by_height * _per_voxel(found.out_geometry) / owned.shape[0]


class Distances(NamedTuple):
    """Proximity and its derivative by the values of labels and of outputs."""

    value: Tensor
    by_labels: Tensor  # (B, label rows)
    by_outputs: Tensor  # (B, output rows)


def proximity(found: Found, values: Values, shape: torch.Size, options: Options) -> Distances:
    """Squared difference of the instance values of labels and outputs, each weighted by its distance to the nearest."""
    for_outputs, for_labels = ops.proximity_minima(
        found.out_geometry,
        found.lab_geometry,
        found.kept,
        found.num_labels,
        list(shape[1:]),
        options.spatial_dims == 2,
    )
    for_outputs, for_labels = for_outputs[:, : values.outputs.shape[1]], for_labels[:, : values.labels.shape[1]]
    difference = (for_labels * values.labels).sum(1) - (for_outputs * values.outputs).sum(1)
    slope = (2.0 / len(difference)) * difference[:, None]
    value = (difference**2 + torch.where(found.too_many, found.num_outputs, 0)).mean()
    return Distances(value, slope * for_labels, -slope * for_outputs)


# --- together, with their gradient ------------------------------------------------------------------------------------


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient that raises when it is differentiated; torch's `once_differentiable` looks at what flows in alone."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient; `x` connects it to the graph."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """There is no second derivative."""
        raise RuntimeError("trying to differentiate twice a loss that has a first derivative only")


class FusedTerms(torch.autograd.Function):
    """The terms of a request as a function of the volume that is activated, and of values that are given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        label_values: Tensor | None,
        output_values: Tensor | None,
        labels: Tensor,
        pixel_sums: Tensor,
        health: Tensor,
        request: Request,
        *tensors: Tensor,
    ) -> Tensor:
        """The terms, (number of names,) float64; `tensors` are those of `Found`, its sites last."""
        options, names = request.options, request.names
        rest = len(Found._fields) - 1
        found = Found(tensors[rest:], *tensors[:rest])
        capacities = found.out_geometry.shape[1], found.lab_geometry.shape[1], request.pair_capacity
        sums = Sums(
            *ops.sum_instances(
                x,
                found.sites,
                found.kept,
                activation_of(options)[0],
                request.quantity,
                options.instance_wise_loss_no_tp,
                *capacities,
            )
        )
        terms: dict[str, Tensor] = {}
        saved: dict[str, Tensor] = {"health": health}
        if "pixel" in names:
            assert request.pixel_form is not None
            value, slopes = value_and_slopes(
                request.pixel_form, x[0].numel(), *(column for column in pixel_sums.unbind(1))
            )
            share = 1.0 / len(value) if request.pixel_form.batch == "mean" else 1.0
            terms["pixel"] = value.sum() * share
            saved["pixel"] = torch.stack((*slopes, torch.zeros_like(value)), 1) * share
        if request.wants_instances:
            if request.instance_form is None:
                assert label_values is not None
                assert output_values is not None
                values = Values(label_values.double(), output_values.double(), None)
            else:
                values = instance_values(found, sums, request.instance_form, x[0].numel())
                assert values.slopes is not None
                for side, slope in zip(("label", "output", "whole"), values.slopes, strict=True):
                    saved[f"{side}_by_intersection"], saved[f"{side}_by_prediction"] = slope
                saved["pairs"] = sums.pairs
            if "instance_label" in names:
                saved["instance_label"] = weights(found.num_labels, options)
                terms["instance_label"] = (saved["instance_label"] * values.labels).sum()
            if "instance_output" in names:
                saved["instance_output"] = weights(found.kept, options)
                terms["instance_output"] = (saved["instance_output"] * values.outputs).sum()
            if "proximity" in names:
                terms["proximity"], saved["by_labels"], saved["by_outputs"] = proximity(found, values, x.shape, options)
        if "center" in names:
            assert request.center_form is not None
            terms["center"], saved["center"] = center(found, request.center_form, x.shape, options)
        if "false_instances" in names:
            terms["false_instances"], saved["false_instances"] = false_instances(found, sums, options)
        if "missed_instances" in names:
            terms["missed_instances"], saved["missed_instances"] = missed_instances(found, sums, options)
        ctx.save_for_backward(x, labels, found.kept, found.num_labels, *found.sites, *saved.values())
        ctx.names, ctx.request = tuple(saved), request
        ctx.rows = found.out_geometry.shape[1], found.lab_geometry.shape[1]
        ctx.inputs = len(tensors)
        ctx.values_shapes = [value.shape for value in (label_values, output_values) if value is not None]
        return torch.stack([terms[name] for name in names]) * health

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the volume and of the values that were given."""
        with torch.no_grad():
            grads: tuple[Tensor | None, ...] = FusedTerms._gradients(ctx, grad)
        if torch.is_grad_enabled():  # a graph of the backward was asked for
            x = ctx.saved_tensors[0]
            grads = tuple(
                None if each is None else _OnceDifferentiable.apply(each, x)  # type: ignore[no-untyped-call]
                for each in grads
            )
        return (*grads, *(None,) * (4 + ctx.inputs))

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, labels, kept, num_labels, *rest = ctx.saved_tensors
        request, sites = ctx.request, rest[: len(rest) - len(ctx.names)]
        saved = dict(zip(ctx.names, rest[len(sites) :], strict=True))
        options = request.options
        by_term = dict(zip(request.names, (grad * saved["health"]).unbind(), strict=True))

        nothing = torch.zeros((), dtype=torch.float64, device=x.device)
        of_labels, of_outputs = _gradients_of_values(by_term, saved, nothing.expand(len(x), 1))
        out: dict[int, Tensor] = {}
        lab: dict[int, Tensor] = {}
        sample = pixel = nothing.expand(len(x), ops.SAMPLE_COLUMNS)
        if "pixel" in saved and (options.surrogate or request.pixel != ops.HARD):
            pixel = by_term["pixel"] * saved["pixel"]
        if options.surrogate:
            masses = [by_term[name] * saved[name] for name in ("center", "false_instances") if name in saved]
            if masses:
                out[ops.MASS] = sum(masses[1:], masses[0])
            if "missed_instances" in saved:
                lab[ops.MASS] = by_term["missed_instances"] * saved["missed_instances"]
        if "pairs" in saved and (options.surrogate or not options.hard):
            lab[ops.INTERSECTION] = of_labels * saved["label_by_intersection"]
            lab[ops.COST] = of_labels * saved["label_by_prediction"]
            out[ops.INTERSECTION] = of_outputs * saved["output_by_intersection"]
            out[ops.COST] = of_outputs * saved["output_by_prediction"]
            out[ops.EXCESS] = ops.sum_neighbours(lab[ops.COST], saved["pairs"], False, ctx.rows[0])
            # Row 0 is the whole sample where there are no instances.
            whole = torch.where(num_labels[:, None] == 0, of_labels[:, :1], 0.0)
            whole = whole + torch.where(kept[:, None] == 0, of_outputs[:, :1], 0.0)
            by_whole = whole * saved["whole_by_intersection"], whole * saved["whole_by_prediction"]
            sample = torch.cat((*by_whole, torch.zeros_like(whole)), 1)

        def table(columns: dict[int, Tensor], rows: int) -> Tensor:
            empty = nothing.expand(len(x), rows)
            return torch.stack([columns.get(column, empty) for column in range(ops.SUMS_COLUMNS)], -1)

        grad_x = ops.sum_instances_backward(
            table(out, ctx.rows[0]),
            table(lab, ctx.rows[1]),
            sample,
            pixel,
            x,
            labels,
            sites,
            kept,
            activation_of(options)[0],
            request.quantity,
            options.instance_wise_loss_no_tp,
            request.pixel if "pixel" in saved else ops.NOT_FUSED,
            request.pixel_quantity,
        )
        if not ctx.values_shapes:
            return grad_x, None, None
        return grad_x, of_labels.expand(ctx.values_shapes[0]), of_outputs.expand(ctx.values_shapes[1])


def _gradients_of_values(
    by_term: dict[str, Tensor], saved: dict[str, Tensor], nothing: Tensor
) -> tuple[Tensor, Tensor]:
    """What flows into the values of labels and of outputs, (B, rows), or (B, 1) where all rows have the same."""
    of_labels = of_outputs = nothing
    if "instance_label" in saved:
        of_labels = by_term["instance_label"] * saved["instance_label"]
    if "instance_output" in saved:
        of_outputs = by_term["instance_output"] * saved["instance_output"]
    if "proximity" in by_term:
        of_labels = of_labels + by_term["proximity"] * saved["by_labels"]
        of_outputs = of_outputs + by_term["proximity"] * saved["by_outputs"]
    return of_labels, of_outputs
