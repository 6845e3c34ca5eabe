"""The terms of the family, SPEC section 4, and their gradients, SPEC section 5, from sums over instances.

Everything is linear in what the criteria give, and those are ratios of linear functions. So numbers describe what is
wanted, one operator evaluates all terms and their derivatives by the sums, and a second one turns gradients of terms
into gradients of sums. A sample without usable outputs, or without labels, has one row on that side: the criterion on
the whole sample, in row 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, quantities
from .activation import activation_of
from .criteria import FusedCriterion
from .instances import first_rows
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
# A criterion that is not asked for, or whose values are given: 0 / 1, whatever the sums.
NOTHING: tuple[float, ...] = (0.0,) * 7 + (1.0,)


@dataclass(frozen=True)
class Request:
    """What is wanted of one pass: the terms, and the criteria behind them."""

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

    @property
    def reduction(self) -> int:
        """Code of the average over instances."""
        if self.options.instance_wise_reduce == "instance":
            return ops.BY_INSTANCE
        return ops.BY_MEAN if self.options.reduce_segmentation == "mean" else ops.BY_SUM

    @property
    def mistakes(self) -> int:
        """Code of the gradient of false and missed instances."""
        if not self.options.surrogate:
            return ops.NO_GRADIENT
        return ops.OF_LOGARITHM if self.options.gradients == "log" and self.options.hard else ops.OF_MEAN

    @property
    def classes(self) -> int:
        """How many classes the samples of a volume belong to, in turns."""
        return len(self.options.classes)

    def numbers(self, shape: torch.Size) -> list[float]:
        """What the operator `terms` is told of the criteria, for volumes (B, D, H, W)."""
        voxels = math.prod(shape[1:])
        pixel = instance = NOTHING
        if "pixel" in self.names:
            assert self.pixel_form is not None
            samples = shape[0] if self.pixel_form.batch == "mean" else self.classes
            pixel = self.pixel_form.ratio(voxels, 1.0 / samples)
        if self.wants_instances and self.instance_form is not None:
            instance = self.instance_form.ratio(voxels)
        center = self._center(voxels) if "center" in self.names else [*NOTHING, 0.0, 0.0, 0.0, 0.0]
        return [*pixel, *instance, quantities.UNPREDICTED[self.quantity], *center, self.options.smoother]

    def _center(self, voxels: int) -> list[float]:
        """The criterion of centre boxes as a ratio of linear functions of numbers of voxels, and by heights of boxes.

        In both kinds of box a voxel adds `peak` squared to the intersection, and so on; a box's height is `peak`.
        """
        assert self.center_form is not None
        peak, code, ratio = 1.0 + self.options.smoother, self.center_form.code, self.center_form.ratio(voxels)
        (both, by_both), (output, by_output) = (quantities.of_numbers(code, peak, w) for w in (peak, 0.0))
        label, _ = quantities.of_numbers(code, 0.0, peak)
        true = quantities.truth(code, peak)
        lines, slopes = [], []
        for by_intersection, by_prediction, by_label, constant in (ratio[:4], ratio[4:]):
            in_labels = by_label * true
            lines += [by_intersection * peak * peak + by_prediction * both + in_labels, by_prediction * output]
            lines += [by_prediction * label + in_labels, constant]
            slopes += [by_intersection * peak + by_prediction * by_both, by_prediction * by_output]
        return lines + slopes


def place_of_centers(shape: torch.Size, options: Options) -> tuple[list[int], list[int]]:
    """Spatial shape (D, H, W), and how far a centre box reaches along each axis."""
    size = list(shape[1:])
    # An image is a volume of one plane, which any reach of at least one covers.
    spatial = size if options.spatial_dims == 3 else size[1:]
    offsets = [math.ceil(length / max(spatial) * options.centroid_offset) for length in spatial]
    return size, offsets if options.spatial_dims == 3 else [1, *offsets]


class _OnceDifferentiable(torch.autograd.Function):
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
    """The terms of a request as a function of the volume that gradients flow into, and of values that are given."""

    @staticmethod
    def forward(
        carrier: Tensor,
        values: Tensor | None,
        x: Tensor,
        labels: Tensor,
        pixel_sums: Tensor,
        health: Tensor,
        totals: Tensor | None,
        request: Request,
        counts: Tensor,
        geometry: Tensor,
        where: Tensor,
        which: Tensor,
    ) -> tuple[Tensor, ...]:
        """All terms, (7,) float64, 0 where not wanted; and what the backward wants to know."""
        options, names = request.options, request.names
        size, offsets = place_of_centers(x.shape, options)
        sums, sample_sums, pairs, touched = ops.sum_instances(
            x,
            [where, which],
            counts,
            geometry,
            activation_of(options)[0],
            request.quantity,
            options.instance_wise_loss_no_tp,
            request.pair_capacity,
        )
        owned = ops.center_overlaps(geometry, counts, size, offsets) if "center" in names else None
        planar = options.spatial_dims == 2
        distances = ops.proximity_minima(geometry, counts, size, planar) if "proximity" in names else None
        terms, slopes, sample_slopes = ops.terms(
            sums,
            sample_sums,
            pixel_sums,
            health,
            counts,
            geometry,
            owned,
            distances,
            None if values is None else values.double(),
            totals,
            request.numbers(x.shape),
            request.classes,
            request.reduction,
            options.rate_instead_number,
        )
        return terms, slopes, sample_slopes, pairs, touched

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward wants to know."""
        carrier, values, x, labels, _, _, _, request, counts, _, *sites = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(carrier, x, labels, counts, *sites, *kept)
        ctx.request, ctx.values_type = request, None if values is None else values.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        """Gradients of the volume and of the values that were given."""
        if grad is None:  # of the terms; what else is returned has none
            return (None,) * 12
        with torch.no_grad():
            grads: tuple[Tensor | None, ...] = FusedTerms._gradients(ctx, grad)
        if torch.is_grad_enabled():  # a graph of the backward was asked for
            carrier = ctx.saved_tensors[0]
            grads = tuple(
                None if each is None else _OnceDifferentiable.apply(each, carrier)  # type: ignore[no-untyped-call]
                for each in grads
            )
        return (*grads, *(None,) * 10)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        _, x, labels, counts, where, which, slopes, sample_slopes, pairs, touched = ctx.saved_tensors
        request, options, grad = ctx.request, ctx.request.options, grad.contiguous()
        # As published, a hard activated output passes no gradient on.
        flows = options.surrogate or not options.hard
        pixel = request.pixel if "pixel" in request.names else ops.NOT_FUSED
        grad_x = ops.sum_instances_backward(
            grad,
            slopes,
            *ops.terms_backward(grad, slopes, sample_slopes, counts, options.surrogate, flows),
            x,
            labels,
            [where, which],
            pairs,
            touched,
            counts,
            activation_of(options)[0],
            request.quantity,
            options.instance_wise_loss_no_tp,
            ops.NOT_FUSED if pixel == ops.HARD and not flows else pixel,
            request.pixel_quantity,
            request.mistakes,
        )
        if ctx.values_type is None:
            return grad_x, None
        by_output = grad[ops.INSTANCE_OUTPUT] * sample_slopes[:, ops.BY_OUTPUT]
        by_label = grad[ops.INSTANCE_LABEL] * sample_slopes[:, ops.BY_LABEL]
        by_distance = grad[ops.PROXIMITY] * sample_slopes[:, ops.BY_DISTANCE]
        by_value, by_distance = torch.cat((by_output, by_label)), torch.cat((-by_distance, by_distance))
        grad_values = by_value[:, None] + by_distance[:, None] * slopes[..., ops.DISTANCE]
        used = first_rows(counts[ops.KEPT :].flatten().clamp(min=1), slopes.shape[1])
        return grad_x, torch.where(used, grad_values, 0.0).to(ctx.values_type)
