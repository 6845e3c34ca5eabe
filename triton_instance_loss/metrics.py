"""Instance metrics from the tables that the losses are made of: `instance_metrics`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, quantities
from .activation import Given, check_and_widen, health_of, to_activate, to_compare, to_volume
from .components import rows_of_tables
from .instances import Found, find
from .options import Options


class InstanceMetrics(NamedTuple):
    """What `instance_metrics` returns; each field is (B,), one number a sample, or of several classes (B, classes)."""

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


class _Matches(NamedTuple):
    """What a matching finds in each sample, (B,) float64."""

    detected: Tensor  # matched labels
    correct: Tensor  # matched outputs
    iou: Tensor  # summed over the matched labels
    dice: Tensor


@checks.not_scriptable
def instance_metrics(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    matching: Literal["overlap", "iou"] = "overlap",
    iou_threshold: float = 0.5,
    activation: str = "sigmoid",
    num_out_chn: int = 1,
    object_chn: int | Sequence[int] = 1,
    spatial_dims: int = 3,
    num_iterations: int | None = None,
    segmentation_threshold: float | None = None,
    min_instance_size: int = 0,
    to_onehot_y: bool = False,
    ignore_index: float | None = None,
) -> InstanceMetrics:
    """Count matched, missed and false instances of each sample, and say how well they match.

    With n_O outputs O_i and n_L labels L_j, the same instances that the losses see, all of them:

    - "overlap": a label is matched if an output touches it, and an output is correct if it touches a label. Label j is
      compared with the union U_j of all outputs that touch it: IoU_j = |L_j and U_j| / |L_j or U_j|.
    - "iou": O_i and L_j match, one to one, if their IoU is above `iou_threshold`, and both are matched and correct.
      From 0.5 on there is no choice: no other instance can have as large an IoU with either of them.

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
    mean.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional precomputed components of `labels`: 0 = background, any positive
            whole number = an instance.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        matching: "overlap" or "iou".
        iou_threshold: from 0.5 to 1, used with "iou" alone; a pair has to be above it.
        activation: "sigmoid", "softmax" or "none"; this and all that follow are as in `InstanceLoss`.
        num_out_chn: channels of `outputs`.
        object_chn: the channel that is looked at, counted from 0, if there are several; or several of them.
        spatial_dims: 2 or 3.
        num_iterations: None for whole components, or rounds of max-pooling as in the published code.
        segmentation_threshold: an output voxel is foreground from here on. None: 0.5, and with "softmax" where the
            class has the largest probability (of equally large ones the first).
        min_instance_size: components of this many voxels or fewer are background, on both sides.
        to_onehot_y: `labels` are (B, 1, *spatial) and hold the number of a class.
        ignore_index: voxels of this label are ignored.

    Returns:
        `InstanceMetrics`, a named tuple of tensors (B,), or (B, classes) if `object_chn` is a sequence, in float32, or
        float64 if `outputs` is, on their device. Counts are whole numbers. A sample with NaN or infinity in what is
        looked at of its outputs has NaN in every field; finite outputs never give NaN.

    Raises:
        TypeError: An argument has the wrong type (integer or complex `outputs`, ...).
        ValueError: An option or shape is not allowed, or the tensors do not fit each other; and, looked for on the CPU
            always, on CUDA if the environment variable TRITON_INSTANCE_LOSS_DEBUG is 1: labels that are neither 0 nor
            1, and, with "sigmoid", outputs that all lie in [0, 1], as probabilities or a mask do.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Not differentiable, deterministic on every device, and without a synchronisation with the host on CUDA: that
        comes when a value is read. "overlap" costs as much as the forward of a loss. "iou" sorts one int64 key a
        voxel, which takes 24 bytes a voxel and what the sort itself needs; on the CPU, where counting is free, only
        keys where outputs and labels overlap are sorted.

        Unlike the losses, metrics have no `max_cc_out` and no `mul_too_many`.

    Source:
        Panoptic quality: Kirillov et al., CVPR 2019. Values and names of "iou" are those of panoptica (Kofler et al.,
        2023; its `NaiveThresholdMatching` with `strict_threshold`, as in the paper), except that it has NaN where both
        volumes are empty. Lesion-wise F1 from two ratios: the WMH segmentation challenge, Kuijf et al., TMI 2019.

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
    checks.choice("matching", matching, ("overlap", "iou"))
    iou_threshold = checks.number("iou_threshold", iou_threshold, 0.5, 1.0)
    options = Options(
        activation=activation,
        num_out_chn=num_out_chn,
        object_chn=object_chn,
        spatial_dims=spatial_dims,
        num_iterations=num_iterations,
        segmentation_threshold=segmentation_threshold,
        min_instance_size=min_instance_size,
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        max_cc_out=0,  # every output is kept,
        mul_too_many=checks.MAX_VOXELS,  # and there are never too many
    )
    given = check_and_widen(outputs, labels, cc_label_batch, ignore_mask, options)
    if activation == "sigmoid" and (suspicion := checks.logits(outputs, activation, given.ignored)) is not None:
        raise ValueError(suspicion)
    with torch.no_grad(), torch.autocast(given.outputs.device.type, enabled=False):
        x, truth = _to_activate(given, options), to_compare(given, options)
        pixel = ops.NOT_FUSED, quantities.MASS
        found = find(x, truth, given.ids, pixel, options)
        matches = _match_by_overlap(x, found) if matching == "overlap" else _match_by_iou(x, found, iou_threshold)
        health = found.health
        num_outputs, num_labels = found.counts[ops.OUTPUTS].double(), found.counts[ops.LABELS].double()
        metrics = _from_matches(num_outputs, num_labels, matches)
        shape = (len(given.outputs), len(options.classes))
        looked_at = given.outputs.flatten(1)[:, None] if activation == "softmax" else x.view(*shape, -1)
        all_well = activation != "softmax" and rows_of_tables(x, 1) == 0 and bool(health == 1)  # where looking is free
        health = health if all_well else health_of(looked_at, truth.view(*shape, -1), dim=2)
        of_classes = (value.view(shape).to(x.dtype) * health for value in metrics)
        single = isinstance(options.object_chn, int)
        return InstanceMetrics(*(value[:, 0] if single else value for value in of_classes))


