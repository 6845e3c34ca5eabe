"""What the losses of a call look at, a `Scene`, and losses on regions of it, SPEC section 8.

A scene is made of the tensors of a call. It holds the volumes, and makes instances, row maps and cells when a loss
first asks for them, so that several losses share all of it. A region loss is one operator on such a map: sums over
regions, and what is made of them.
"""

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

# Whose instances regions are made of.
Sides = tuple[int, ...]
BOTH: Sides = (ops.OUTPUTS, ops.LABELS)


class Regions(NamedTuple):
    """A row map, and how many instances are in it; of two sides, one behind the other, those of 2 B samples."""

    rows: Tensor  # (B, D, H, W) int32, below 0 where voxels are in no region
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
        self._rows: Tensor | None = None  # the row maps of both sides
        self._maps: dict[Sides, Regions] = {}
        self._instances: dict[int, Regions] = {}
        self._cells: dict[Any, dict[Sides, Tensor]] = {}  # by spacing

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
        """The regions that are the instances of a side."""
        if side not in self._instances:
            regions = self._map((side,))
            # (labels by themselves are never below 0)
            rows = regions.rows if self._rows is None else regions.rows.clamp(min=0)
            self._instances[side] = regions._replace(rows=self._but_ignored(rows))
        return self._instances[side]

    def cells(self, sides: Sides, spacing: tuple[float, ...] | None) -> Regions:
        """The regions that are the cells of the instances of some sides."""
        made = self._cells.setdefault(spacing, {})
        if sides not in made and BOTH in made:
            made[sides] = made[BOTH].chunk(2)[BOTH.index(*sides)]
        elif sides not in made:
            missing = tuple([side for side in sides if (side,) not in made])
            if missing:
                rows = ops.cells(self._map(missing).rows, list(of_volume(spacing, self.options.spatial_dims)))
                made[missing] = self._but_ignored(rows)
            if missing != sides:
                made[sides] = torch.cat([made[side,] for side in sides])
        return self._map(sides)._replace(rows=made[sides])

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

    def _map(self, sides: Sides) -> Regions:
        """Row maps as they are found: below 0 where the foreground is in no instance, and nowhere else."""
        if sides not in self._maps:
            if self._found is None and not self.outputs_too:  # so it is labels
                rows, counts, geometry = self._label()
            else:
                found = self.found()
                counts, geometry = found.counts, found.geometry
                if self._rows is None:
                    self._rows = ops.row_maps(self.x.detach(), list(found.sites))
                rows = self._rows if sides == BOTH else self._rows.chunk(2)[BOTH.index(*sides)]
                counts = torch.cat([counts[side] for side in sides]) if sides == BOTH else counts[sides[0]]
            self._maps[sides] = Regions(rows, counts, rows_of_tables(self.truth, geometry.shape[1]))
        return self._maps[sides]

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
        if ignored is None:
            return rows
        ignored = for_each_class(ignored, self.options)
        return rows.masked_fill(ignored if len(rows) == len(ignored) else torch.cat((ignored, ignored)), -1)


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
