"""SPEC.md stated plainly: a full volume for every instance, loops over pairs, and torch autograd. Slow on purpose.

Nothing here is clever, shared with the library, or tuned: it is what the library is measured against. All arithmetic
is in the dtype of `outputs` (half precision is widened to float32), so call it in float64 for the truth.
Volumes of one sample are (1, 1, *spatial), instances are boolean masks of that shape, boxes are lists of integers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]

TERMS = (
    "pixel",
    "instance_label",
    "instance_output",
    "center",
    "false_instances",
    "missed_instances",
    "proximity",
)


def reference_terms(
    outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Compute the seven terms as 0-d tensors by name, connected to `outputs` by autograd; options as below."""
    return reference_details(outputs, labels, cc_label_batch, **options)[0]


def reference_details(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    loss_function_pixel: Criterion | None = None,
    loss_function_instance: Criterion | None = None,
    loss_function_center: Criterion | None = None,
    activation: str = "sigmoid",
    num_out_chn: int = 1,
    object_chn: int = 1,
    spatial_dims: int = 3,
    reduce_segmentation: str = "mean",
    instance_wise_reduce: str = "instance",
    num_iterations: int | None = None,
    segmentation_threshold: float | None = None,
    max_cc_out: int = 4096,
    mul_too_many: float = 50,
    min_instance_size: int = 0,
    centroid_offset: float = 3,
    smoother: float = 1e-7,
    instance_wise_loss_no_tp: bool = True,
    rate_instead_number: bool = False,
    gradients: str = "surrogate",
    spacing: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], list["SampleTerms"]]:
    """Compute the terms, and what they are made of: the terms of each sample (none if an output is not finite)."""
    if outputs.shape[1] != num_out_chn or outputs.ndim != spatial_dims + 2:
        raise ValueError(f"outputs {tuple(outputs.shape)} do not fit num_out_chn and spatial_dims.")
    x = outputs if outputs.dtype == torch.float64 else outputs.float()
    channel = 0 if num_out_chn == 1 else object_chn
    label_channel = channel if labels.shape[1] == num_out_chn else 0
    raw_labels = labels.to(x.dtype)
    one_label = raw_labels[:, label_channel : label_channel + 1]
    y = (labels[:, label_channel : label_channel + 1] > 0.5).to(x.dtype)

    seen = x if activation == "softmax" else x[:, channel : channel + 1]
    if not torch.isfinite(seen).all():
        return dict.fromkeys(TERMS, (x * math.nan).sum()), []

    if segmentation_threshold is None:
        segmentation_threshold = 1 / num_out_chn if activation == "softmax" else 0.5
    soft = soft_activation(x, activation, channel)
    a = activate(soft, y, activation, segmentation_threshold, gradients)
    logarithms = log_probabilities(x, activation, channel) if gradients == "log" and activation != "none" else None

    if loss_function_pixel is None:
        pixel = dice(soft, y)
    elif activation == "softmax":
        pixel = loss_function_pixel(a, one_label)
    else:
        pixel = loss_function_pixel(x, raw_labels)

    samples = []
    for b in range(outputs.shape[0]):
        given = None if cc_label_batch is None else cc_label_batch[b : b + 1]
        samples.append(
            sample_terms(
                a[b : b + 1],
                y[b : b + 1],
                given,
                logarithms=None if logarithms is None else tuple(each[b : b + 1] for each in logarithms),
                criterion=loss_function_instance or dice,
                center_criterion=loss_function_center or dice,
                num_iterations=num_iterations,
                segmentation_threshold=segmentation_threshold,
                max_cc_out=max_cc_out,
                mul_too_many=mul_too_many,
                min_instance_size=min_instance_size,
                centroid_offset=centroid_offset,
                smoother=smoother,
                no_tp=instance_wise_loss_no_tp,
                rates=rate_instead_number,
                surrogate=gradients != "reference",
                spacing=spacing or [1.0] * spatial_dims,
            )
        )

    def reduce_instances(values_of_samples: list[list[Tensor]]) -> Tensor:
        if instance_wise_reduce == "instance":
            return torch.stack([value for values in values_of_samples for value in values]).mean()
        reduced = [torch.stack(values).mean() for values in values_of_samples]
        if reduce_segmentation == "sum":
            reduced = [torch.stack(values).sum() for values in values_of_samples]
        return torch.stack(reduced).mean()

    terms = {
        "pixel": pixel,
        "instance_label": reduce_instances([sample.instance_label for sample in samples]),
        "instance_output": reduce_instances([sample.instance_output for sample in samples]),
        "center": torch.stack([sample.center for sample in samples]).mean(),
        "false_instances": torch.stack([sample.false_instances for sample in samples]).mean(),
        "missed_instances": torch.stack([sample.missed_instances for sample in samples]).mean(),
        "proximity": torch.stack([sample.proximity for sample in samples]).mean(),
    }
    nothing = (x * 0).sum()  # so that a term without a gradient still has one, of zeros
    return {name: terms[name] + nothing for name in TERMS}, samples


