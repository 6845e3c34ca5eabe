"""`CombinedLoss`: several losses on the same tensors, which are activated and labelled once."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from . import checks
from .activation import unwrap, widen
from .component_losses import SHARED, ComponentLoss
from .losses import Family, WeightedSum, Weights
from .options import Options
from .regions import Scene


class CombinedLoss(_Loss):
    """The weighted sum of several losses on the same tensors, which are activated and labelled once.

    Losses with the same shared options (`activation`, `num_out_chn`, `object_chn`, `spatial_dims`,
    `segmentation_threshold`, `to_onehot_y`, `ignore_index`) look at the same volumes: `BlobLoss`, `CCLoss`,
    `ComponentTverskyLoss` and `FalseComponentLoss` share activation, label components, output components and cells; a
    `WeightedSum` of the family shares activation and components with them if its `num_iterations` is None and its
    `min_instance_size` 0, the defaults, since then they are the same. Two sums of the family label twice, as their
    pixel terms are sums of the same pass.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, it returns a 0-d tensor.

    Args:
        losses: a loss for each name: one of the component losses, a `WeightedSum`, or any callable
            loss(outputs, labels) that returns a 0-d tensor, such as MONAI's DiceCELoss; this sees the tensors as they
            are, and nothing of `cc_label_batch` and `ignore_mask`.
        weights: a finite number for each of the names; 1 for those left out. A loss of weight 0 is not computed.

    Attributes:
        losses: the losses by name, a `torch.nn.ModuleDict` if all are modules, else a dict.
        weights: the weights by name; may be changed between calls, with the same checks.
        parts: the detached values of the last call by name, without their weights; empty before the first.

    Raises:
        TypeError: `losses` is no mapping, one of them is not callable or is a loss of several terms, which
            `WeightedSum` makes a number of; a weight is no number.
        ValueError: No loss; a weight of another name, or one that is not finite; a loss that returns more than one
            number.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Example:
        >>> import torch
        >>> from triton_instance_loss import BlobLoss, CCLoss
        >>> loss = CombinedLoss({"blob": BlobLoss(), "cells": CCLoss(alpha=0.5)}, {"blob": 2.0})
        >>> outputs = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
        >>> loss(outputs, (outputs > 2).float()).backward()
        >>> sorted(loss.parts)
        ['blob', 'cells']
    """

    weights: Weights

    def __init__(self, losses: Mapping[str, Callable[..., Any]], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not isinstance(losses, Mapping):
            raise TypeError(f"losses must be a mapping from names to losses, got {type(losses).__name__}.")
        if not losses:
            raise ValueError("losses must have at least one, got none.")
        for name, loss in losses.items():
            if isinstance(loss, Family):
                raise TypeError(
                    f"loss {name!r} must give one number, got {type(loss).__name__}, which has several terms: "
                    f"WeightedSum({type(loss).__name__}(...))."
                )
            if not callable(loss):
                raise TypeError(f"loss {name!r} must be a callable loss(outputs, labels), got {loss!r}.")
        modules = all(isinstance(loss, torch.nn.Module) for loss in losses.values())
        self.losses: Any = torch.nn.ModuleDict(losses) if modules else dict(losses)  # type: ignore[arg-type]
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(f"weights must be a mapping from the names of losses to numbers, got {weights!r}.")
        self.weights = Weights(tuple(losses), dict.fromkeys(losses, 1.0) | dict(weights or {}))
        self.parts: dict[str, Tensor] = {}

    def forward(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None = None,
        *,
        ignore_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of a batch."""
        inputs = outputs, labels, cc_label_batch, ignore_mask
        used = {name: self.losses[name] for name, weight in self.weights.plain.items() if weight != 0.0}
        outputs_too = [
            _looks(loss) for loss in used.values() if isinstance(loss, ComponentLoss) and loss.looks_at_outputs
        ]
        scenes: dict[Any, Scene] = {}
        values: dict[str, Tensor] = {}
        # The family goes first: what it finds, it finds with the sums of its pixel term.
        family = [name for name, loss in used.items() if isinstance(loss, WeightedSum)]
        for name in (*family, *[name for name in used if name not in family]):
            loss = used[name]
            if not isinstance(loss, (ComponentLoss, WeightedSum)):
                values[name] = widen(unwrap(checks.scalar(f"loss {name!r}", loss(outputs, labels))))
                continue
            key = _looks(loss)
            if key not in scenes:
                scenes[key] = Scene(*inputs, _options(loss), key in outputs_too)
            scene = scenes[key]
            values[name] = loss.evaluate(scene) if isinstance(loss, ComponentLoss) else loss.evaluate(*inputs, scene)
        self.parts = {name: values[name].detach() for name in used}
        weighted = [self.weights.plain[name] * values[name] for name in used]
        # The sum of no voxels is connected to all of them.
        return torch.stack(weighted).sum() if weighted else widen(unwrap(outputs)[:0]).sum()

    def extra_repr(self) -> str:
        """The weights, for `print(loss)`."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weights":
            value = Weights(tuple(self.losses), value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        checks.refuse_script()


def _options(loss: ComponentLoss | WeightedSum) -> Options:
    options: Options = loss.loss.options if isinstance(loss, WeightedSum) else loss.options
    return options


def _looks(loss: ComponentLoss | WeightedSum) -> tuple[Any, ...]:
    """What must be the same of two losses that look at the same instances."""
    options = _options(loss)
    shared = tuple([getattr(options, name) for name in SHARED])
    return (*shared, options.num_iterations, options.min_instance_size)
