"""What the losses of a call look at, a `Scene`, and losses on regions of it, SPEC section 8.

A scene is made of the tensors of a call. It holds the volumes, and makes instances, row maps and cells when a loss
first asks for them, so that several losses share all of it. A region loss is one operator on such a map: sums over
regions, and what is made of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, quantities
from .activation import (
    carrier_of,
    check_and_widen,
    for_each_class,
    health_of,
    to_activate,
    to_compare,
    without_autocast,
)
from .components import capacity_bound, rows_of_tables
from .instances import Found, Search, find, search
from .options import Options, of_volume
from .terms import OnceDifferentiable, apply


class Regions(NamedTuple):
    """A row map, and how many instances are in it."""

    rows: Tensor  # (B, D, H, W) int32, -1 where voxels are ignored
    counts: Tensor  # (B,) int32
    capacity: int  # rows of a table of them, 0: as many as there are


class Scene:
    """What the losses of one call look at. `outputs_too`: there are losses on regions that are outputs."""

    def __init__(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        options: Options,
        outputs_too: bool = False,
    ) -> None:
        self.options, self.outputs_too = options, outputs_too
        self.given = given = check_and_widen(outputs, labels, cc_label_batch, ignore_mask, options)
        if (suspicion := checks.logits(given.outputs, options.activation, given.ignored)) is not None:
            checks.warn_once(options, "logits", suspicion)
        with without_autocast(given.outputs.device.type):
            self.x, self.truth = to_activate(given, options), to_compare(given, options)
            self.carrier = carrier_of(self.x, given, options)
        self._found: Found | None = None
        self._sides: dict[int, Regions] = {}
        self._cells: dict[Any, Regions] = {}

    def search(self, pixel: tuple[int, int], options: Options) -> Search:
        """How the instances of both sides are found, with the sums of a pixel term."""
        return search(self.x, self.truth, self.given.ids, pixel, options, self.outputs_too)

    def find(self, how: Search) -> Found:
        """The instances of both sides; kept for the losses that follow."""
        self._found = find(self.x.detach(), self.truth, how)
        return self._found

    def found(self) -> Found:
        """The instances of both sides."""
        return self._found or self.find(self.search((ops.NOT_FUSED, quantities.MASS), self.options))

    def instances(self, side: int) -> Regions:
        """The regions that are instances: those of `ops.LABELS` or of `ops.OUTPUTS`."""
        if side not in self._sides:
            if self._found is None and not self.outputs_too:
                rows, counts, geometry = self._label()
                sides = {side: (rows, counts)}
            else:
                found = self.found()
                out_rows, lab_rows = ops.row_maps(self.x.detach(), list(found.sites)).clamp_(min=0).chunk(2)
                counts, geometry = found.counts, found.geometry
                sides = {ops.OUTPUTS: (out_rows, counts[ops.OUTPUTS]), ops.LABELS: (lab_rows, counts[ops.LABELS])}
            capacity = rows_of_tables(self.truth, geometry.shape[1])
            for key, (rows, counts) in sides.items():
                self._sides[key] = Regions(self._but_ignored(rows), counts, capacity)
        return self._sides[side]

    def cells(self, sides: Sequence[int], spacing: tuple[float, ...] | None) -> list[Regions]:
        """The cells of the instances of each side."""
        missing = [side for side in sides if (side, spacing) not in self._cells]
        if missing:
            instances = [self.instances(side) for side in missing]
            rows = instances[0].rows if len(instances) == 1 else torch.cat([each.rows for each in instances])
            cells = ops.cells(rows, list(of_volume(spacing, self.options.spatial_dims))).chunk(len(missing))
            for side, of_side, (_, counts, capacity) in zip(missing, cells, instances, strict=True):
                self._cells[side, spacing] = Regions(self._but_ignored(of_side), counts, capacity)
        return [self._cells[side, spacing] for side in sides]

    def unclaimed(self) -> Tensor:
        """(B, rows) bool: outputs that no label claims."""
        found = self.found()
        tables = list(found.sites), found.counts, found.geometry
        result: Tensor = ops.unclaimed(self.x.detach(), *tables, found.pairs)
        return result

    def loss(
        self, regions: Regions, kind: int, numbers: tuple[float, ...] = (), chosen: Tensor | None = None
    ) -> Tensor:
        """What a kind of loss (ops.py) gives on some regions, a 0-d tensor."""
        activation = ops.SIGMOID if self.options.hard else ops.NONE
        classes = len(self.options.classes)
        how = activation, kind, numbers, classes, regions.capacity
        with without_autocast(self.x.device.type):
            value, *_ = apply(RegionLoss, self.carrier, self.truth, regions.rows, regions.counts, chosen, *how)
            if self.options.activation == "softmax":  # after which infinity does not show everywhere
                value = value * health_of(self.given.outputs, self.truth)
        return value

    def _label(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row map, counts and geometry of labels alone."""
        mask, ids = self.truth > 0.5, self.given.ids
        if ids is None:
            bound = capacity_bound(mask.shape, None)
            labelled: tuple[Tensor, Tensor, Tensor] = ops.find_instances(mask, 0, 0, rows_of_tables(self.truth, bound))
            return labelled
        ids = for_each_class(ids, self.options) * mask
        labelled = ops.number_instances(ids, 0, rows_of_tables(self.truth, mask[0].numel()))
        return labelled

    def _but_ignored(self, rows: Tensor) -> Tensor:
        ignored = self.given.ignored
        return rows if ignored is None else rows.masked_fill(for_each_class(ignored, self.options), -1)


class RegionLoss(torch.autograd.Function):
    """A loss on regions as a function of the volume that gradients flow into."""

    @staticmethod
    def forward(
        carrier: Tensor,
        labels: Tensor,
        rows: Tensor,
        counts: Tensor,
        chosen: Tensor | None,
        activation: int,
        kind: int,
        numbers: tuple[float, ...],
        classes: int,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The value, and what the backward wants to know."""
        value, slopes, factors = ops.region_loss(
            carrier, labels, rows, counts, chosen, activation, kind, numbers, classes, capacity
        )
        return value, slopes, factors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward wants to know."""
        carrier, labels, rows, _, _, ctx.activation, ctx.kind, *_ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(carrier, labels, rows, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient of the volume."""
        grad, *_ = grads
        if grad is None:
            return (None,) * 10
        carrier, labels, rows, slopes, factors = ctx.saved_tensors
        with torch.no_grad():
            grad_x = ops.region_loss_backward(grad, carrier, labels, rows, slopes, factors, ctx.activation, ctx.kind)
        if torch.is_grad_enabled():  # a graph of the backward was asked for
            grad_x = OnceDifferentiable.apply(grad_x, carrier)  # type: ignore[no-untyped-call]
        return (grad_x, *(None,) * 9)
