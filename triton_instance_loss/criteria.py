"""Per-instance criteria: which losses are functions of sums, how to register one, and the slow way for all others.

A criterion compares two volumes, u (predicted) and w (true). Many depend on them only through

    intersection = sum u w,    prediction = sum phi(u, w),    label = sum w,    voxels = number of voxels,

with a per-voxel quantity phi from `quantities.py`. Such a *fused* criterion is evaluated from the tables of all
instances at once. Any other loss is called once per instance on full volumes: the same result, slowly, after one
warning.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, quantities


class Sums(NamedTuple):
    """What a fused criterion may use, float64 tensors of one shape (voxels: an int)."""

    intersection: Tensor  # sum of u * w
    prediction: Tensor  # sum of phi(u, w) over all voxels
    label: Tensor  # sum of w, or of w * w with the quantity "square"
    voxels: int  # voxels of the volume


@dataclass(frozen=True)
class FusedCriterion:
    """A criterion that is a function of sums.

    Args:
        quantity: phi(u, w), summed into `Sums.prediction`: "mass" (u), "square" (u^2), "absolute_error" (|u - w|),
            "squared_error" ((u - w)^2) or "cross_entropy".
        value: from `Sums` to the criterion's value, elementwise and differentiable by autograd.

    Raises:
        ValueError: `quantity` is none of the above.
    """

    quantity: str
    value: Callable[[Sums], Tensor]

    def __post_init__(self) -> None:
        checks.choice("quantity", self.quantity, tuple(quantities.CODES))

    @property
    def code(self) -> int:
        """The quantity as the operators count it."""
        return quantities.CODES[self.quantity]


Fuse = Callable[[Any], "FusedCriterion | None"]
_FORMS: dict[str, Fuse] = {}


def register_criterion(loss_type: type | str, fuse: Fuse) -> None:
    """Teach the instance terms a fused form for losses of type `loss_type`.

    Args:
        loss_type: the class, or its "module.qualified_name" where importing it is not wanted. Subclasses are not
            meant: they may compute something else.
        fuse: takes a loss of that type and returns its `FusedCriterion`, or None if its options have no such form.

    Raises:
        TypeError: `loss_type` is neither a class nor a string, or `fuse` is not callable.

    Example:
        >>> import torch
        >>> class SoftErrorRate(torch.nn.Module):
        ...     def forward(self, u, w):
        ...         return (u - w).abs().sum() / (w.sum() + 1)
        >>> register_criterion(
        ...     SoftErrorRate,
        ...     lambda loss: FusedCriterion("absolute_error", lambda sums: sums.prediction / (sums.label + 1)),
        ... )
    """
    if not callable(fuse):
        raise TypeError(f"fuse must be a callable from a loss to a FusedCriterion or None, got {fuse!r}.")
    if not isinstance(loss_type, str | type):
        raise TypeError(f"loss_type must be a class or its 'module.qualified_name', got {loss_type!r}.")
    _FORMS[loss_type if isinstance(loss_type, str) else _type_name(loss_type)] = fuse


def fused_form(loss: Callable[..., Any]) -> FusedCriterion | None:
    """The fused form of `loss`, or None if it has none."""
    fuse = _FORMS.get(_type_name(type(loss)))
    return None if fuse is None else fuse(loss)


def _type_name(loss_type: type) -> str:
    return f"{loss_type.__module__}.{loss_type.__qualname__}"


def warn_if_slow(name: str, loss: Callable[..., Any]) -> None:
    """Say once that `loss` will be called once per instance."""
    if fused_form(loss) is None:
        kind = getattr(loss, "__name__", type(loss).__name__)
        warnings.warn(
            f"{name}: {kind} with these options has no fused form, so it is called once per instance on full volumes, "
            "which is slow and synchronises with the host. triton_instance_loss.criteria.register_criterion teaches "
            "a fused form.",
            stacklevel=4,
        )


class DiceLoss(torch.nn.Module):
    """Dice loss of each sample and channel, averaged: 1 - (2 sum u w + s) / (sum u + sum w + s) with s = 1e-5.

    Equals MONAI's `DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5)`. `forward(outputs, labels)` takes probabilities and
    labels of one shape (B, N, *spatial) and returns a 0-d tensor.
    """

    smooth = 1e-5

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of probabilities `outputs` against `labels`."""
        axes = tuple(range(2, outputs.ndim))
        labels = labels.to(outputs.dtype)
        overlap = (outputs * labels).sum(axes)
        scores: Tensor = (2.0 * overlap + self.smooth) / (outputs.sum(axes) + labels.sum(axes) + self.smooth)
        return 1.0 - scores.mean()


DICE = DiceLoss()


def _fuse_dice(loss: DiceLoss) -> FusedCriterion:
    return _dice(loss.smooth, loss.smooth, jaccard=False, quantity="mass")


def _dice(smooth_nr: float, smooth_dr: float, *, jaccard: bool, quantity: str) -> FusedCriterion:
    def value(sums: Sums) -> Tensor:
        total = sums.prediction + sums.label
        if jaccard:
            total = 2.0 * (total - sums.intersection)
        return 1.0 - (2.0 * sums.intersection + smooth_nr) / (total + smooth_dr)

    return FusedCriterion(quantity, value)


def _plain(loss: Any) -> bool:
    """Whether a MONAI loss, given one channel, uses nothing but its formula."""
    changing = ("sigmoid", "softmax", "to_onehot_y", "other_act", "soft_label")
    return (
        not any(getattr(loss, option, None) for option in changing)
        and loss.include_background
        and getattr(loss, "ignore_index", None) is None
        and getattr(loss, "class_weight", None) is None
        and loss.reduction == "mean"
    )


def _fuse_monai_dice(loss: Any) -> FusedCriterion | None:
    if not _plain(loss):
        return None
    quantity = "square" if loss.squared_pred else "mass"
    return _dice(loss.smooth_nr, loss.smooth_dr, jaccard=loss.jaccard, quantity=quantity)


def _fuse_monai_tversky(loss: Any) -> FusedCriterion | None:
    def value(sums: Sums) -> Tensor:
        false_positive = loss.alpha * (sums.prediction - sums.intersection)
        false_negative = loss.beta * (sums.label - sums.intersection)
        total = sums.intersection + false_positive + false_negative
        score: Tensor = (sums.intersection + loss.smooth_nr) / (total + loss.smooth_dr)
        return 1.0 - score

    return FusedCriterion("mass", value) if _plain(loss) else None


def _fuse_torch(quantity: str) -> Fuse:
    def fuse(loss: Any) -> FusedCriterion | None:
        if loss.reduction not in ("mean", "sum") or getattr(loss, "weight", None) is not None:
            return None
        return FusedCriterion(quantity, lambda sums: sums.prediction / (sums.voxels if loss.reduction == "mean" else 1))

    return fuse


register_criterion(DiceLoss, _fuse_dice)
register_criterion("monai.losses.dice.DiceLoss", _fuse_monai_dice)
register_criterion("monai.losses.tversky.TverskyLoss", _fuse_monai_tversky)
register_criterion(torch.nn.MSELoss, _fuse_torch("squared_error"))
register_criterion(torch.nn.L1Loss, _fuse_torch("absolute_error"))
register_criterion(torch.nn.BCELoss, _fuse_torch("cross_entropy"))
