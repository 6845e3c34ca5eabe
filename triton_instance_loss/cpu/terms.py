"""The terms and their slopes on the CPU: `terms` and `terms_backward` of ops.py.

The criteria are ratios of linear functions of sums (../ops.py), so that one walk over the rows of a side adds up all
that the terms need of it, and writes the derivatives of the terms by the sums of each row. A side without instances of
its own has the criterion of the whole sample in row 0.
"""

import numpy as np
import torch
from torch import Tensor

from .. import ops
from . import compiled
from .activation import Indices, Numbers, Rows


@compiled
def _criterion(ratio: Numbers, intersection: float, prediction: float, label: float) -> tuple[float, float, float]:
    """A ratio of two linear functions of three sums, and its derivatives by intersection and prediction."""
    above = ratio[0] * intersection + ratio[1] * prediction + ratio[2] * label + ratio[3]
    below = ratio[4] * intersection + ratio[5] * prediction + ratio[6] * label + ratio[7]
    value = above / below
    return value, (ratio[0] - value * ratio[4]) / below, (ratio[1] - value * ratio[5]) / below


@compiled
def _center_criterion(
    owned: Indices, sample: int, kept: int, labels: int, numbers: Numbers
) -> tuple[float, float, float]:
    """The criterion on centre boxes, and its derivatives by the height of a box, inside and outside of label boxes."""
    inside, output, label = 0.0, 0.0, 0.0
    for row in range(kept):
        output += owned[0, sample, row, 0]
        inside += owned[0, sample, row, 1]
    for row in range(labels):
        label += owned[1, sample, row, 0]
    ratio, slopes = numbers[ops.CENTER_RATIO : ops.CENTER_SLOPES], numbers[ops.CENTER_SLOPES : ops.SMOOTHER]
    value, _, _ = _criterion(ratio, inside, output, label)
    below = ratio[4] * inside + ratio[5] * output + ratio[6] * label + ratio[7]
    return value, (slopes[0] - value * slopes[2]) / below, (slopes[1] - value * slopes[3]) / below


@compiled
def _weight(used: Rows, sample: int, classes: int, reduction: int, total: float) -> float:
    """What one row of a sample adds to the mean over instances; total 0: there are no other processes."""
    batch = len(used)
    if reduction == ops.BY_MEAN:
        return 1.0 / (batch * float(max(used[sample], 1)))
    if reduction != ops.BY_INSTANCE:
        return 1.0 / batch
    if total == 0:
        for other in range(sample % classes, batch, classes):
            total += float(max(used[other], 1))
    return 1.0 / (classes * total)


