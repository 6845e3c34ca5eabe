"""The tables: one row an instance, with its size, place, sums and neighbours; gradients flow through the sums."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .activation import Activated, to_volume
from .components import capacity_bound, rows_of_tables
from .options import Options


class _SumInstances(torch.autograd.Function):
    """`ops.sum_instances` as a function of the activated output, whose derivative is that of `probabilities`."""

    @staticmethod
    def forward(
        ctx: Any,
        probabilities: Tensor,
        a: Tensor,
        y: Tensor,
        out_rows: Tensor,
        lab_rows: Tensor,
        kept: Tensor,
        quantity: int,
        no_tp: bool,
        capacities: tuple[int, int, int],
        differentiable: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor, Tensor] = ops.sum_instances(
            a, y, out_rows, lab_rows, kept, quantity, no_tp, *capacities
        )
        ctx.save_for_backward(a, y, out_rows, lab_rows, kept)
        ctx.quantity, ctx.no_tp, ctx.dtype = quantity, no_tp, probabilities.dtype
        ctx.differentiable = differentiable
        ctx.mark_non_differentiable(results[3])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, y, out_rows, lab_rows, kept = ctx.saved_tensors
        if ctx.differentiable:
            grad = ops.sum_instances_backward(
                *grads[:3], a, y, out_rows, lab_rows, kept, ctx.quantity, ctx.no_tp, ctx.dtype
            )
        else:
            grad = torch.zeros(a.shape, dtype=ctx.dtype, device=a.device)
        return grad, *(None,) * 9


class _SumNeighbours(torch.autograd.Function):
    """For each instance of one side, the sum of `values` over the instances of the other side paired with it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: Tensor, to_labels: bool, capacity: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.to_labels, ctx.capacity = to_labels, values.shape[1]
        result: Tensor = ops.sum_neighbours(values, pairs, to_labels, capacity)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (pairs,) = ctx.saved_tensors
        return ops.sum_neighbours(grad.contiguous(), pairs, not ctx.to_labels, ctx.capacity), None, None, None


@dataclass(frozen=True)
class Found:
    """The instances of a batch: where they are, how many, and which outputs are used individually."""

    activated: Activated
    out_rows: Tensor  # (B, D, H, W) int32: number of the output instance at each voxel, 0 = none
    lab_rows: Tensor  # (B, D, H, W) int32: number of the label instance at each voxel, 0 = none
    num_outputs: Tensor  # (B,) int32
    num_labels: Tensor  # (B,) int32
    too_many: Tensor  # (B,) bool: more outputs than mul_too_many for each label
    kept: Tensor  # (B,) int32: outputs 1..kept are used individually
    out_geometry: Tensor  # (B, rows, 10) int64, columns as ops.py names them
    lab_geometry: Tensor  # (B, rows, 10) int64
    is_output: Tensor  # (B, rows) bool: which rows of an output table are instances
    is_kept: Tensor  # (B, rows) bool: which of them are kept
    is_label: Tensor  # (B, rows) bool: which rows of a label table are instances
    pair_capacity: int

    @property
    def out_sizes(self) -> Tensor:
        """(B, rows) int64."""
        return self.out_geometry[..., ops.SIZE]

    @property
    def lab_sizes(self) -> Tensor:
        """(B, rows) int64."""
        return self.lab_geometry[..., ops.SIZE]

    def sums(self, quantity: int, options: Options) -> "SumTables":
        """Sum `quantity` and what the terms need over each instance."""
        activated = self.activated
        out, lab, sample, pairs = _SumInstances.apply(  # type: ignore[no-untyped-call]
            activated.probabilities,
            activated.a,
            activated.y,
            self.out_rows,
            self.lab_rows,
            self.kept,
            quantity,
            options.instance_wise_loss_no_tp,
            (self.out_geometry.shape[1], self.lab_geometry.shape[1], self.pair_capacity),
            options.surrogate or not options.hard,
        )
        # One unbind, so that backward makes one table a side instead of one for each use of a column.
        return SumTables(OutputSums(*out.unbind(-1)), LabelSums(*lab.unbind(-1)), sample, pairs)