def dice(prediction: Tensor, label: Tensor) -> Tensor:
    """Dice loss with 1e-5 above and below, mean over samples: what the library uses where no loss is given."""
    dims = tuple(range(1, prediction.ndim))
    intersection = (prediction * label).sum(dims)
    masses = prediction.sum(dims) + label.sum(dims)
    return (1 - (2 * intersection + 1e-5) / (masses + 1e-5)).mean()


# Section 3: activation


def soft_activation(x: Tensor, activation: str, channel: int) -> Tensor:
    """Probabilities of the object channel (the raw channel with "none"), (B, 1, *spatial)."""
    if activation == "sigmoid":
        return torch.sigmoid(x[:, channel : channel + 1])
    if activation == "softmax":
        return torch.softmax(x, dim=1)[:, channel : channel + 1]
    return x[:, channel : channel + 1]


def activate(soft: Tensor, y: Tensor, activation: str, threshold: float, gradients: str) -> Tensor:
    """Return `a`: binary for "sigmoid" and "softmax", with the derivative of `soft` if surrogate, else none.

    A binary output has none where neither it nor the label is foreground: there it is right.
    """
    if activation == "none":
        return soft
    hard = (soft >= threshold).to(soft.dtype)
    return hard + ((soft - soft.detach()) * torch.maximum(hard, y) if gradients != "reference" else 0)


def log_probabilities(x: Tensor, activation: str, channel: int) -> tuple[Tensor, Tensor]:
    """Log p and log(1 - p) of the object channel."""
    if activation == "sigmoid":
        return F.logsigmoid(x[:, channel : channel + 1]), F.logsigmoid(-x[:, channel : channel + 1])
    others = [other for other in range(x.shape[1]) if other != channel]
    whole = torch.logsumexp(x, dim=1, keepdim=True)
    return x[:, channel : channel + 1] - whole, torch.logsumexp(x[:, others], dim=1, keepdim=True) - whole


# Section 2: instances


def reference_components(mask: Tensor, num_iterations: int | None = None) -> Tensor:
    """Ids of the components of a (B, 1, *spatial) mask, int64: rounds of masked 3x3(x3) max-pooling of index + 1.

    `num_iterations=None` pools until nothing changes, which finds whole components. 0 is background.
    """
    mask = mask.bool()
    pool = F.max_pool3d if mask.ndim == 5 else F.max_pool2d
    indices = torch.arange(1, mask[0].numel() + 1, dtype=torch.float64).reshape(mask[0].shape).to(mask.device)
    ids = indices * mask
    rounds = 0
    while num_iterations is None or rounds < num_iterations:
        pooled = pool(ids, kernel_size=3, stride=1, padding=1) * mask
        if torch.equal(pooled, ids):
            break
        ids = pooled
        rounds += 1
    return ids.long()


def instances_of(ids: Tensor, min_instance_size: int) -> list[Tensor]:
    """List the masks of the instances of one sample in id order, those above `min_instance_size` voxels."""
    masks = [ids == number for number in torch.unique(ids).tolist() if number > 0]
    return [mask for mask in masks if int(mask.sum()) > min_instance_size]


def touches(one: Tensor, other: Tensor) -> bool:
    """Whether two masks share a voxel."""
    return bool((one & other).any())