@compiled
def _terms(
    sums: Numbers, sample_sums: Numbers, pixel_sums: Numbers, health: float, counts: Rows, geometry: Indices,
    owned: Indices, distances: Numbers, values: Numbers, totals: Numbers, numbers: Numbers, with_center: bool,
    with_proximity: bool, with_values: bool, classes: int, reduction: int, rates: bool, slopes: Numbers,
    sample_slopes: Numbers, terms: Numbers,
) -> None:  # fmt: skip
    """Add up the terms, sample by sample, and write the slopes."""
    batch = counts.shape[1]
    instance_ratio, missing = numbers[ops.INSTANCE_RATIO : ops.MISSING], numbers[ops.MISSING]
    for sample in range(batch):
        line = pixel_sums[sample]
        pixel, by_intersection, by_prediction = _criterion(
            numbers[ops.PIXEL_RATIO : ops.INSTANCE_RATIO], line[0], line[1], line[2]
        )
        terms[ops.PIXEL] += health * pixel
        of_sample = sample_slopes[sample]
        of_sample[ops.PIXEL_BY_INTERSECTION] = health * by_intersection
        of_sample[ops.PIXEL_BY_PREDICTION] = health * by_prediction
        whole = 0.0
        if counts[ops.KEPT, sample] == 0 or counts[ops.LABELS, sample] == 0:
            line = sample_sums[sample]
            whole, by_intersection, by_prediction = _criterion(instance_ratio, line[0], line[1], line[2])
            of_sample[ops.WHOLE_BY_INTERSECTION], of_sample[ops.WHOLE_BY_PREDICTION] = by_intersection, by_prediction
        by_inside, by_outside = 0.0, 0.0
        if with_center:
            center, by_inside, by_outside = _center_criterion(
                owned, sample, counts[ops.KEPT, sample], counts[ops.LABELS, sample], numbers
            )
            terms[ops.CENTER] += health * center / batch

        difference = 0.0
        for side in range(2):
            count, used = counts[ops.OUTPUTS if side == 0 else ops.LABELS, sample], counts[ops.KEPT + side, sample]
            share = health / (batch * (count + numbers[ops.SMOOTHER] if rates else 1.0))
            total, weighted, met = 0.0, 0.0, 0
            for row in range(max(count, 1)):
                line, size = sums[side, sample, row], float(max(geometry[side * batch + sample, row, ops.SIZE], 1))
                of_row, value = slopes[side, sample, row], 0.0
                if row < used:
                    met += line[ops.OVERLAP] > 0
                    label = line[ops.LABEL] if side == 0 else size
                    if with_values:
                        value = values[side, sample, row]
                    else:
                        prediction = line[ops.COST] + missing * (label - line[ops.OVERLAP])
                        value, of_row[ops.BY_INTERSECTION], of_row[ops.BY_PREDICTION] = _criterion(
                            instance_ratio, line[ops.INTERSECTION], prediction, label
                        )
                    if side == 0 and with_center:
                        by_height = by_outside * owned[0, sample, row, 0] + by_inside * owned[0, sample, row, 1]
                        of_row[ops.BY_CENTER] = health * by_height / (size * batch)
                elif row == 0:
                    value = values[side, sample, row] if with_values else whole
                if row < count and line[ops.OVERLAP if side == 0 else ops.TOUCHED] == 0:
                    of_row[ops.BY_FALSE] = (share if side == 0 else -share) / size
                if with_proximity and row < max(used, 1):
                    of_row[ops.DISTANCE] = distances[side, sample, row]
                total += value
                weighted += of_row[ops.DISTANCE] * value
            difference += weighted if side == 1 else -weighted
            weight = health * _weight(
                counts[ops.KEPT + side], sample, classes, reduction, totals[side, sample % classes]
            )
            of_sample[ops.BY_OUTPUT if side == 0 else ops.BY_LABEL] = weight
            terms[ops.INSTANCE_OUTPUT if side == 0 else ops.INSTANCE_LABEL] += weight * total
            terms[ops.FALSE_INSTANCES if side == 0 else ops.MISSED_INSTANCES] += share * (count - met)
            if side == 0:
                of_sample[ops.BY_MISTAKE] = share
        if with_proximity:
            too_many = counts[ops.OUTPUTS, sample] if counts[ops.KEPT, sample] == 0 else 0
            terms[ops.PROXIMITY] += health * (difference * difference + too_many) / batch
            of_sample[ops.BY_DISTANCE] = health * 2.0 * difference / batch


