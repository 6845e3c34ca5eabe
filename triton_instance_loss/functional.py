"""One function for each term, for who wants just that one; and how the terms of a call are evaluated."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, quantities, slow
from .activation import Given, activated, background, health_of, probabilities, without_autocast
from .components import capacity_bound
from .criteria import (
    DICE,
    DICE_FORM,
    FusedCriterion,
    fused_form,
    refuse_activation,
    refuse_cross_entropy,
    warn_if_slow,
)
from .instances import instances_of_all
from .options import Options
from .regions import Scene
from .terms import TERMS, FusedTerms, apply, request

Criterion = Callable[..., Any]


def evaluate_terms(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None,
    ignore_mask: Tensor | None,
    options: Options,
    names: Collection[str],
    *,
    pixel: Criterion | None = None,
    instance: Criterion | None = None,
    center: Criterion | None = None,
    scene: Scene | None = None,
) -> dict[str, Tensor]:
    """The terms `names`, each a 0-d tensor; a criterion left out is our Dice. Nothing else is computed.

    `scene` is what was made of the tensors, if other losses look at them too.
    """
    inputs, criteria = (outputs, labels, cc_label_batch, ignore_mask), (pixel, instance, center)
    slow_terms, terms, _ = _evaluate(inputs, scene, options, names, criteria, ())
    return _by_name(slow_terms, terms, names)


def evaluate_sum(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None,
    ignore_mask: Tensor | None,
    options: Options,
    weights: Mapping[str, float],
    *,
    pixel: Criterion | None = None,
    instance: Criterion | None = None,
    center: Criterion | None = None,
    scene: Scene | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The sum of weight * term over the terms named in `weights`, and these terms, detached; None if there are none.

    The operator adds up what it evaluates itself, so that a step has no more to do.
    """
    inputs, criteria = (outputs, labels, cc_label_batch, ignore_mask), (pixel, instance, center)
    if torch.compiler.is_compiling():  # it makes one kernel of the sum, and need not know the weights
        of_terms = evaluate_terms(*inputs, options, weights, pixel=pixel, instance=instance, center=center, scene=scene)
        weighted = [weights[name] * term for name, term in of_terms.items()]
        return torch.stack(weighted).sum() if weighted else None, {n: t.detach() for n, t in of_terms.items()}
    of_all = tuple(weights.get(name, 0.0) for name in TERMS)
    slow_terms, terms, total = _evaluate(inputs, scene, options, weights, criteria, of_all)
    for name, term in slow_terms.items():
        total = weights[name] * term if total is None else total + weights[name] * term
    return total, _by_name({name: term.detach() for name, term in slow_terms.items()}, terms, weights)


def _by_name(slow_terms: Mapping[str, Tensor], terms: Tensor | None, names: Collection[str]) -> dict[str, Tensor]:
    """The terms `names`, in the order of TERMS: those of which the criterion was called, and all others, (7,)."""
    of_all = {} if terms is None else dict(zip(TERMS, terms.unbind(), strict=True))
    of_all.update(slow_terms)
    return {name: of_all[name] for name in TERMS if name in names}


class _Evaluated(NamedTuple):
    """What comes of one pass."""

    slow: dict[str, Tensor]  # terms of which the criterion was called
    terms: Tensor | None  # (7,), all others; None if there are none
    total: Tensor | None  # their weighted sum, 0-d