class OutputSums(NamedTuple):
    """Sums over each output instance, (B, rows) float64: the columns of ops.py, which says what they are."""

    mass: Tensor
    intersection: Tensor
    cost: Tensor
    excess: Tensor
    overlap: Tensor


class LabelSums(NamedTuple):
    """Sums over each label instance, (B, rows) float64: the columns of ops.py, which says what they are."""

    mass: Tensor
    intersection: Tensor
    cost: Tensor
    touched: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class SumTables:
    """Differentiable sums over instances and samples, and which instances touch."""

    out: OutputSums
    lab: LabelSums
    sample: Tensor  # (B, 3) float64
    pairs: Tensor  # (B, slots) int64

    def over_outputs(self, values: Tensor) -> Tensor:
        """(B, output rows) -> (B, label rows): sums over the kept outputs that touch each label."""
        return self._neighbours(values, True, self.lab.mass.shape[1])

    def over_labels(self, values: Tensor) -> Tensor:
        """(B, label rows) -> (B, output rows): sums over the labels that each kept output touches."""
        return self._neighbours(values, False, self.out.mass.shape[1])

    def _neighbours(self, values: Tensor, to_labels: bool, capacity: int) -> Tensor:
        result: Tensor = _SumNeighbours.apply(values.contiguous(), self.pairs, to_labels, capacity)  # type: ignore[no-untyped-call]
        return result


def first_rows(counts: Tensor, rows: int) -> Tensor:
    """(B,) -> (B, rows) bool: True in the first `counts` rows of each sample."""
    return torch.arange(rows, device=counts.device) < counts[:, None]


def find(activated: Activated, cc_label_batch: Tensor | None, options: Options) -> Found:
    """Label both volumes, number and measure their instances, and decide which outputs are kept."""
    foreground, y = activated.foreground, activated.y
    bound = capacity_bound(foreground.shape, options.num_iterations)
    rows = rows_of_tables(foreground, bound)
    lab_bound = bound
    search = (options.num_iterations or 0, options.min_instance_size)
    if cc_label_batch is None:
        # One labelling for both sides: outputs first, then labels.
        both, counts, geometry = ops.find_instances(torch.cat((foreground, y)), *search, rows)
        (out_rows, lab_rows), (num_outputs, num_labels) = both.chunk(2), counts.chunk(2)
        out_geometry, lab_geometry = geometry.chunk(2)
    else:
        out_rows, num_outputs, out_geometry = ops.find_instances(foreground, *search, rows)
        ids = to_volume(cc_label_batch).long() * y
        lab_bound = ids[0].numel()
        lab_rows, num_labels, lab_geometry = ops.number_instances(
            ids, options.min_instance_size, rows_of_tables(ids, lab_bound)
        )

    too_many = (num_labels > 0) & (num_outputs > num_labels.double() * options.mul_too_many)
    kept = num_outputs.clamp(max=options.max_cc_out) if options.max_cc_out else num_outputs
    kept = torch.where(too_many, 0, kept).int()
    # A voxel makes at most one pair, and whole components at most one a 2x2x2 block. The table is a hash set: it is
    # half empty, and a power of two.
    pairs = max(bound, lab_bound)
    if rows == 0:
        pairs = min(pairs, out_geometry.shape[1] * lab_geometry.shape[1])
    pair_capacity = 2 ** (2 * pairs - 1).bit_length()
    return Found(
        activated,
        out_rows,
        lab_rows,
        num_outputs,
        num_labels,
        too_many,
        kept,
        out_geometry,
        lab_geometry,
        is_output=first_rows(num_outputs, out_geometry.shape[1]),
        is_kept=first_rows(kept, out_geometry.shape[1]),
        is_label=first_rows(num_labels, lab_geometry.shape[1]),
        pair_capacity=pair_capacity,
    )