def union(masks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Voxels in any of the masks; nowhere if there are none."""
    result = torch.zeros_like(like, dtype=torch.bool)
    for mask in masks:
        result = result | mask
    return result


# Section 4: the terms of one sample


@dataclass
class SampleTerms:
    """The terms of one sample before any reduction: lists have one value an instance, sums are those of proximity."""

    instance_label: list[Tensor]
    instance_output: list[Tensor]
    center: Tensor
    false_instances: Tensor
    missed_instances: Tensor
    proximity: Tensor
    label_sum: Tensor
    output_sum: Tensor


def sample_terms(
    a: Tensor,
    y: Tensor,
    given_ids: Tensor | None,
    *,
    logarithms: tuple[Tensor, Tensor] | None,
    criterion: Criterion,
    center_criterion: Criterion,
    num_iterations: int | None,
    segmentation_threshold: float,
    max_cc_out: int,
    mul_too_many: float,
    min_instance_size: int,
    centroid_offset: float,
    smoother: float,
    no_tp: bool,
    rates: bool,
    surrogate: bool,
    spacing: Sequence[float],
) -> SampleTerms:
    """Compute the terms of one sample from the activated output `a` and the label `y`, both (1, 1, *spatial).

    `logarithms` are log p and log(1 - p) where the gradient of mistakes is that of the cross entropy.
    """
    foreground = a.detach() >= segmentation_threshold if segmentation_threshold > 0 else a.detach() == 1
    outputs = instances_of(reference_components(foreground, num_iterations), min_instance_size)
    label_ids = reference_components(y == 1, num_iterations) if given_ids is None else given_ids.long() * (y == 1)
    labels = instances_of(label_ids, min_instance_size)

    too_many = len(labels) > 0 and len(outputs) > len(labels) * mul_too_many
    kept = outputs if max_cc_out == 0 else outputs[:max_cc_out]
    if too_many:
        kept = []
    detected = [label for label in labels if any(touches(output, label) for output in kept)]
    correct = [output for output in kept if any(touches(output, label) for label in labels)]

    whole_sample = criterion(a, y)
    instance_output = [output_value(a, y, output, labels, criterion) for output in kept] or [whole_sample]
    instance_label = [label_value(a, y, label, kept, no_tp, criterion) for label in labels] or [whole_sample]

    label_heights = center_volume([(label, 1 + smoother) for label in labels], y, centroid_offset, spacing)
    output_heights = center_volume(
        [(output, straight_through(1 + smoother, a[output].mean(), surrogate)) for output in kept],
        y,
        centroid_offset,
        spacing,
    )
    center = center_criterion(output_heights, label_heights)

    untouching = [output for output in outputs if not any(touches(output, label) for label in labels)]
    untouched = [label for label in labels if not any(touches(output, label) for output in outputs)]
    log_p, log_not_p = logarithms or (a - 1, -a)  # as a stand for logarithms: a - 1 = -(1 - a)
    false_instances = straight_through(
        y.new_tensor(float(len(outputs) - len(correct))),
        sum((-log_not_p[output].mean() for output in untouching), start=a.new_zeros(())),
        surrogate,
    )
    missed_instances = straight_through(
        y.new_tensor(float(len(labels) - len(detected))),
        sum((-log_p[label].mean() for label in untouched), start=a.new_zeros(())),
        surrogate,
    )
    if rates:
        false_instances = false_instances / (len(outputs) + smoother)
        missed_instances = missed_instances / (len(labels) + smoother)

    shape = list(y.shape[2:])
    output_boxes = [extended_box(output, shape) for output in kept] or [middle_box(shape)]
    label_boxes = [extended_box(label, shape) for label in labels] or [middle_box(shape)]
    label_sum = sum(
        min(diou(output_box, box, spacing) for output_box in output_boxes) * value
        for box, value in zip(label_boxes, instance_label, strict=True)
    )
    output_sum = sum(
        min(diou(box, label_box, spacing) for label_box in label_boxes) * value
        for box, value in zip(output_boxes, instance_output, strict=True)
    )
    proximity = (label_sum - output_sum) ** 2 + (len(outputs) if too_many else 0)

    return SampleTerms(
        instance_label,
        instance_output,
        center,
        false_instances,
        missed_instances,
        proximity,
        label_sum,
        output_sum,
    )


def straight_through(value: Tensor | float, soft: Tensor, surrogate: bool) -> Tensor:
    """Give `value` in forward and, if `surrogate`, the derivative of `soft` in backward."""
    return value + (soft - soft.detach()) if surrogate else soft.detach() * 0 + value


def output_value(a: Tensor, y: Tensor, output: Tensor, labels: list[Tensor], criterion: Criterion) -> Tensor:
    """Compute c(a * 1[O_i], y * 1[union of D(i)])."""
    touched = [label for label in labels if touches(output, label)]
    return criterion(a * output, y * union(touched, y))


def label_value(a: Tensor, y: Tensor, label: Tensor, kept: list[Tensor], no_tp: bool, criterion: Criterion) -> Tensor:
    """Compute c(a * m_j, y * 1[L_j])."""
    weight = union([output for output in kept if touches(output, label)], y).to(a.dtype)
    if no_tp:
        background = (y == 0).to(a.dtype)
        weight = weight * (a.detach() * background + label.to(a.dtype))
    return criterion(a * weight, y * label)


def center_volume(
    instances: list[tuple[Tensor, Tensor | float]], like: Tensor, centroid_offset: float, spacing: Sequence[float]
) -> Tensor:
    """Draw the centre box of each (mask, height) in turn, later ones over earlier ones, on a volume of zeros."""
    volume = torch.zeros_like(like)
    shape = like.shape[2:]
    for mask, height in instances:
        coordinates = mask.nonzero()[:, 2:]
        inside = torch.ones_like(mask)
        for d, dim in enumerate(shape):
            center = -(-int(coordinates[:, d].sum()) // len(coordinates))  # the mean, rounded up
            offset = dim / max(shape) * centroid_offset
            if len(set(spacing)) > 1:
                offset = round(offset * sum(spacing) / len(spacing) / spacing[d], 9)  # without the noise of floats
            offset = math.ceil(offset)
            positions = torch.arange(dim, device=mask.device)
            covered = (positions >= center - offset - 1) & (positions < center + offset)
            inside = inside & covered.reshape([-1 if e == d + 2 else 1 for e in range(mask.ndim)])
        volume = torch.where(inside, torch.as_tensor(height, dtype=like.dtype, device=like.device), volume)
    return volume


@dataclass
class Box:
    """A box [lows, highs) and its centre, one integer an axis."""

    lows: list[int]
    highs: list[int]
    center: list[int]


def extended_box(mask: Tensor, shape: list[int]) -> Box:
    """Box of an instance, extended on each side by its own extent (at least 1), and clipped to the volume."""
    coordinates = mask.nonzero()[:, 2:]
    lows, highs = [], []
    for d, dim in enumerate(shape):
        low, high = int(coordinates[:, d].min()), int(coordinates[:, d].max())
        extent = max(high - low, 1)
        lows.append(max(low - extent - 1, 0))
        highs.append(min(high + extent, dim))
    return Box(lows, highs, [low + math.ceil((high - low) / 2) for low, high in zip(lows, highs, strict=True)])


def middle_box(shape: list[int]) -> Box:
    """Box in the middle of the volume that stands for "no instances"."""
    middle = [dim // 2 for dim in shape]
    return Box([q - 1 for q in middle], [q + 1 for q in middle], middle)


def diou(one: Box, other: Box, spacing: Sequence[float]) -> float:
    """Compute 1 - IoU + d^2 / (diag^2 + 1e-7) of two boxes, d and diag in units of the spacing."""
    axes = range(len(one.lows))
    volumes = [math.prod(box.highs[d] - box.lows[d] for d in axes) for box in (one, other)]
    shared = math.prod(max(min(one.highs[d], other.highs[d]) - max(one.lows[d], other.lows[d]), 0) for d in axes)
    distance = sum((spacing[d] * (one.center[d] - other.center[d])) ** 2 for d in axes)
    around = [max(one.highs[d], other.highs[d]) - min(one.lows[d], other.lows[d]) for d in axes]
    diagonal = sum((spacing[d] * around[d]) ** 2 for d in axes)
    return 1 - shared / (sum(volumes) - shared) + distance / (diagonal + 1e-7)