def _evaluate(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    scene: Scene | None,
    options: Options,
    names: Collection[str],
    criteria: tuple[Criterion | None, Criterion | None, Criterion | None],
    weights: tuple[float, ...],
) -> _Evaluated:
    """Evaluate the terms `names` of a call, and the sum of the fused ones with `weights`, one for each of TERMS."""
    alone = scene is None  # nobody else asks what was found
    scene = scene or Scene(*inputs, options)
    pixel, instance, center = criteria[0], *(criterion or DICE for criterion in criteria[1:])
    pixel_form, instance_form, center_form = (DICE_FORM if each is None else fused_form(each) for each in criteria)
    given, x, truth, carrier = scene.given, scene.x, scene.truth, scene.carrier
    seen = _what_pixel_sees(pixel, pixel_form, given, names, options)
    slow_terms: dict[str, Tensor] = {}
    with without_autocast(given.outputs.device.type):
        looked_at = given.outputs if options.activation == "softmax" else x
        if "pixel" in names and seen == ops.NOT_FUSED:
            slow_terms["pixel"] = _pixel(x, carrier, truth, given, pixel, options) * health_of(looked_at, truth)
        if not set(names) - {"pixel"}:
            return _Evaluated(slow_terms, None, None)
        slow_center = "center" in names and center_form is None
        slow_names = {*slow_terms, "center"} if slow_center else slow_terms
        fused = tuple(name for name in TERMS if name in names and name not in slow_names)
        wanted = request(fused, options, seen, (pixel_form, instance_form, center_form))
        given_values = wanted.wants_instances and instance_form is None
        if wanted.wants_instances and wanted.quantity == quantities.CROSS_ENTROPY and not given_values:
            _look_at_cross_entropy(x, options)
        how = scene.search((seen, pixel_form.code if pixel_form else quantities.MASS), options)
        looked_for = None if x is carrier else x.detach(), truth, wanted, weights, how
        if alone and looked_at is x and options.process_group is None and not (slow_center or given_values):
            terms, total, *_, counts = apply(FusedTerms, carrier, None, *looked_for, *(None,) * 7)
            _say_what_is_capped(counts, x, options)
            return _Evaluated(slow_terms, terms, total if weights else None)

        found = scene.find(how)
        _say_what_is_capped(found.counts, x, options)
        if slow_center:
            volumes = slow.volumes(x, carrier, found, options)
            slow_terms["center"] = slow.center(volumes, found, center, options) * health_of(looked_at, truth)
        if not fused:
            return _Evaluated(slow_terms, None, None)
        values: Tensor | None = None
        if given_values:
            volumes = slow.volumes(x, carrier, found, options)
            values = slow.instance_values(volumes, found, instance, options)
        health = found.health
        if looked_at is not x:  # after a softmax, infinity no longer shows
            health = health * health_of(looked_at, truth)
        tables = *found.sites, found.counts, found.geometry, found.pixel_sums, health
        totals = instances_of_all(found.counts, options)
        terms, total, *_ = apply(FusedTerms, carrier, values, *looked_for, *tables, totals)
        return _Evaluated(slow_terms, terms, total if weights else None)


def _look_at_cross_entropy(x: Tensor, options: Options) -> None:
    """Cross entropy of instances wants outputs in [0, 1], and away from both ends."""
    if not options.hard:
        checks.probabilities("loss_function_instance", x)
    elif options.surrogate and not torch.compiler.is_compiling():
        message = (
            "loss_function_instance is a cross entropy, whose derivative is 1e12 at outputs of 0 and 1, which "
            f"activation={options.activation!r} makes. Take another criterion, such as Dice, or probabilities and "
            'activation="none".'
        )
        checks.warn_once(options, "cross entropy", message)


def _say_what_is_capped(counts: Tensor, x: Tensor, options: Options) -> None:
    """Warn once where `max_cc_out` leaves out outputs, if looking is free."""
    most = capacity_bound(x.shape, options.num_iterations)
    if options.max_cc_out == 0 or most <= options.max_cc_out or not checks.debugging(counts):
        return
    # (no NumPy here: under torch.func there is no memory to share)
    outputs, kept = counts[ops.OUTPUTS], counts[ops.KEPT]
    if int(outputs.max()) <= options.max_cc_out:  # what it nearly always is
        return
    capped = outputs[(kept == options.max_cc_out) & (outputs > kept)]
    if len(capped) > 0:
        message = (
            f"a sample has {int(capped.max())} output instances, of which max_cc_out={options.max_cc_out} are used one "
            "by one; all others count as false. Raise it, or set 0 for no cap."
        )
        checks.warn_once(options, "max_cc_out", message)


