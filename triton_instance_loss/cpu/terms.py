"""The terms and their slopes on the CPU: `terms` and `terms_backward` of ops.py.

Rows of a table are the second axis; what a row that is not used holds, is masked out wherever it is read.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]


class _Criterion(NamedTuple):
    """A criterion, and its derivatives."""

    value: Numbers
    by_intersection: Numbers
    by_prediction: Numbers


def _evaluate(ratio: list[float], sums: Numbers, used: Any = True) -> _Criterion:
    """A ratio of two linear functions of intersection, prediction and label (last axis); 0 where it is not used."""
    above, below = sums @ ratio[0:3] + ratio[3], sums @ ratio[4:7] + ratio[7]
    # No division by the zeros of unused rows.
    above, below = np.where(used, above, 0.0), np.where(used, below, 1.0)
    value, scale = above / below, np.where(used, 1.0 / below, 0.0)
    return _Criterion(value, (ratio[0] - value * ratio[4]) * scale, (ratio[1] - value * ratio[5]) * scale)


class _Side(NamedTuple):
    """The instances of one side."""

    sums: Numbers  # (B, rows, 5)
    sizes: Numbers  # (B, rows), at least 1
    present: Mask  # (B, rows): all of them
    used: Mask  # (B, rows): those with a criterion of their own
    alone: Mask  # (B,): none, so that row 0 is the whole sample
    slopes: Numbers  # (B, rows, 5), filled step by step

    @classmethod
    def of(cls, sums: Numbers, geometry: NDArray[Any], slopes: Numbers, count: Any, used: Any) -> "_Side":
        """From tables of one side, and how many instances there are and are used in each sample."""
        rows = np.arange(sums.shape[1])
        sizes = np.maximum(geometry[..., ops.SIZE], 1).astype(np.float64)
        return cls(sums, sizes, rows < count[:, None], rows < used[:, None], used == 0, slopes)

    def evaluate(self, ratio: list[float], missing: float, label: Numbers, whole: Numbers) -> Numbers:
        """The criterion of each instance, or of the whole sample in row 0; its slopes are noted."""
        cost = self.sums[..., ops.COST] + missing * (label - self.sums[..., ops.OVERLAP])
        sums = np.stack((self.sums[..., ops.INTERSECTION], cost, label), axis=-1)
        result = _evaluate(ratio, sums, self.used)
        self.slopes[..., ops.BY_INTERSECTION] = result.by_intersection
        self.slopes[..., ops.BY_PREDICTION] = result.by_prediction
        values = result.value.copy()
        values[self.alone, 0] = whole[self.alone]
        return values

    def weights(self, reduction: int, classes: int, totals: Numbers | None) -> Numbers:
        """What one row of each sample adds to the mean over instances, (B,)."""
        counts = np.maximum(self.used.sum(1), 1)
        if reduction == ops.BY_INSTANCE:
            of_classes = counts.reshape(-1, classes).sum(0) if totals is None else totals
            return np.tile(1.0 / (classes * of_classes), len(counts) // classes)
        each: Numbers = 1.0 / counts if reduction == ops.BY_MEAN else np.ones(len(counts))
        return each / len(counts)

    def mistakes(self, found: Mask, untouched: Mask, sign: float, smoother: float, rates: bool) -> float:
        """False or missed instances; the slope of those that touch nothing is noted."""
        counts = self.present.sum(1)
        share = 1.0 / (len(counts) * (counts + smoother if rates else np.ones(len(counts))))
        slopes = np.where(self.present & untouched, sign * share[:, None] / self.sizes, 0.0)
        self.slopes[..., ops.BY_FALSE] = slopes
        return float((share * (counts - found.sum(1))).sum())


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
    num_outputs, kept, num_labels = counts.numpy()
    batch = len(num_outputs)
    slopes = np.zeros((*sums.shape[:2], ops.SLOPES_COLUMNS))
    out, lab = (
        _Side.of(sums.numpy()[side], geometry.numpy()[side], slopes[side], *of_side)
        for side, of_side in (
            (slice(None, batch), (num_outputs, kept)),
            (slice(batch, None), (num_labels, num_labels)),
        )
    )
    ratio = numbers[ops.INSTANCE_RATIO : ops.MISSING]
    results = np.zeros(ops.PROXIMITY + 1)
    of_samples = np.zeros((batch, ops.SAMPLE_SLOPES_COLUMNS))
    with np.errstate(all="ignore"):  # NaN and infinity are answers here
        pixel = _evaluate(numbers[ops.PIXEL_RATIO : ops.INSTANCE_RATIO], pixel_sums.numpy())
        results[ops.PIXEL] = pixel.value.sum()
        of_samples[:, ops.PIXEL_BY_INTERSECTION] = pixel.by_intersection
        of_samples[:, ops.PIXEL_BY_PREDICTION] = pixel.by_prediction

        if values is not None:
            output_values, label_values = np.split(values.numpy(), 2)
        else:
            whole = _evaluate(ratio, sample_sums.numpy(), out.alone | lab.alone)
            of_samples[:, ops.WHOLE_BY_INTERSECTION] = whole.by_intersection
            of_samples[:, ops.WHOLE_BY_PREDICTION] = whole.by_prediction
            label_values = lab.evaluate(ratio, numbers[ops.MISSING], lab.sizes, whole.value)
            output_values = out.evaluate(ratio, numbers[ops.MISSING], out.sums[..., ops.LABEL], whole.value)
        of_all = (None, None) if totals is None else totals.numpy()
        for column, side, of_side, term, total in (
            (ops.BY_OUTPUT, out, output_values, ops.INSTANCE_OUTPUT, of_all[0]),
            (ops.BY_LABEL, lab, label_values, ops.INSTANCE_LABEL, of_all[1]),
        ):
            of_samples[:, column] = side.weights(reduction, classes, total)
            results[term] = (of_samples[:, column] * of_side.sum(1)).sum()

        if distances is not None:
            slopes[..., ops.DISTANCE] = distances.numpy()
            difference = (lab.slopes[..., ops.DISTANCE] * label_values).sum(1)
            difference -= (out.slopes[..., ops.DISTANCE] * output_values).sum(1)
            too_many = np.where(out.alone, num_outputs, 0)
            results[ops.PROXIMITY] = (difference**2 + too_many).mean()
            of_samples[:, ops.BY_DISTANCE] = 2.0 * difference / batch

        if owned is not None:
            results[ops.CENTER] = _center(out, lab, owned.numpy().astype(np.float64), numbers)
        untouched = out.sums[..., ops.OVERLAP] == 0, lab.sums[..., ops.TOUCHED] == 0
        correct, detected = out.used & ~untouched[0], lab.sums[..., ops.OVERLAP] > 0
        smoother = numbers[ops.SMOOTHER]
        results[ops.FALSE_INSTANCES] = out.mistakes(correct, untouched[0], 1.0, smoother, rates)
        results[ops.MISSED_INSTANCES] = lab.mistakes(detected, untouched[1], -1.0, smoother, rates)

        healthy = float(health)
        of_samples[:, : ops.BY_DISTANCE + 1] *= healthy
        slopes[..., : ops.BY_FALSE + 1] *= healthy
    return torch.from_numpy(results * healthy), torch.from_numpy(slopes), torch.from_numpy(of_samples)


def _center(out: _Side, lab: _Side, owned: Numbers, numbers: list[float]) -> float:
    """The criterion on centre boxes; its slopes by the mass of each output are noted."""
    of_outputs, of_labels = np.split(owned, 2)
    outside, inside = (np.where(out.used, of_outputs[..., side], 0.0) for side in (0, 1))
    alone = np.where(lab.used, of_labels[..., 0], 0.0).sum(1)
    ratio, slopes = numbers[ops.CENTER_RATIO : ops.CENTER_SLOPES], numbers[ops.CENTER_SLOPES : ops.SMOOTHER]
    in_both, in_outputs = inside.sum(1), outside.sum(1)
    counted = np.stack((in_both, in_outputs, alone), axis=-1)
    below = counted @ ratio[4:7] + ratio[7]
    value = (counted @ ratio[0:3] + ratio[3]) / below
    by_inside, by_outside = ((slopes[i] - value * slopes[i + 2]) / (below * len(value)) for i in (0, 1))
    by_height = by_inside[:, None] * inside + by_outside[:, None] * outside
    out.slopes[..., ops.BY_CENTER] = by_height / out.sizes
    return float(value.mean())


def terms_backward(
    grad_terms: Tensor, slopes: Tensor, sample_slopes: Tensor, counts: Tensor, masses: bool, values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `terms_backward` (ops.py)."""
    grads, of_samples = grad_terms.numpy(), sample_slopes.numpy()
    table = np.zeros((*slopes.shape[:2], ops.GRADIENT_COLUMNS))
    of_sample = np.zeros((len(of_samples), ops.SAMPLE_GRADIENT_COLUMNS))
    by_distance = grads[ops.PROXIMITY] * of_samples[:, ops.BY_DISTANCE]
    for of_rows, side, used, term, by_term, mistakes, sign in zip(
        np.split(slopes.numpy(), 2),
        np.split(table, 2),
        counts.numpy()[ops.KEPT :],
        (ops.INSTANCE_OUTPUT, ops.INSTANCE_LABEL),
        (ops.BY_OUTPUT, ops.BY_LABEL),
        (ops.FALSE_INSTANCES, ops.MISSED_INSTANCES),
        (-1.0, 1.0),
        strict=True,
    ):
        if masses:
            side[..., ops.MASS] = grads[ops.CENTER] * of_rows[..., ops.BY_CENTER]
            side[..., ops.MASS] += grads[mistakes] * of_rows[..., ops.BY_FALSE]
        if values:
            by_value = grads[term] * of_samples[:, by_term, None]
            by_value = by_value + sign * by_distance[:, None] * of_rows[..., ops.DISTANCE]
            side[..., ops.INTERSECTION] = by_value * of_rows[..., ops.BY_INTERSECTION]
            side[..., ops.COST] = by_value * of_rows[..., ops.BY_PREDICTION]
            alone = used == 0
            of_sample[alone] += by_value[alone, :1] * of_samples[alone, ops.WHOLE_BY_INTERSECTION :]
    pixel = grads[ops.PIXEL] * of_samples[:, : ops.PIXEL_BY_PREDICTION + 1]
    return torch.from_numpy(table), torch.from_numpy(of_sample), torch.from_numpy(pixel)
