"""The terms of the family, SPEC section 4, as functions of tables: (B, rows) tensors, one row an instance.

Unused rows are kept out by masks, so that no shape depends on how many instances there are. A sample without usable
outputs, or without labels, has one row on that side: the criterion on the whole sample.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, quantities
from .criteria import FusedCriterion, Sums, fused_form
from .instances import Found, SumTables
from .options import Options


class InstanceValues(NamedTuple):
    """The criterion of each instance, and which rows count (at least one a sample)."""

    labels: Tensor  # (B, label rows) float64
    outputs: Tensor  # (B, output rows) float64
    label_rows: Tensor  # (B, label rows) bool
    output_rows: Tensor  # (B, output rows) bool


def straight_through(value: Tensor, carrier: Tensor, options: Options) -> Tensor:
    """`value` in forward; in backward the derivative of `carrier`, or zero with the published gradients."""
    change = carrier - carrier.detach()
    return value + (change if options.surrogate else 0.0 * change)


def quantity_of(criterion: Callable[..., Any]) -> int:
    """The code of the quantity that `criterion` needs; any, if it has no fused form."""
    form = fused_form(criterion)
    return form.code if form is not None else quantities.MASS


def instance_values(found: Found, sums: SumTables, criterion: Callable[..., Any], options: Options) -> InstanceValues:
    """The criterion of each label and of each kept output; of the whole sample where a side has no instance."""
    form = fused_form(criterion)
    if form is not None:
        if form.code == quantities.CROSS_ENTROPY and not options.hard:
            checks.probabilities("loss_function_instance", found.activated.a)
        labels, outputs, whole = _fused_values(found, sums, form)
    else:
        labels, outputs, whole = _slow_values(found, criterion, options)
    labels, label_rows = _with_whole(labels, found.is_label, whole)
    outputs, output_rows = _with_whole(outputs, found.is_kept, whole)
    return InstanceValues(labels, outputs, label_rows, output_rows)


def _with_whole(values: Tensor, rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the rows that count, with the value of the whole sample in row 0 where a sample has no row."""
    alone = ~rows[:, :1]
    first = torch.where(alone, whole, values[:, :1])
    return torch.cat((first, values[:, 1:]), 1), torch.cat((rows[:, :1] | alone, rows[:, 1:]), 1)


def _fused_values(found: Found, sums: SumTables, form: FusedCriterion) -> tuple[Tensor, Tensor, Tensor]:
    """SPEC section 6: everything is sums. Labels, outputs and whole samples are evaluated as rows of one table."""
    missing = quantities.UNPREDICTED[form.code]
    lab_sizes = found.lab_sizes.double()
    touched = sums.over_labels(lab_sizes)  # label mass of each output
    in_labels = sums.lab.cost + sums.over_outputs(sums.out.excess) + missing * (lab_sizes - sums.lab.overlap)
    in_outputs = sums.out.cost + missing * (touched - sums.out.overlap)
    whole_intersection, whole_prediction, whole_label = sums.sample.unsqueeze(1).unbind(2)

    used = torch.cat((found.is_label, found.is_kept, torch.ones_like(found.is_label[:, :1])), 1)
    columns = (
        (sums.lab.intersection, sums.out.intersection, whole_intersection),
        (in_labels, in_outputs, whole_prediction),
        (lab_sizes, touched, whole_label),
    )
    # Other rows see ones, so that no formula divides by their zeros.
    intersection, prediction, label = (torch.where(used, torch.cat(column, 1), 1.0) for column in columns)
    value = form.value(Sums(intersection, prediction, label, math.prod(found.out_rows.shape[1:])))
    labels, outputs, whole = torch.where(used, value, 0.0).split((lab_sizes.shape[1], touched.shape[1], 1), 1)
    return labels, outputs, whole