def _what_pixel_sees(
    criterion: Criterion | None, form: FusedCriterion | None, given: Given, names: Collection[str], options: Options
) -> int:
    """What the pixel term works on if it is evaluated from the sums of the one pass over the volumes."""
    if "pixel" not in names or len(set(names)) == 1:
        return ops.NOT_FUSED
    if criterion is None:
        return ops.PROBABILITY
    if form is None or form.batch is None:
        return ops.NOT_FUSED
    if options.activation == "softmax":
        return ops.HARD
    # It sees the raw tensors, so they have to be the volumes of that pass.
    raw = options.num_out_chn == 1 and not options.to_onehot_y
    hidden = given.ignored is not None and options.activation == "sigmoid"  # there, a volume holds a logit
    return ops.RAW if raw and not hidden else ops.NOT_FUSED


def _pixel(
    x: Tensor, carrier: Tensor, truth: Tensor, given: Given, criterion: Criterion | None, options: Options
) -> Tensor:
    """The pixel term: on the raw tensors; with "softmax" on the activated output; by default Dice on probabilities."""
    if criterion is None:
        return DICE.forward(probabilities(carrier, options)[:, None], (truth > 0.5)[:, None])
    if options.activation == "softmax":
        a = activated(x, carrier, x >= options.threshold, truth > 0.5, options)
        shape = (given.outputs.shape[0], len(options.channels), 1, *given.outputs.shape[2:])
        pairs = zip(a.view(shape).unbind(1), truth.to(a.dtype).view(shape).unbind(1), strict=True)
        of_classes = [checks.scalar("loss_function_pixel", criterion(*pair)) for pair in pairs]
        return of_classes[0] if len(of_classes) == 1 else torch.stack(of_classes).mean()
    outputs = given.outputs
    if given.ignored is not None and fused_form(criterion) is None:  # it makes probabilities of logits itself
        outputs = outputs.masked_fill(given.ignored, background(options))
    return checks.scalar("loss_function_pixel", criterion(outputs, given.labels.to(outputs.dtype)))


