"""The instance terms as nnU-Net calls a loss: classes or regions, an ignore label, levels of deep supervision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .. import checks
from ..activation import against_the_rest, class_masks, equals, unwrap, widen
from ..losses import InstanceCenterLoss, InstanceLoss, WeightedSum


class OneAgainstTheRest(_Loss):
    """The weighted instance terms of each class, or region, against all others: their mean over the classes.

    In labels mode the logit of class c is `x_c - logsumexp(x_k, k != c)`, whose sigmoid is the softmax of c: a voxel is
    foreground where the probability of c is at least 1/2, whatever the number of classes. In regions mode it is `x_c`.

    Called as `loss(outputs, target)`:

    - outputs: (B, C, H, W) or (B, C, D, H, W), float16, bfloat16, float32 or float64: logits.
    - target: in labels mode (B, 1, *spatial), any whole dtype: 0 is background, c the class of channel c. In regions
      mode (B, C, *spatial), bool or 0 and 1, with an ignore label one more channel at the end: where it is 1.

    It returns a 0-d tensor in float32, or float64 if `outputs` is.

    Args:
        family: `InstanceLoss` or `InstanceCenterLoss`. Its false and missed instances are taken as rates.
        spatial_dims: 2 or 3.
        num_channels: channels C of `outputs`; in labels mode that of the background is one of them.
        regions: True for regions mode, False for labels mode.
        ignore_label: the label of voxels to be ignored, None if there is none; in regions mode any label will do.
        weights: the weight of each instance term by name; terms left out keep the default of `WeightedSum`, and the
            pixel term, which nnU-Net's own loss is there for, has none.
        **options: further options of `family`.

    Raises:
        TypeError: An argument or weight of the wrong type.
        ValueError: No class besides the background; an option, or the name of a weight, that is not allowed; shapes
            that do not fit.

    Note:
        A voxel to be ignored is neither output nor label, and its gradient is 0; components are those of what is left.
        A class that a sample has neither in its outputs nor in its target has no gradient there, as in `InstanceLoss`.

    Example:
        >>> import torch
        >>> loss = OneAgainstTheRest(InstanceLoss, spatial_dims=2, num_channels=3, regions=False)
        >>> outputs = torch.randn(1, 3, 16, 16, requires_grad=True)
        >>> loss(outputs, torch.randint(0, 3, (1, 1, 16, 16), dtype=torch.int16)).backward()
        >>> list(loss.terms)
        ['instance_label', 'instance_output', 'center', 'false_instances', 'missed_instances']
    """

    def __init__(
        self,
        family: type[InstanceLoss] | type[InstanceCenterLoss],
        *,
        spatial_dims: int,
        num_channels: int,
        regions: bool,
        ignore_label: int | None = None,
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels = checks.integer("num_channels", num_channels, 1)
        self.regions = regions = checks.flag("regions", regions)
        self.ignore_label = None if ignore_label is None else checks.integer("ignore_label", ignore_label, 0)
        if not isinstance(weights, Mapping | None):
            raise TypeError(f"weights must be a mapping from the names of terms to numbers, or None, got {weights!r}.")
        for name in weights or {}:
            checks.choice("the name of a weight", name, family.terms._fields[1:])
        classes = num_channels if regions else num_channels - 1
        if classes < 1:
            raise ValueError(f"num_channels must leave a class besides the background, got {num_channels!r}.")
        loss = family(
            num_out_chn=classes,
            object_chn=tuple(range(classes)),
            spatial_dims=spatial_dims,
            rate_instead_number=True,
            **options,
        )
        self.loss = WeightedSum(loss, **{**(weights or {}), "pixel": 0.0})

    @property
    def terms(self) -> dict[str, Tensor]:
        """The detached terms of the last call by name; those of weight 0 are not computed and not among them."""
        return self.loss.terms

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The mean over the classes of a batch."""
        self._check(outputs, target)
        outputs, target, ignored = widen(unwrap(outputs)), widen(unwrap(target)), None
        if self.ignore_label is not None:
            ignored = target[:, -1:] > 0.5 if self.regions else equals(target, self.ignore_label)
            outputs, target = outputs.masked_fill(ignored, 0.0), target.masked_fill(ignored, 0)
        if self.regions:
            logits, labels = outputs, target[:, : self.num_channels]
        else:
            classes = range(1, self.num_channels)
            logits = torch.stack([against_the_rest(outputs, number) for number in classes], dim=1)
            labels = class_masks("target", target, classes, self.num_channels)
        value: Tensor = self.loss(logits, labels, ignore_mask=ignored)
        return value

    def _check(self, outputs: Tensor, target: Tensor) -> None:
        """The shapes of both fit each other and the options."""
        channels = self.num_channels, self.num_channels + (self.ignore_label is not None) if self.regions else 1
        shapes = [(outputs.shape[0], number, *outputs.shape[2:]) for number in channels]
        if [tuple(outputs.shape), tuple(target.shape)] != shapes:
            raise ValueError(
                f"outputs and target must have shapes (B, {channels[0]}, *spatial) and (B, {channels[1]}, *spatial), "
                f"got {tuple(outputs.shape)} and {tuple(target.shape)}."
            )


class WithInstanceTerms(_Loss):
    """A loss of nnU-Net plus the instance terms: `own(output, target) + factor * instance`.

    Called as `loss(output, target)` with tensors, or with deep supervision with lists of them, full resolution first.
    It returns a 0-d tensor.

    Args:
        own: nnU-Net's loss.
        instance: the loss of one level; afterwards its `terms` are those of the full resolution.
        level_weights: the weight of `instance` on each level, where one of weight 0 is not computed; None looks at the
            full resolution only.

    Attributes:
        factor: what the instance terms are multiplied by, 1 if nobody changes it.

    Both may be changed between calls, with the same checks.

    Raises:
        TypeError: `factor` or one of `level_weights` is no number, or `level_weights` no sequence.
        ValueError: `factor` or one of `level_weights` is not finite; `level_weights` has none, or another number than
            there are levels.

    Example:
        >>> import torch
        >>> instance = OneAgainstTheRest(InstanceLoss, spatial_dims=2, num_channels=1, regions=True)
        >>> loss = WithInstanceTerms(torch.nn.functional.binary_cross_entropy_with_logits, instance)
        >>> loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).ndim
        0
    """

    def __init__(self, own: Any, instance: OneAgainstTheRest, level_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.own = own
        self.instance = instance
        self.level_weights = level_weights
        self.factor = 1.0

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The sum of both."""
        if isinstance(output, Tensor):
            levels = [(1.0, output, target)]
        elif self.level_weights is None:
            levels = [(1.0, output[0], target[0])]
        else:
            levels = list(zip(self.level_weights, output, target, strict=True))
        total: Tensor = self.own(output, target)
        for weight, *level in reversed(levels):  # the full resolution last: `instance.terms` are its terms
            if weight != 0.0:
                total = total + self.factor * weight * self.instance(*level)
        return total

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "factor":
            value = float(checks.number(name, value))
        elif name == "level_weights" and value is not None:
            levels = checks.plain(value)
            if not isinstance(levels, tuple):
                raise TypeError(f"level_weights must be a sequence of finite numbers, or None, got {value!r}.")
            if not levels:
                raise ValueError(f"level_weights must have a finite number for each level, got {value!r}.")
            value = tuple(float(checks.number(f"level_weights[{i}]", weight)) for i, weight in enumerate(levels))
        super().__setattr__(name, value)