def _slow_values(found: Found, criterion: Callable[..., Any], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The same values for any criterion, from one pair of full volumes an instance. Reads counts: synchronises."""
    activated = found.activated
    a = activated.probabilities
    if options.hard:
        a = straight_through(activated.a.to(a.dtype), a, options)
    shape = a.shape[2:] if options.spatial_dims == 2 else a.shape[1:]

    def call(predicted: Tensor, true: Tensor) -> Tensor:
        volumes = (volume.reshape(1, 1, *shape) for volume in (predicted, true.to(a.dtype)))
        return checks.scalar("loss_function_instance", criterion(*volumes)).double()

    labels, outputs, whole = [], [], []
    for sample in range(a.shape[0]):
        prediction, y = a[sample], activated.y[sample]
        out, lab = found.out_rows[sample], found.lab_rows[sample]
        kept = (out > 0) & (out <= found.kept[sample])
        whole.append(call(prediction, y))
        values = []
        for row in range(1, int(found.num_labels[sample]) + 1):
            mine = lab == row
            use = torch.isin(out, out[kept & mine].unique()).to(a.dtype)
            if options.instance_wise_loss_no_tp:
                use = use * torch.where(y, mine.to(a.dtype), prediction.detach())
            values.append(call(prediction * use, mine))
        labels.append(_fill(values, whole[-1], found.lab_sizes.shape[1]))
        values = []
        for row in range(1, int(found.kept[sample]) + 1):
            mine = out == row
            values.append(call(prediction * mine, torch.isin(lab, lab[mine & (lab > 0)].unique())))
        outputs.append(_fill(values, whole[-1], found.out_sizes.shape[1]))
    return torch.stack(labels), torch.stack(outputs), torch.stack(whole)[:, None]


def _fill(values: list[Tensor], like: Tensor, rows: int) -> Tensor:
    """`values` in a table of `rows` rows, zeros after them."""
    rest = like.new_zeros(rows - len(values))
    return torch.cat((torch.stack(values), rest)) if values else rest


def reduce_instances(values: Tensor, rows: Tensor, options: Options) -> Tensor:
    """Over the instances: the mean of all in the batch, or the mean over samples of each sample's mean or sum."""
    total = torch.where(rows, values, 0.0).sum(1)
    count = rows.sum(1)
    if options.instance_wise_reduce == "instance":
        return total.sum() / count.sum()
    return (total / count if options.reduce_segmentation == "mean" else total).mean()


def false_instances(found: Found, sums: SumTables, options: Options) -> Tensor:
    """Output instances that are not correct. Gradient: the mean of a over each output that touches no label."""
    touches = sums.out.overlap > 0
    correct = (touches & found.is_kept).sum(1)
    mean_output = torch.where(found.is_output & ~touches, _mean_output(found, sums), 0.0).sum(1)
    return _count_or_rate(found.num_outputs - correct, mean_output, found.num_outputs, options)


def missed_instances(found: Found, sums: SumTables, options: Options) -> Tensor:
    """Labels that no kept output touches. Gradient: minus the mean of a over each label that no output touches."""
    detected = (sums.lab.overlap > 0).sum(1)
    untouched = found.is_label & (sums.lab.touched == 0)
    mean_output = torch.where(untouched, sums.lab.mass / found.lab_sizes.clamp(min=1), 0.0).sum(1)
    return _count_or_rate(found.num_labels - detected, -mean_output, found.num_labels, options)


def _mean_output(found: Found, sums: SumTables) -> Tensor:
    """The mean of a over each output instance."""
    return sums.out.mass / found.out_sizes.clamp(min=1)


def _count_or_rate(count: Tensor, carrier: Tensor, total: Tensor, options: Options) -> Tensor:
    value = straight_through(count.double(), carrier, options)
    if options.rate_instead_number:
        value = value / (total.double() + options.smoother)
    return value.mean()


def center(found: Found, sums: SumTables, criterion: Callable[..., Any], options: Options) -> Tensor:
    """The criterion on the centre boxes. The height of an output's box has the derivative of the mean of a over it."""
    shape = list(found.out_rows.shape[1:])
    # An image is a volume of one plane, which any reach of at least one covers.
    spatial = shape if options.spatial_dims == 3 else shape[1:]
    offsets = [math.ceil(size / max(spatial) * options.centroid_offset) for size in spatial]
    boxes = (found.out_geometry, found.lab_geometry, found.kept, found.num_labels)
    place = (shape, offsets if options.spatial_dims == 3 else [1, *offsets])

    mean_output = _mean_output(found, sums)
    peak = 1.0 + options.smoother
    heights = straight_through(torch.full_like(mean_output, peak), mean_output, options)
    form = fused_form(criterion)
    if form is None:
        owner, covered = ops.center_volumes(*boxes, *place)
        return _slow_center(heights, owner, covered, criterion, found, options)

    owned, alone = ops.center_overlaps(*boxes, *place)
    outside, inside = owned[..., 0].double(), owned[..., 1].double()
    alone = alone.double()
    heights = torch.where(found.is_kept, heights, 0.0)
    code = form.code
    at_label, at_nothing = quantities.phi(code, heights, peak), quantities.phi(code, heights, 0.0)
    prediction = (inside * at_label + outside * at_nothing).sum(1)
    prediction = prediction + alone * quantities.phi(code, heights.new_zeros(()), peak)
    label = quantities.truth(code, peak) * (inside.sum(1) + alone)
    intersection = peak * (heights * inside).sum(1)
    return form.value(Sums(intersection, prediction, label, math.prod(shape))).mean()


def _slow_center(
    heights: Tensor, owner: Tensor, covered: Tensor, criterion: Callable[..., Any], found: Found, options: Options
) -> Tensor:
    """Any criterion on the two center volumes of each sample."""
    dtype = found.activated.probabilities.dtype
    peak = 1.0 + options.smoother
    values = []
    for sample in range(owner.shape[0]):
        by_row = torch.cat((heights.new_zeros(1), heights[sample])).to(dtype)
        out = by_row[owner[sample].long()]
        lab = covered[sample].to(dtype) * peak
        shape = out.shape if options.spatial_dims == 3 else out.shape[1:]
        value = criterion(out.reshape(1, 1, *shape), lab.reshape(1, 1, *shape))
        values.append(checks.scalar("loss_function_center", value))
    return torch.stack(values).mean()


def proximity(found: Found, values: InstanceValues, options: Options) -> Tensor:
    """Squared difference of the instance values of labels and outputs, each weighted by its distance to the nearest."""
    for_outputs, for_labels = ops.proximity_minima(
        found.out_geometry,
        found.lab_geometry,
        found.kept,
        found.num_labels,
        list(found.out_rows.shape[1:]),
        options.spatial_dims == 2,
    )
    labels = torch.where(values.label_rows, for_labels * values.labels, 0.0).sum(1)
    outputs = torch.where(values.output_rows, for_outputs * values.outputs, 0.0).sum(1)
    return ((labels - outputs) ** 2 + torch.where(found.too_many, found.num_outputs, 0)).mean()