@checks.not_scriptable
def instance_segmentation_loss(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    criterion: Criterion | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Instance segmentation loss: a criterion on each label instance and on each output instance, averaged.

    instance_label: mean over labels j of c(a * m_j, y * 1[L_j]), with m_j the kept outputs that touch L_j (less their
    true positives on other labels); instance_output: mean over kept outputs i of c(a * 1[O_i], y * 1[D(i)]), with D(i)
    the labels that O_i touches.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional precomputed components of `labels`: 0 = background, any positive
            whole number = an instance.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        criterion: the loss c(u, w) of two volumes; None is Dice.
        **options: keyword options of `InstanceLoss`, same names, checks and defaults.

    Returns:
        (instance_label, instance_output), two 0-d tensors in float32, or float64 if `outputs` is.

    Raises:
        TypeError: An argument has the wrong type (an unknown option, integer or complex `outputs`, ...).
        ValueError: An option or shape is not allowed, the tensors do not fit each other, or `criterion` activates by
            itself.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Deterministic as `InstanceLoss` is. Boxes and the choice of instances are not differentiated. A sample without
        usable outputs, or without labels, has the single value c(a, y).

    Source:
        Rachmadi, Poon and Skibbe, MIDL 2023, equations 1 to 3; Rachmadi, Byra and Skibbe, CBM 2024.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 6, 6)
        >>> labels[..., 1:3, 1:3] = 1
        >>> loss_label, loss_output = instance_segmentation_loss(labels, labels, activation="none", spatial_dims=2)
        >>> loss_label.item(), loss_output.item()
        (0.0, 0.0)
    """
    checked = _checked(criterion, "criterion", options, slow_matters=True)
    names = ("instance_label", "instance_output")
    values = evaluate_terms(outputs, labels, cc_label_batch, ignore_mask, checked, names, instance=criterion)
    return values["instance_label"], values["instance_output"]


@checks.not_scriptable
def instance_center_loss(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    criterion: Criterion | None = None,
    **options: Any,
) -> Tensor:
    """Instance center loss: a criterion on two volumes of small boxes around the centres of outputs and of labels.

    center = mean over samples of c(h_O, h_L); h is 1 + smoother inside the boxes [c - o - 1, c + o) around the rounded
    mean coordinates c, and 0 elsewhere, with o = ceil(dim / max(dims) * centroid_offset) an axis.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional precomputed components of `labels`.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        criterion: the loss c(u, w) of two volumes; None is Dice.
        **options: keyword options of `InstanceLoss`, same names, checks and defaults.

    Returns:
        A 0-d tensor in float32, or float64 if `outputs` is.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option or shape is not allowed, the tensors do not fit each other, or `criterion` activates by
            itself.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        The place of a box has no derivative. With `gradients="surrogate"` the height of the box of output O_i has the
        derivative of the mean of a over O_i; as published, the gradient is zero.

    Source:
        Rachmadi, Poon and Skibbe, MIDL 2023, equation 4. The published offset is 3 in the text and 5 in the code; it
        is 3 here.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 9, 9)
        >>> labels[..., 4, 4] = 1
        >>> round(instance_center_loss(labels, 0 * labels, activation="none", spatial_dims=2).item(), 5)
        1.0
    """
    checked = _checked(criterion, "criterion", options, slow_matters=False)
    refuse_cross_entropy("criterion", criterion, checked.smoother)
    values = evaluate_terms(outputs, labels, cc_label_batch, ignore_mask, checked, ("center",), center=criterion)
    return values["center"]


@checks.not_scriptable
def false_instance_rate_loss(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """False instance rate loss: how many outputs touch no label, and how many labels no kept output touches.

    false_instances = n_O - correct, missed_instances = n_L - detected, averaged over samples; with
    `rate_instead_number` divided by n_O + smoother and n_L + smoother.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional precomputed components of `labels`.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        **options: keyword options of `InstanceLoss`, same names, checks and defaults.

    Returns:
        (false_instances, missed_instances), two 0-d tensors in float32, or float64 if `outputs` is.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option or shape is not allowed, or the tensors do not fit each other.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Counts have no derivative. With `gradients="surrogate"` a false output has that of the mean of a over it, and a
        label that no output touches that of minus the mean of a over it; as published, the gradient is zero.

    Source:
        Rachmadi, Byra and Skibbe, CBM 2024, the false instance rate loss.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 9, 9)
        >>> labels[..., 1, 1] = 1
        >>> outputs = labels.flip(-1)
        >>> [v.item() for v in false_instance_rate_loss(outputs, labels, activation="none", spatial_dims=2)]
        [1.0, 1.0]
    """
    names = ("false_instances", "missed_instances")
    values = evaluate_terms(outputs, labels, cc_label_batch, ignore_mask, Options(**options), names)
    return values["false_instances"], values["missed_instances"]


@checks.not_scriptable
def instance_proximity_loss(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    criterion: Criterion | None = None,
    **options: Any,
) -> Tensor:
    """Instance proximity loss: pulls outputs towards labels through the distance between their extended boxes.

    proximity = (sum_j min_i DIoU_ij * instance_label_j - sum_i min_j DIoU_ij * instance_output_i)^2, plus n_O if there
    are too many outputs, averaged over samples; DIoU = 1 - IoU + d^2 / diag^2 of boxes extended by their own extent.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64: logits, or probabilities with
            `activation="none"`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional precomputed components of `labels`.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        criterion: the loss c(u, w) of two volumes behind instance_label and instance_output; None is Dice.
        **options: keyword options of `InstanceLoss`, same names, checks and defaults.

    Returns:
        A 0-d tensor in float32, or float64 if `outputs` is.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option or shape is not allowed, the tensors do not fit each other, or `criterion` activates by
            itself.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        DIoU is a constant: the gradient goes through the instance values.

    Source:
        Rachmadi, Byra and Skibbe, CBM 2024, the instance proximity loss; DIoU: Zheng et al., AAAI 2020.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 6, 6)
        >>> labels[..., 1:3, 1:3] = 1
        >>> instance_proximity_loss(labels, labels, activation="none", spatial_dims=2).item()
        0.0
    """
    checked = _checked(criterion, "criterion", options, slow_matters=True)
    values = evaluate_terms(outputs, labels, cc_label_batch, ignore_mask, checked, ("proximity",), instance=criterion)
    return values["proximity"]


def _checked(criterion: Criterion | None, name: str, options: dict[str, Any], *, slow_matters: bool) -> Options:
    checks.criterion(name, criterion)
    refuse_activation(name, criterion)
    if slow_matters and criterion is not None:
        warn_if_slow(name, criterion)
    return Options(**options)
