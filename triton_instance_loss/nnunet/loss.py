"""Losses of instances as nnU-Net calls a loss: classes or regions, an ignore label, levels of deep supervision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .. import checks
from ..activation import against_the_rest, class_masks, equals, unwrap, widen
from ..component_losses import ComponentLoss
from ..losses import Family, WeightedSum


class OneAgainstTheRest(_Loss):
    """A loss of instances of each class, or region, against all others: its mean over the classes.

    In labels mode the logit of class c is `x_c - logsumexp(x_k, k != c)`, whose sigmoid is the softmax of c: a voxel is
    foreground where the probability of c is at least 1/2, whatever the number of classes. In regions mode it is `x_c`.

    Called as `loss(outputs, target)`:

    - outputs: (B, C, H, W) or (B, C, D, H, W), float16, bfloat16, float32 or float64: logits.
    - target: in labels mode (B, 1, *spatial), any whole dtype: 0 is background, c the class of channel c. In regions
      mode (B, C, *spatial), bool or 0 and 1, with an ignore label one more channel at the end: where it is 1.

    It returns a 0-d tensor in float32, or float64 if `outputs` is.

    Attributes:
        terms: the detached terms of the last call by name, of which those of weight 0 are not computed; of a loss
            without terms its value, under the name of its class. Empty before the first call.

    Args:
        loss: a class: `BlobLoss`, `CCLoss`, `ComponentTverskyLoss` or `FalseComponentLoss`, whose value is taken, or
            `InstanceLoss` or `InstanceCenterLoss`, whose terms are added up, false and missed instances as rates.
        spatial_dims: 2 or 3.
        num_channels: channels C of `outputs`; in labels mode that of the background is one of them.
        regions: True for regions mode, False for labels mode.
        ignore_label: the label of voxels to be ignored, None if there is none; in regions mode any label will do.
        weights: of `InstanceLoss` and `InstanceCenterLoss`, the weight of each instance term by name; terms left out
            keep the default of `WeightedSum`, and the pixel term, which nnU-Net's own loss is there for, has none.
        **options: further arguments of `loss`.

    Raises:
        TypeError: An argument or weight of the wrong type.
        ValueError: No class besides the background; an option, or the name of a weight, that is not allowed; weights
            of a loss that has no terms; shapes that do not fit.

    Note:
        A voxel to be ignored is neither output nor label, and its gradient is 0; components are those of what is left.
        A class that a sample has neither in its outputs nor in its target has no gradient of `InstanceLoss` there;
        other losses have the gradient that they have in an empty sample.

    Example:
        >>> import torch
        >>> from triton_instance_loss import InstanceLoss
        >>> loss = OneAgainstTheRest(InstanceLoss, spatial_dims=2, num_channels=3, regions=False)
        >>> outputs = torch.randn(1, 3, 16, 16, requires_grad=True)
        >>> loss(outputs, torch.randint(0, 3, (1, 1, 16, 16), dtype=torch.int16)).backward()
        >>> list(loss.terms)
        ['instance_label', 'instance_output', 'center', 'false_instances', 'missed_instances']
    """

    def __init__(
        self,
        loss: type[Family] | type[ComponentLoss],
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
        if not (isinstance(loss, type) and issubclass(loss, (Family, ComponentLoss))):
            raise TypeError(f"loss must be a class of losses, such as InstanceLoss or BlobLoss, got {loss!r}.")
        terms = loss.terms._fields[1:] if issubclass(loss, Family) else ()
        if weights and not terms:
            raise ValueError(f"weights must be None with {loss.__name__}, which has no terms, got {dict(weights)!r}.")
        for name in weights or {}:
            checks.choice("the name of a weight", name, terms)
        classes = num_channels if regions else num_channels - 1
        if classes < 1:
            raise ValueError(f"num_channels must leave a class besides the background, got {num_channels!r}.")
        options |= {"num_out_chn": classes, "object_chn": tuple(range(classes)), "spatial_dims": spatial_dims}
        self.loss: WeightedSum | ComponentLoss
        if issubclass(loss, Family):
            family = loss(rate_instead_number=True, **options)
            self.loss = WeightedSum(family, **{**(weights or {}), "pixel": 0.0})
        else:
            self.loss = loss(**options)
        self.terms: dict[str, Tensor] = {}

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
        is_sum = isinstance(self.loss, WeightedSum)
        self.terms = self.loss.terms if is_sum else {type(self.loss).__name__: value.detach()}
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
    """A loss of nnU-Net plus a loss of instances: `own(output, target) + factor * instance(output, target)`.

    Called as `loss(output, target)` with tensors, or with deep supervision with lists of them, full resolution first.
    It returns a 0-d tensor.

    Args:
        own: nnU-Net's loss.
        instance: the loss of instances; afterwards its `terms` are those of the full resolution.
        level_weights: the weight of `instance` on each level, where one of weight 0 is not computed; None looks at the
            full resolution only.
        coarser: the loss of instances on each of the other levels, where voxels have another size; left out, it is
            `instance`.

    Attributes:
        factor: what the loss of instances is multiplied by, 1 if nobody changes it.

    `factor` and `level_weights` may be changed between calls, with the same checks.

    Raises:
        TypeError: `factor` or one of `level_weights` is no number, or `level_weights` no sequence.
        ValueError: `factor` or one of `level_weights` is not finite; `level_weights` has none, or another number than
            there are levels; `coarser` has not one for each level but the first.

    Example:
        >>> import torch
        >>> from triton_instance_loss import InstanceLoss
        >>> instance = OneAgainstTheRest(InstanceLoss, spatial_dims=2, num_channels=1, regions=True)
        >>> loss = WithInstanceTerms(torch.nn.functional.binary_cross_entropy_with_logits, instance)
        >>> loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).ndim
        0
    """

    def __init__(
        self,
        own: Any,
        instance: OneAgainstTheRest,
        level_weights: Sequence[float] | None = None,
        coarser: Sequence[OneAgainstTheRest] = (),
    ) -> None:
        super().__init__()
        self.own = own
        self.instance = instance
        self.level_weights = level_weights
        if coarser and len(coarser) != len(level_weights or ()) - 1:
            raise ValueError(
                f"coarser must have a loss for each level but the first, {len(level_weights or ()) - 1} of them, got "
                f"{len(coarser)}."
            )
        self.coarser = torch.nn.ModuleList(coarser)
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
        losses = [self.instance, *(self.coarser or [self.instance] * (len(levels) - 1))]
        # The full resolution last: `instance.terms` are its terms.
        for (weight, *level), loss in reversed(list(zip(levels, losses, strict=True))):
            if weight != 0.0:
                total = total + self.factor * weight * loss(*level)
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
