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


class _Instances(NamedTuple):
    """The instances of both sides: samples of outputs, then of labels."""

    sums: Numbers  # (2 B, rows, 5)
    sizes: Numbers  # (2 B, rows), at least 1
    counts: NDArray[np.int32]  # (2 B,): all of them
    used: Mask  # (2 B, rows): those with a criterion of their own
    alone: Mask  # (2 B,): without any of these, so that row 0 is the whole sample
    slopes: Numbers  # (2 B, rows, 5), filled step by step

    @classmethod
    def of(cls, sums: Numbers, geometry: NDArray[Any], counts: NDArray[np.int32]) -> "_Instances":
        """From tables, and how many instances there are."""
        used = counts[ops.KEPT :].reshape(-1, 1)
        return cls(
            sums,
            np.maximum(geometry[..., ops.SIZE], 1).astype(np.float64),
            counts[[ops.OUTPUTS, ops.LABELS]].reshape(-1),
            np.arange(sums.shape[1]) < used,
            used[:, 0] == 0,
            np.zeros((*sums.shape[:2], ops.SLOPES_COLUMNS)),
        )

    def evaluate(self, ratio: list[float], missing: float, whole: Numbers) -> Numbers:
        """The criterion of each instance, or of the whole sample in row 0; its slopes are noted."""
        outputs = len(self.sums) // 2
        label = np.concatenate((self.sums[:outputs, :, ops.LABEL], self.sizes[outputs:]))
        cost = self.sums[..., ops.COST] + missing * (label - self.sums[..., ops.OVERLAP])
        sums = np.stack((self.sums[..., ops.INTERSECTION], cost, label), axis=-1)
        result = _evaluate(ratio, sums, self.used)
        self.slopes[..., ops.BY_INTERSECTION] = result.by_intersection
        self.slopes[..., ops.BY_PREDICTION] = result.by_prediction
        result.value[self.alone, 0] = np.tile(whole, 2)[self.alone]
        return result.value

    def weights(self, reduction: int, classes: int, totals: Numbers | None) -> Numbers:
        """What one row of each sample adds to the mean over instances, (2 B,)."""
        counts = np.maximum(self.used.sum(1), 1)
        batch = len(counts) // 2
        if reduction == ops.BY_INSTANCE:
            of_classes = counts.reshape(2, -1, classes).sum(1) if totals is None else totals
            return np.tile(1.0 / (classes * of_classes), batch // classes).reshape(-1)
        each: Numbers = 1.0 / counts if reduction == ops.BY_MEAN else np.ones(len(counts))
        return each / batch

    def share(self, smoother: float, rates: bool) -> Numbers:
        """What one mistake in a sample adds to the mean number or rate of them, (2 B,)."""
        totals: NDArray[Any] = np.where(rates, self.counts + smoother, 1.0)
        return 1.0 / (len(self.counts) // 2 * totals)

    def mistakes(self, share: Numbers) -> Numbers:
        """False and missed instances; the slopes of those that touch nothing are noted."""
        batch = len(self.sums) // 2
        touched = np.concatenate((self.sums[:batch, :, ops.OVERLAP], self.sums[batch:, :, ops.TOUCHED]))
        untouched = (np.arange(self.sums.shape[1]) < self.counts[:, None]) & (touched == 0)
        slopes = np.where(untouched, share[:, None] / self.sizes, 0.0)
        self.slopes[:batch, :, ops.BY_FALSE], self.slopes[batch:, :, ops.BY_FALSE] = slopes[:batch], -slopes[batch:]
        found = (self.used & (self.sums[..., ops.OVERLAP] > 0)).sum(1)
        each: Numbers = (share * (self.counts - found)).reshape(2, batch).sum(1)
        return each

    def center(self, owned: Numbers, numbers: list[float]) -> float:
        """The criterion on centre boxes; its slopes by the mass of each output are noted."""
        of_outputs, of_labels = np.split(np.where(self.used[..., None], owned, 0.0), 2)
        outside, inside = of_outputs[..., 0], of_outputs[..., 1]
        ratio, slopes = numbers[ops.CENTER_RATIO : ops.CENTER_SLOPES], numbers[ops.CENTER_SLOPES : ops.SMOOTHER]
        counted = np.stack((inside.sum(1), outside.sum(1), of_labels[..., 0].sum(1)), axis=-1)
        below = counted @ ratio[4:7] + ratio[7]
        value = (counted @ ratio[0:3] + ratio[3]) / below
        by_inside, by_outside = ((slopes[i] - value * slopes[i + 2]) / (below * len(value)) for i in (0, 1))
        by_height = by_inside[:, None] * inside + by_outside[:, None] * outside
        self.slopes[: len(value), :, ops.BY_CENTER] = by_height / self.sizes[: len(value)]
        return float(value.mean())


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
    instances = _Instances.of(sums.numpy(), geometry.numpy(), counts.numpy())
    batch, slopes = counts.shape[1], instances.slopes
    ratio = numbers[ops.INSTANCE_RATIO : ops.MISSING]
    results = np.zeros(ops.PROXIMITY + 1)
    of_samples = np.zeros((batch, ops.SAMPLE_SLOPES_COLUMNS))
    with np.errstate(all="ignore"):  # NaN and infinity are answers here
        pixel = _evaluate(numbers[ops.PIXEL_RATIO : ops.INSTANCE_RATIO], pixel_sums.numpy())
        results[ops.PIXEL] = pixel.value.sum()
        of_samples[:, ops.PIXEL_BY_INTERSECTION] = pixel.by_intersection
        of_samples[:, ops.PIXEL_BY_PREDICTION] = pixel.by_prediction

        if values is not None:
            of_instances = values.numpy()
        else:
            whole = _evaluate(ratio, sample_sums.numpy(), instances.alone.reshape(2, batch).any(0))
            of_samples[:, ops.WHOLE_BY_INTERSECTION] = whole.by_intersection
            of_samples[:, ops.WHOLE_BY_PREDICTION] = whole.by_prediction
            of_instances = instances.evaluate(ratio, numbers[ops.MISSING], whole.value)
        weights = instances.weights(reduction, classes, None if totals is None else totals.numpy())
        of_samples[:, ops.BY_OUTPUT], of_samples[:, ops.BY_LABEL] = np.split(weights, 2)
        means = (weights * of_instances.sum(1)).reshape(2, batch).sum(1)
        results[ops.INSTANCE_OUTPUT], results[ops.INSTANCE_LABEL] = means

        if distances is not None:
            slopes[..., ops.DISTANCE] = distances.numpy()
            of_outputs, of_labels = (slopes[..., ops.DISTANCE] * of_instances).sum(1).reshape(2, batch)
            difference = of_labels - of_outputs
            too_many = np.where(instances.alone, instances.counts, 0)[:batch]
            results[ops.PROXIMITY] = (difference**2 + too_many).mean()
            of_samples[:, ops.BY_DISTANCE] = 2.0 * difference / batch

        if owned is not None:
            results[ops.CENTER] = instances.center(owned.numpy(), numbers)
        share = instances.share(numbers[ops.SMOOTHER], rates)
        results[[ops.FALSE_INSTANCES, ops.MISSED_INSTANCES]] = instances.mistakes(share)
        of_samples[:, ops.BY_MISTAKE] = share[:batch]

        healthy = float(health)
        of_samples[:, : ops.BY_MISTAKE + 1] *= healthy
        slopes[..., : ops.BY_FALSE + 1] *= healthy
    return torch.from_numpy(results * healthy), torch.from_numpy(slopes), torch.from_numpy(of_samples)


def terms_backward(
    grad_terms: Tensor, slopes: Tensor, sample_slopes: Tensor, counts: Tensor, masses: bool, values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `terms_backward` (ops.py)."""
    grads, of_samples, of_rows = grad_terms.numpy(), sample_slopes.numpy(), slopes.numpy()
    batch = len(of_samples)
    table = np.zeros((*slopes.shape[:2], ops.GRADIENT_COLUMNS))
    of_sample = np.zeros((batch, ops.WHOLE_GRADIENT_COLUMNS))
    if masses:
        of_sample[:, ops.BY_REST] = grads[ops.FALSE_INSTANCES] * of_samples[:, ops.BY_MISTAKE]
        table[..., ops.MASS] = grads[ops.CENTER] * of_rows[..., ops.BY_CENTER]
    if values:
        by_distance = grads[ops.PROXIMITY] * of_samples[:, ops.BY_DISTANCE]
        by_output = grads[ops.INSTANCE_OUTPUT] * of_samples[:, ops.BY_OUTPUT]
        by_label = grads[ops.INSTANCE_LABEL] * of_samples[:, ops.BY_LABEL]
        by_value = np.concatenate((-by_distance, by_distance))[:, None] * of_rows[..., ops.DISTANCE]
        by_value += np.concatenate((by_output, by_label))[:, None]
        table[..., ops.INTERSECTION] = by_value * of_rows[..., ops.BY_INTERSECTION]
        table[..., ops.COST] = by_value * of_rows[..., ops.BY_PREDICTION]
        of_whole = np.where(counts.numpy()[ops.KEPT :] == 0, by_value[:, 0].reshape(2, batch), 0.0).sum(0)
        of_sample[:, : ops.BY_REST] = of_whole[:, None] * of_samples[:, ops.WHOLE_BY_INTERSECTION :]
    pixel = grads[ops.PIXEL] * of_samples[:, : ops.PIXEL_BY_PREDICTION + 1]
    return torch.from_numpy(table), torch.from_numpy(of_sample), torch.from_numpy(pixel)