def terms(
    sums: Tensor,
    sample_sums: Tensor,
    pixel_sums: Tensor,
    health: Tensor,
    counts: Tensor,
    geometry: Tensor,
    owned: Tensor | None,
    distances: Tensor | None,
    values: Tensor | None,
    totals: Tensor | None,
    numbers: list[float],
    classes: int,
    reduction: int,
    rates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `terms` (ops.py)."""
    batch, rows = counts.shape[1], sums.shape[1]
    # Zeros stand in for what is not there: memory that nothing looks at costs nothing.
    of_boxes = np.zeros((2, batch, rows, 2), np.int64) if owned is None else owned.numpy().reshape(2, batch, rows, 2)
    near, given = (
        np.zeros((2, batch, rows)) if each is None else each.numpy().reshape(2, batch, rows)
        for each in (distances, values)
    )
    of_all = np.zeros((2, classes)) if totals is None else totals.numpy()
    slopes = np.zeros((2, batch, rows, ops.SLOPES_COLUMNS))
    sample_slopes, results = np.zeros((batch, ops.SAMPLE_SLOPES_COLUMNS)), np.zeros(ops.PROXIMITY + 1)
    _terms(
        sums.numpy().reshape(2, batch, rows, -1), sample_sums.numpy(), pixel_sums.numpy(), float(health.min()),
        counts.numpy(), geometry.numpy(), of_boxes, near, given, of_all, np.array(numbers), owned is not None,
        distances is not None, values is not None, classes, reduction, rates, slopes, sample_slopes, results,
    )  # fmt: skip
    return torch.from_numpy(results), torch.from_numpy(slopes).flatten(0, 1), torch.from_numpy(sample_slopes)


@compiled
def _terms_backward(
    grads: Numbers, of_samples: Numbers, of_rows: Numbers, counts: Rows, masses: bool, values: bool, table: Numbers,
    of_whole: Numbers, pixel: Numbers,
) -> None:  # fmt: skip
    """Write the gradients of the sums of instances, of samples and of the pixel term's."""
    batch = len(of_samples)
    for sample in range(batch):
        slopes, whole = of_samples[sample], of_whole[sample]
        pixel[sample, 0] = grads[ops.PIXEL] * slopes[ops.PIXEL_BY_INTERSECTION]
        pixel[sample, 1] = grads[ops.PIXEL] * slopes[ops.PIXEL_BY_PREDICTION]
        if masses:
            whole[ops.BY_REST] = grads[ops.FALSE_INSTANCES] * slopes[ops.BY_MISTAKE]
        by_distance, by_criterion = grads[ops.PROXIMITY] * slopes[ops.BY_DISTANCE], 0.0
        for side in range(2):
            by_value = grads[ops.INSTANCE_OUTPUT] * slopes[ops.BY_OUTPUT]
            by_near = -by_distance
            if side == 1:
                by_value, by_near = grads[ops.INSTANCE_LABEL] * slopes[ops.BY_LABEL], by_distance
            lines, into = of_rows[side * batch + sample], table[side * batch + sample]
            if counts[ops.KEPT + side, sample] == 0:  # row 0 is the whole sample
                by_criterion += by_value + by_near * lines[0, ops.DISTANCE]
            for row in range(len(lines)):
                if masses:
                    into[row, ops.MASS] = grads[ops.CENTER] * lines[row, ops.BY_CENTER]
                if values:
                    by_row = by_value + by_near * lines[row, ops.DISTANCE]
                    into[row, ops.INTERSECTION] = by_row * lines[row, ops.BY_INTERSECTION]
                    into[row, ops.COST] = by_row * lines[row, ops.BY_PREDICTION]
        if values:
            whole[0] = by_criterion * slopes[ops.WHOLE_BY_INTERSECTION]
            whole[1] = by_criterion * slopes[ops.WHOLE_BY_PREDICTION]


def terms_backward(
    grad_terms: Tensor, slopes: Tensor, sample_slopes: Tensor, counts: Tensor, masses: bool, values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `terms_backward` (ops.py)."""
    batch = len(sample_slopes)
    table = np.zeros((*slopes.shape[:2], ops.GRADIENT_COLUMNS))
    of_whole = np.zeros((batch, ops.WHOLE_GRADIENT_COLUMNS))
    pixel = np.zeros((batch, ops.SAMPLE_GRADIENT_COLUMNS))
    tables = grad_terms.numpy(), sample_slopes.numpy(), slopes.numpy(), counts.numpy()
    _terms_backward(*tables, masses, values, table, of_whole, pixel)
    return torch.from_numpy(table), torch.from_numpy(of_whole), torch.from_numpy(pixel)