def _to_activate(given: Given, options: Options) -> Tensor:
    """The volume that the activation works on; of a softmax without a threshold 1 where the class is the largest."""
    if options.activation != "softmax" or options.segmentation_threshold is not None:
        return to_activate(given, options)
    largest = given.outputs.argmax(dim=1, keepdim=True)
    chosen = torch.cat([largest == channel for channel in options.channels], dim=1)
    if given.ignored is not None:
        chosen &= ~given.ignored
    return to_volume(chosen.to(given.outputs.dtype))


def _match_by_overlap(x: Tensor, found: Found) -> _Matches:
    """Match whatever touches; all of it is in the table of sums."""
    # Of a foreground of ones, and without no_tp, COST of a label is the size of all outputs that touch it.
    sums, *_ = ops.sum_instances(
        x, list(found.sites), found.counts, found.geometry, ops.GIVEN, quantities.MASS, False, found.pairs
    )
    out, lab = sums.chunk(2)
    sizes = found.geometry[len(x) :, :, ops.SIZE]
    out_used, lab_used = (ops.first_rows(found.counts[side], out.shape[1]) for side in (ops.OUTPUTS, ops.LABELS))
    detected = lab_used & (lab[..., ops.TOUCHED] > 0)
    correct = out_used & (out[..., ops.OVERLAP] > 0)
    return _summed(detected, correct, lab[..., ops.TOUCHED], sizes + lab[..., ops.COST])


def _match_by_iou(x: Tensor, found: Found, threshold: float) -> _Matches:
    """Match pairs of IoU above `threshold`, at least 0.5: such a label holds more than half of its output.

    So it is the median of the labels that the voxels of its output lie on: sort those, and look at the middle.
    """
    out_sizes, lab_sizes = found.geometry[:, :, ops.SIZE].chunk(2)
    batch, rows = out_sizes.shape
    # One key for each pair of rows, in the order of outputs and then of labels; 0 where either has none.
    base = rows + 1
    if rows_of_tables(x, rows) == 0:  # shapes may depend on data, and sites are lists of voxels
        (voxels,), sides = found.sites
        both = (sides > 0).all(dim=0)
        sample, (out_rows, lab_rows) = voxels[both] // x[0].numel(), sides[:, both].long()
        keys = torch.where(sample == torch.arange(batch)[:, None], out_rows * base + lab_rows, 0)
        keys = torch.nn.functional.pad(keys, (1, 0))
    else:
        _, _, out_rows, lab_rows = (volume.flatten(1) for volume in ops.row_maps(x, list(found.sites)))
        keys = torch.where((out_rows > 0) & (lab_rows > 0), out_rows.long() * base + lab_rows, 0)
    keys = keys.sort(dim=1).values
    # Where the keys of each output begin, and those of the next one.
    begins = torch.searchsorted(keys, (base * torch.arange(1, rows + 2, device=x.device)).repeat(batch, 1))
    middle = (begins[:, :-1] + begins[:, 1:]) // 2
    pair = keys.gather(1, middle.clamp(max=keys.shape[1] - 1))
    shared = torch.searchsorted(keys, pair, right=True) - torch.searchsorted(keys, pair)
    label = pair - base * torch.arange(1, rows + 1, device=x.device)
    used = ops.first_rows(found.counts[ops.OUTPUTS], rows) & (label > 0) & (label < base)
    sizes = out_sizes + lab_sizes.gather(1, label.clamp(1, rows) - 1)
    matched = used & (shared / (sizes - shared) > threshold)
    return _summed(matched, matched, shared, sizes)


def _summed(detected: Tensor, correct: Tensor, shared: Tensor, sizes: Tensor) -> _Matches:
    """Sum over the rows `detected`, where two volumes of `sizes` voxels together share `shared`."""
    shared, sizes = shared.double(), sizes.double()
    iou, dice = (
        torch.where(detected, part / whole, 0.0).sum(dim=1)
        for part, whole in ((shared, sizes - shared), (2.0 * shared, sizes))
    )
    return _Matches(detected.sum(dim=1).double(), correct.sum(dim=1).double(), iou, dice)


def _from_matches(num_outputs: Tensor, num_labels: Tensor, matches: _Matches) -> InstanceMetrics:
    """The metrics, in the order of their fields."""
    matched = matches.detected
    missed, false = num_labels - matched, num_outputs - matches.correct
    sensitivity, precision = _ratio(matched, num_labels, 1.0), _ratio(matches.correct, num_outputs, 1.0)
    f1 = _ratio(2.0 * sensitivity * precision, sensitivity + precision, 0.0)
    recognition = _ratio(matched, matched + (false + missed) / 2.0, 1.0)
    without_match = (num_outputs + num_labels == 0).double()
    segmentation, dice = (_ratio(total, matched, without_match) for total in (matches.iou, matches.dice))
    quality = (recognition, segmentation, recognition * segmentation, dice)
    return InstanceMetrics(num_outputs, num_labels, matched, missed, false, sensitivity, precision, f1, *quality)


def _ratio(part: Tensor, whole: Tensor, otherwise: Tensor | float) -> Tensor:
    """Elementwise part / whole, or `otherwise` where whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), otherwise)
