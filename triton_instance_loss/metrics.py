"""Instance metrics from the tables that the losses are made of.

`instance_metrics` counts and compares; `average_precision` and `aggregated_jaccard_index` are for label maps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks, ops
from .activation import without_autocast
from .matching import Matches, Matching, Rules, Sides, find_sides, majorities, match, rules, touching_pairs

# Those of the 2018 Data Science Bowl.
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class InstanceMetrics(NamedTuple):
    """What `instance_metrics` returns.

    Each field is (B,), one number a sample; of several classes (B, classes); with `sizes` it has one more axis at the
    end, of the strata.
    """

    num_outputs: Tensor
    num_labels: Tensor
    matched: Tensor
    missed: Tensor
    false: Tensor
    sensitivity: Tensor
    precision: Tensor
    f1: Tensor
    recognition_quality: Tensor
    segmentation_quality: Tensor
    panoptic_quality: Tensor
    dice: Tensor


@checks.not_scriptable
def instance_metrics(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    cc_output_batch: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    matching: Matching = "overlap",
    iou_threshold: float = 0.5,
    dilation: int = 3,
    sizes: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
    activation: str = "sigmoid",
    num_out_chn: int = 1,
    object_chn: int | Sequence[int] = 1,
    spatial_dims: int = 3,
    num_iterations: int | None = None,
    segmentation_threshold: float | None = None,
    min_instance_size: float = 0,
    to_onehot_y: bool = False,
    ignore_index: float | None = None,
) -> InstanceMetrics:
    """Count matched, missed and false instances of each sample, and say how well they match.

    With n_O outputs O_i and n_L labels L_j, the same instances that the losses see, all of them:

    - "overlap": a label is matched if an output touches it, and an output is correct if it touches a label. Label j is
      compared with the union U_j of all outputs that touch it: IoU_j = |L_j and U_j| / |L_j or U_j|.
    - "iou": O_i and L_j match, one to one, if their IoU is above `iou_threshold`, and both are matched and correct.
      From 0.5 on there is no choice: no other instance can have as large an IoU with either of them.
    - "dilated": as "overlap", with labels that reach `dilation` voxels farther. Components of the dilated labels are
      the label instances, so that labels close to each other are one; an output that touches the dilated label matches
      it. IoU and Dice are with the label as it was, and 0 where the two do not meet.

    The fields are:

    - num_outputs, num_labels: n_O, n_L.
    - matched: number of matched labels, TP.
    - missed: n_L - matched, FN.
    - false: n_O less the number of correct outputs, FP.
    - sensitivity: matched / n_L.
    - precision: correct outputs / n_O.
    - f1: harmonic mean of sensitivity and precision, the lesion-wise F1; 0 if both are 0.
    - recognition_quality: RQ = TP / (TP + FP / 2 + FN / 2); with "iou" the same as f1.
    - segmentation_quality: SQ, the mean IoU of the matched labels.
    - panoptic_quality: RQ * SQ.
    - dice: mean Dice of the matched labels, of the same pairs as IoU.

    A share of nothing is 1: sensitivity without labels, precision without outputs, RQ without either. SQ and dice
    without a match are 0, or 1 if there is no instance at all. So two empty volumes have 1 everywhere, and if only one
    of them is empty f1, RQ, SQ, dice and panoptic_quality are 0. `num_labels` tells which samples to leave out of a
    mean. In a stratum of `sizes` the same holds of its instances.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional numbers of the label instances, looked at where `labels` are
            foreground: 0 = in no instance, any positive whole number = an instance. None: connected components.
        cc_output_batch: (B, 1, *spatial), optional: the same of the outputs, for instances that touch each other. Of
            a label map, give `(numbers > 0).float()` as `outputs` with `activation="none"`, and `numbers` here.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        matching: "overlap", "iou" or "dilated".
        iou_threshold: from 0.5 to 1, used with "iou" alone; a pair has to be above it.
        dilation: a whole number of steps from 1 on, used with "dilated" alone. A step goes to voxels that share a face
            or an edge, in 2D also a corner.
        sizes: ascending numbers above 0: where strata of sizes begin. (10, 100) makes three: below 10, from 10 on, and
            from 100 on. A label counts in the stratum of its own size, and so does an output. None: no strata.
        spacing: the size of a voxel along each axis, in mm. With it, `sizes` and `min_instance_size` are in mm^3 (in
            2D mm^2), without it in voxels.
        activation: "sigmoid", "softmax" or "none"; this and all that follow are as in `InstanceLoss`.
        num_out_chn: channels of `outputs`.
        object_chn: the channel that is looked at, counted from 0, if there are several; or several of them.
        spatial_dims: 2 or 3.
        num_iterations: None for whole components, or rounds of max-pooling as in the published code.
        segmentation_threshold: an output voxel is foreground from here on. None: 0.5, and with "softmax" where the
            class has the largest probability (of equally large ones the first).
        min_instance_size: instances of this size or smaller are background, on both sides; a whole number of voxels,
            or with `spacing` any number of mm^3. With "dilated", labels that are one are measured together.
        to_onehot_y: `labels` are (B, 1, *spatial) and hold the number of a class.
        ignore_index: voxels of this label are ignored.

    Returns:
        `InstanceMetrics`, a named tuple of tensors (B,), or (B, classes) if `object_chn` is a sequence, with `sizes`
        (B, strata) or (B, classes, strata); in float32, or float64 if `outputs` is, on their device. Counts are whole
        numbers, and add up over strata. A sample with NaN or infinity in what is looked at of its outputs has NaN in
        every field; finite outputs never give NaN.

    Raises:
        TypeError: An argument has the wrong type (integer or complex `outputs`, ...).
        ValueError: An option or shape is not allowed, or the tensors do not fit each other; `cc_label_batch` or
            `num_iterations` with "dilated"; and, looked for on the CPU always, on CUDA if the environment variable
            TRITON_INSTANCE_LOSS_DEBUG is 1: labels that are neither 0 nor 1, numbers of instances that are negative or
            not whole, and, with "sigmoid", outputs that all lie in [0, 1], as probabilities or a mask do.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Not differentiable, deterministic on every device, and without a synchronisation with the host on CUDA: that
        comes when a value is read. "overlap" costs as much as the forward of a loss. "iou" sorts one int64 key a
        voxel, which takes 24 bytes a voxel and what the sort itself needs; on the CPU, where counting is free, only
        keys where outputs and labels overlap are sorted. "dilated" labels once more, and sums twice. On CUDA, given
        numbers of instances take tables with a row for each voxel, about 250 bytes.

        Unlike the losses, metrics have no `max_cc_out` and no `mul_too_many`.

    Source:
        Panoptic quality: Kirillov et al., CVPR 2019. Values and names of "iou" are those of panoptica (Kofler et al.,
        2023; its `NaiveThresholdMatching` with `strict_threshold`, as in the paper), except that it has NaN where both
        volumes are empty. Lesion-wise F1 from two ratios: the WMH segmentation challenge, Kuijf et al., TMI 2019.
        "dilated": the lesion-wise scores of BraTS 2023, which dilate 3 times (GLI) or once (METS). Their lesion-wise
        Dice, without the Hausdorff distances and without leaving out small labels, is
        dice * matched / (num_labels + false).

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]]])
        >>> outputs = torch.tensor([[[[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]]]).float()
        >>> found = instance_metrics(outputs, labels, matching="iou", activation="none", spatial_dims=2)
        >>> {name: value.item() for name, value in found._asdict().items() if name in ("matched", "missed", "false")}
        {'matched': 1.0, 'missed': 2.0, 'false': 2.0}
        >>> instance_metrics(outputs, labels, activation="none", spatial_dims=2).matched.item()
        2.0
    """
    asked = rules(
        matching=matching,
        iou_threshold=iou_threshold,
        dilation=dilation,
        spacing=spacing,
        activation=activation,
        num_out_chn=num_out_chn,
        object_chn=object_chn,
        spatial_dims=spatial_dims,
        num_iterations=num_iterations,
        segmentation_threshold=segmentation_threshold,
        min_instance_size=min_instance_size,
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
    )
    limits = asked.sizes("sizes", sizes)
    sides = find_sides(outputs, labels, cc_label_batch, cc_output_batch, ignore_mask, asked)
    with torch.no_grad(), without_autocast(sides.x.device.type):
        found = metrics_of_totals(*_totals(sides, match(sides, asked), limits))
        strata = (len(limits) + 1,) if limits else ()
        return InstanceMetrics(*_of_classes(torch.stack(found), sides, asked, strata).unbind())


def _of_classes(values: Tensor, sides: Sides, asked: Rules, last: tuple[int, ...] = ()) -> Tensor:
    """(..., n, *last) -> (..., B, *last), or (..., B, classes, *last) of several classes; NaN of what is broken."""
    first = values.shape[: values.ndim - 1 - len(last)]
    health = sides.health.view(*sides.health.shape, *[1 for _ in last])
    values = (values.view(*first, *sides.health.shape, *last) * health).to(sides.x.dtype)
    return values.select(len(first) + 1, 0) if isinstance(asked.options.object_chn, int) else values


class Totals(NamedTuple):
    """What metrics are made of, float64: counts, and what is averaged as sums. Of many samples they may be added up."""

    num_outputs: Tensor
    num_labels: Tensor
    matched: Tensor  # labels
    correct: Tensor  # outputs
    iou: Tensor  # over the matched labels
    dice: Tensor


def _totals(sides: Sides, matches: Matches, limits: tuple[int, ...]) -> Totals:
    """Of each sample (n,), or of each of its strata (n, strata)."""
    rows = matches.detected.shape[1]
    counts = sides.found.counts.double()
    num_outputs, num_labels = counts[ops.OUTPUTS], counts[ops.LABELS]
    detected, correct = matches.detected, matches.correct
    shared, both = matches.shared.double(), matches.sizes.double()
    if limits:
        sizes = sides.found.geometry[:, :, ops.SIZE].chunk(2)
        used = (ops.first_rows(sides.found.counts[side], rows) for side in (ops.OUTPUTS, ops.LABELS))
        num_outputs, num_labels = (
            _in_strata(*pair, limits).sum(dim=1).double() for pair in zip(used, sizes, strict=True)
        )
        detected = _in_strata(detected, matches.label_sizes, limits)
        correct = _in_strata(correct, matches.output_sizes, limits)
        shared, both = shared[..., None], both[..., None]
    overlaps = torch.stack((shared / (both - shared), 2.0 * shared / both))
    iou, dice = torch.where(detected, overlaps, 0.0).sum(dim=2).unbind()
    matched, of_outputs = (mask.sum(dim=1, dtype=torch.float64) for mask in (detected, correct))
    return Totals(num_outputs, num_labels, matched, of_outputs, iou, dice)


def _in_strata(mask: Tensor, sizes: Tensor, limits: tuple[int, ...]) -> Tensor:
    """(n, rows) -> (n, rows, strata): which rows of `mask` are in each stratum of sizes."""
    # (compared with numbers of Python, which need no copy to the device)
    above = [mask, *[mask & (sizes >= limit) for limit in limits], torch.zeros_like(mask)]
    return torch.stack([above[place] & ~above[place + 1] for place in range(len(limits) + 1)], dim=-1)


def metrics_of_totals(
    num_outputs: Tensor, num_labels: Tensor, matched: Tensor, correct: Tensor, iou: Tensor, dice: Tensor
) -> InstanceMetrics:
    """The metrics that follow from totals."""
    missed, false = num_labels - matched, num_outputs - correct
    without_match = (num_outputs + num_labels == 0).double()
    always = torch.ones_like(matched)
    # (one ratio of all, which costs what one of them would)
    parts = torch.stack((matched, correct, matched, iou, dice))
    wholes = torch.stack((num_labels, num_outputs, matched + (false + missed) / 2.0, matched, matched))
    otherwise = torch.stack((always, always, always, without_match, without_match))
    sensitivity, precision, recognition, segmentation, overlap = _ratio(parts, wholes, otherwise).unbind()
    f1 = _ratio(2.0 * sensitivity * precision, sensitivity + precision, 0.0)
    quality = (recognition, segmentation, recognition * segmentation, overlap)
    return InstanceMetrics(num_outputs, num_labels, matched, missed, false, sensitivity, precision, f1, *quality)


def _ratio(part: Tensor, whole: Tensor, otherwise: Tensor | float) -> Tensor:
    """Elementwise part / whole, or `otherwise` where whole is 0."""
    return torch.where(whole > 0, part / whole, otherwise)


@checks.not_scriptable
def average_precision(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    cc_output_batch: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    iou_thresholds: Sequence[float] = THRESHOLDS,
    **options: Any,
) -> Tensor:
    """Average precision of the 2018 Data Science Bowl: matched / (matched + missed + false) at several IoUs.

    An output and a label match, one to one, if their IoU is above the threshold, as in `instance_metrics` with "iou".
    The score of the Bowl is the mean over its ten thresholds, which are the default, and then over images. (It is no
    area below a curve of confidences: an instance has none.) 1 where there is no instance on either side.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64, as in `instance_metrics`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional numbers of the label instances.
        cc_output_batch: (B, 1, *spatial), optional numbers of the output instances.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        iou_thresholds: ascending numbers from 0.5 to 1.
        **options: keyword options of `instance_metrics`, same names, checks and defaults, but `matching`,
            `iou_threshold`, `dilation` and `sizes`.

    Returns:
        (B, thresholds), or (B, classes, thresholds) if `object_chn` is a sequence, in float32, or float64 if `outputs`
        is, on their device. NaN for a sample with NaN or infinity in what is looked at of its outputs.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: An option or shape is not allowed, or the tensors do not fit each other.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Not differentiable, deterministic, and without a synchronisation with the host on CUDA. All thresholds cost as
        much as one.

    Source:
        Caicedo et al., Nature Methods 2019. Values are those of `stardist.matching` (its accuracy) and, there,
        `thresh`; there an IoU equal to the threshold is a match, here and in the Bowl it is none.

    Example:
        >>> import torch
        >>> labels, outputs = torch.zeros(2, 1, 1, 4, 8)
        >>> labels[..., :4], outputs[..., 1:4] = 1, 1  # an IoU of 3/4
        >>> average_precision(outputs, labels, activation="none", spatial_dims=2)[0].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    _refuse(options, "average_precision", ("matching", "iou_threshold", "dilation", "sizes"))
    asked = rules(matching="iou", **options)
    thresholds = checks.ascending("iou_thresholds", iou_thresholds, 0.5, 1.0)
    sides = find_sides(outputs, labels, cc_label_batch, cc_output_batch, ignore_mask, asked)
    with torch.no_grad():
        pairs = majorities(sides)
        matched = torch.stack([(pairs.used & (pairs.iou > each)).sum(dim=1) for each in thresholds], dim=-1).double()
        of_both = (sides.found.counts[ops.OUTPUTS] + sides.found.counts[ops.LABELS]).double()[:, None]
        return _of_classes(_ratio(matched, of_both - matched, 1.0), sides, asked, (len(thresholds),))


@checks.not_scriptable
def aggregated_jaccard_index(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    cc_output_batch: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The aggregated Jaccard index (AJI): one intersection over union of all instances of a sample together.

    Each label L_j is paired with the output O_j* of the largest IoU, where one touches it; of equal ones the first. An
    output may be paired with several labels. With the outputs F that are paired with none, AJI =
    sum_j |L_j and O_j*| / (sum_j |L_j or O_j*| + sum_F |O_i|); a label that no output touches adds its size below.
    1 where there is no instance on either side.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64, as in `instance_metrics`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional numbers of the label instances.
        cc_output_batch: (B, 1, *spatial), optional numbers of the output instances.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        **options: keyword options of `instance_metrics`, same names, checks and defaults, but `matching`,
            `iou_threshold`, `dilation` and `sizes`.

    Returns:
        (B,), or (B, classes) if `object_chn` is a sequence, in float32, or float64 if `outputs` is, on their device.
        NaN for a sample with NaN or infinity in what is looked at of its outputs.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: An option or shape is not allowed, or the tensors do not fit each other.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Not differentiable, and deterministic. On CUDA it waits for the device: how many pairs touch is read.

    Source:
        Kumar et al., IEEE TMI 2017, Algorithm 1. (What cellpose calls by this name pairs one to one.)

    Example:
        >>> import torch
        >>> labels, outputs = torch.zeros(2, 1, 1, 4, 8)
        >>> labels[..., :4], outputs[..., 1:4], outputs[..., 0, 6:] = 1, 1, 1
        >>> index = aggregated_jaccard_index(outputs, labels, activation="none", spatial_dims=2)
        >>> round(index.item(), 4)  # 12 / (16 + 2)
        0.6667
    """
    _refuse(options, "aggregated_jaccard_index", ("matching", "iou_threshold", "dilation", "sizes"))
    asked = rules(**options)
    sides = find_sides(outputs, labels, cc_label_batch, cc_output_batch, ignore_mask, asked)
    with torch.no_grad():
        samples, outs, labs, shared = (each.numpy() for each in touching_pairs(sides))
        sizes = sides.found.geometry[:, :, ops.SIZE].cpu()
        counts = sides.found.counts.cpu()[[ops.OUTPUTS, ops.LABELS]].flatten()
        n, rows = len(sizes) // 2, sizes.shape[1]
        out_sizes, lab_sizes = torch.where(ops.first_rows(counts, rows), sizes, 0).view(2, n, rows).numpy()
        union = out_sizes[samples, outs] + lab_sizes[samples, labs] - shared
        # The first of each label, in this order, is its pair.
        order = np.lexsort((outs, -shared / union, labs, samples))
        firsts = order[np.unique((samples * rows + labs)[order], return_index=True)[1]]
        paired = np.zeros((2, n, rows), dtype=bool)
        paired[0, samples[firsts], outs[firsts]] = paired[1, samples[firsts], labs[firsts]] = True
        unpaired = (out_sizes * ~paired[0] + lab_sizes * ~paired[1]).sum(1)
        part = np.bincount(samples[firsts], shared[firsts], n)
        whole = np.bincount(samples[firsts], union[firsts], n) + unpaired
        value = _ratio(torch.from_numpy(part), torch.from_numpy(whole), 1.0).to(sides.x.device)
        return _of_classes(value, sides, asked)


def _refuse(options: dict[str, Any], name: str, without: tuple[str, ...]) -> None:
    """Options of `instance_metrics` that mean nothing here."""
    for each in without:
        if each in options:
            raise TypeError(f"{name} has no option {each}, got {options[each]!r}.")
