"""The losses of 2023, `ICILoss` and `dICILoss`: terms of the family, some renamed, and a false discovery rate."""

from collections.abc import Collection, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .activation import activated, health_of, probabilities, without_autocast
from .losses import Family
from .options import Options
from .regions import Scene


class ICITerms(NamedTuple):
    """The terms of `ICILoss`, 0-d tensors in float32, or float64 if the outputs are."""

    pixel: Tensor
    instance: Tensor
    center: Tensor
    fdr: Tensor
    false_instances: Tensor
    missed_instances: Tensor


class dICITerms(NamedTuple):
    """The terms of `dICILoss`, 0-d tensors in float32, or float64 if the outputs are."""

    pixel: Tensor
    instance_label: Tensor
    instance_output: Tensor
    center: Tensor
    fdr: Tensor
    false_instances: Tensor
    missed_instances: Tensor


class _Published(Family):
    """What both share: the terms of the family, by their name there, and fdr."""

    in_family: ClassVar[dict[str, str]] = {}  # the names of terms that the family calls otherwise

    def evaluate(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        names: Collection[str],
        scene: Scene | None = None,
    ) -> dict[str, Tensor]:
        """Only the terms `names`, by name, in the order of the terms."""
        of_family = {self.in_family.get(name, name): name for name in names if name != "fdr"}
        inputs = outputs, labels, cc_label_batch, ignore_mask
        scene, terms = scene or Scene(*inputs, self.options), {}
        if of_family:
            found = super().evaluate(*inputs, tuple(of_family), scene)
            terms = {of_family[name]: value for name, value in found.items()}
        if "fdr" in names:
            terms["fdr"] = _false_discovery_rate(scene, self.options)
        return {name: terms[name] for name in self.terms._fields if name in terms}

    def evaluate_sum(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        weights: Mapping[str, float],
        scene: Scene | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum of the terms named in `weights`, None if there are none, and these terms, detached."""
        terms = self.evaluate(outputs, labels, cc_label_batch, ignore_mask, weights, scene)
        weighted = [weights[name] * term for name, term in terms.items()]
        total = torch.stack(weighted).sum() if weighted else None
        return total, {name: term.detach() for name, term in terms.items()}


def _false_discovery_rate(scene: Scene, options: Options) -> Tensor:
    """1 - (sum of a y + smoother) / (sum of a + smoother), mean over samples."""
    x, carrier, y = scene.x, scene.carrier, scene.truth > 0.5
    with without_autocast(x.device.type):
        p = x if options.activation == "softmax" else probabilities(x.detach(), options)
        a = activated(x, carrier, p >= options.threshold, y, options)
        wrong, predicted = (each.flatten(1).sum(1) for each in (a * ~y, a))
        looked_at = scene.given.outputs if options.activation == "softmax" else x
        # (that is, without the digits that the ratio shares with 1)
        return (wrong / (predicted + options.smoother)).mean() * health_of(looked_at, scene.truth)


class ICILoss(_Published):
    """The ICI loss of 2023: pixel, instance, center, fdr, false_instances and missed_instances.

    instance is instance_label of `InstanceLoss`, and fdr the false discovery rate of voxels, mean over samples of
    1 - (sum of a y + smoother) / (sum of a + smoother) with the activated output a. All else, how it is called and its
    arguments, errors and notes are those of `InstanceLoss`.

    Note:
        fdr has the exact derivative in a; like the other terms, where a is 0 or 1 that of the probability, on outputs
        and labels alone, and with `gradients="reference"` none.

    Source:
        Rachmadi, Poon and Skibbe, MIDL 2023, arXiv 2304.06229.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 9, 9)
        >>> labels[..., 1:3, 1:3] = 1
        >>> outputs = labels.clone()
        >>> outputs[..., 6, 1:5] = 1
        >>> terms = ICILoss(activation="none", spatial_dims=2)(outputs, labels)
        >>> terms.fdr.item(), terms.false_instances.item()
        (0.5, 1.0)
    """

    terms = ICITerms
    in_family: ClassVar[dict[str, str]] = {"instance": "instance_label"}


class dICILoss(_Published):
    """The ICI loss in both directions: pixel, instance_label, instance_output, center, fdr and counts of instances.

    As `ICILoss`, but for instance_output, the criterion on each output.

    Source:
        Rachmadi, Poon and Skibbe, MIDL 2023, arXiv 2304.06229.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 9, 9)
        >>> labels[..., 1:3, 1:3] = 1
        >>> terms = dICILoss(activation="none", spatial_dims=2)(labels, labels)
        >>> terms._fields[:3], terms.fdr.item()
        (('pixel', 'instance_label', 'instance_output'), 0.0)
    """

    terms = dICITerms
