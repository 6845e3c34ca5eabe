"""Fused criteria as numbers, for the operators: first without the shape of a volume, then with it.

`describe` is what a request keeps: each criterion as its ten factors, and its quantity. `numbers` is what the backends
calculate with, the list whose places ops.py names: each criterion as a ratio of two linear functions of sums.
"""

import functools

from . import ops, quantities
from .criteria import ONE, FusedCriterion, Linear

# A criterion that is not asked for, or whose values are given: 0 / 1, whatever the sums.
_NOTHING = FusedCriterion("mass", Linear())
# Of a criterion, the factors of its numerator and of its denominator, and the code of its quantity.
_FACTORS = 11


def describe(
    pixel: FusedCriterion | None, instance: FusedCriterion | None, center: FusedCriterion | None, smoother: float
) -> tuple[float, ...]:
    """Three criteria, each None if it is not asked for, without the shape of a volume."""
    described: list[float] = []
    for form in (pixel, instance, center):
        form = form or _NOTHING
        for line in (form.numerator, form.denominator or ONE):
            described += line.intersection, line.prediction, line.label, line.voxels, line.constant
        described.append(form.code)
    of_batch = pixel is not None and pixel.batch == "mean"
    return (*described, float(of_batch), float(center is not None), smoother)


@functools.lru_cache(maxsize=1024)
def numbers(described: tuple[float, ...], voxels: int, samples: int, classes: int) -> tuple[float, ...]:
    """The numbers of criteria for a batch of so many samples of so many voxels, in `classes` classes."""
    *factors, of_batch, has_center, smoother = described
    pixel, instance, center = (factors[i * _FACTORS : (i + 1) * _FACTORS] for i in range(3))
    of_pixel, of_instance, of_center = (_ratio(each, voxels) for each in (pixel, instance, center))
    times = 1.0 / (samples if of_batch else classes)
    of_pixel[:4] = (times * number for number in of_pixel[:4])
    centers = _of_boxes(of_center, int(center[-1]), 1.0 + smoother) if has_center else [*of_center, 0.0, 0.0, 0.0, 0.0]
    return (*of_pixel, *of_instance, quantities.UNPREDICTED[int(instance[-1])], *centers, smoother)


def _ratio(factors: list[float], voxels: int) -> list[float]:
    """What intersection, prediction and label are multiplied by, and a constant: above the line, then below."""
    ratio: list[float] = []
    for intersection, prediction, label, by_voxels, constant in (factors[:5], factors[5:10]):
        ratio += intersection, prediction, label, constant + by_voxels * voxels
    return ratio


def _of_boxes(ratio: list[float], code: int, peak: float) -> list[float]:
    """The criterion of centre boxes as a ratio of linear functions of numbers of voxels, and by heights of boxes.

    In both kinds of box a voxel adds `peak` squared to the intersection, and so on; a box's height is `peak`.
    """
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


assert len(numbers(describe(None, None, None, 1.0), 1, 1, 1)) == ops.NUMBERS
