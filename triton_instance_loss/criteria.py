"""Criteria: which losses are functions of sums, how to register one, and what is said of all others.

A criterion compares two volumes, u (predicted) and w (true). Many depend on them only through

    intersection = sum u w,    prediction = sum phi(u, w),    label = sum w,    voxels = number of voxels,

with a per-voxel quantity phi from `quantities.py`, as a ratio of two linear functions. Such a *fused* criterion is
evaluated, with its derivative, from the sums of all instances at once. Any other loss is called once per instance on
full volumes: the same result, slowly, after one warning.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, quantities


@dataclass(frozen=True)
class Linear:
    """A linear function of sums: what each is multiplied by, and a constant."""

    intersection: float = 0.0  # of sum u * w
    prediction: float = 0.0  # of sum phi(u, w) over all voxels
    label: float = 0.0  # of sum w, or of sum w * w with the quantity "square"
    voxels: float = 0.0  # of the number of voxels of the volume
    constant: float = 0.0


# (not the default of a field: torch 2.6 can't compile what has such a one)
ONE = Linear(constant=1.0)


@dataclass(frozen=True)
class FusedCriterion:
    """A criterion that is a ratio of two linear functions of sums.

    Args:
        quantity: phi(u, w), what is summed for `prediction`: "mass" (u), "square" (u^2), "absolute_error" (|u - w|),
            "squared_error" ((u - w)^2) or "cross_entropy".
        numerator: above; Dice, for example, is Linear(intersection=-2, prediction=1, label=1) over
            Linear(prediction=1, label=1, constant=1e-5).
        denominator: below; None is 1.
        batch: what the loss makes of a batch of volumes (B, 1, *spatial): the "mean" or "sum" of its values for the
            samples. None if it makes something else; then the pixel term calls it.

    Raises:
        ValueError: `quantity` or `batch` is none of the above.
        TypeError: a part of the ratio is no `Linear`.
    """

    quantity: str
    numerator: Linear
    denominator: Linear | None = None
    batch: str | None = None

    def __post_init__(self) -> None:
        checks.choice("quantity", self.quantity, tuple(quantities.CODES))
        if self.batch is not None:
            checks.choice("batch", self.batch, ("mean", "sum"))
        if not isinstance(self.numerator, Linear):
            raise TypeError(f"numerator must be a Linear, got {self.numerator!r}.")
        if self.denominator is not None and not isinstance(self.denominator, Linear):
            raise TypeError(f"denominator must be a Linear or None, got {self.denominator!r}.")

    @property
    def code(self) -> int:
        """The quantity as the operators count it."""
        return quantities.CODES[self.quantity]

    def ratio(self, voxels: int, times: float = 1.0) -> tuple[float, ...]:
        """`times` the criterion for volumes of so many voxels: the numbers of its numerator, then of its denominator.

        Each has what intersection, prediction and label are multiplied by, and a constant.
        """
        above, below = self.numerator, self.denominator or ONE
        return (
            times * above.intersection,
            times * above.prediction,
            times * above.label,
            times * (above.constant + above.voxels * voxels),
            below.intersection,
            below.prediction,
            below.label,
            below.constant + below.voxels * voxels,
        )


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
        >>> form = FusedCriterion("absolute_error", Linear(prediction=1), Linear(label=1, constant=1))
        >>> register_criterion(SoftErrorRate, lambda loss: form)
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


def refuse_cross_entropy(name: str, loss: Callable[..., Any] | None, smoother: float) -> None:
    """A criterion of centre boxes takes values of 1 + smoother, which have no cross entropy."""
    form = None if loss is None else fused_form(loss)
    if form is not None and form.code == quantities.CROSS_ENTROPY:
        kind = type(loss).__name__
        raise ValueError(f"{name} must take values of 1 + smoother ({1 + smoother!r}); {kind} ends at 1.")


# Losses, and functions, that take logits whatever their options; subclasses too.
_OF_LOGITS = {
    "torch.nn.modules.loss.BCEWithLogitsLoss",
    "torch.nn.modules.loss.CrossEntropyLoss",
    "torch.nn.modules.loss.MultiLabelSoftMarginLoss",
    "torch.nn.modules.loss.SoftMarginLoss",
    "torch.nn.functional.binary_cross_entropy_with_logits",
    "torch.nn.functional.cross_entropy",
    "torch.nn.functional.multilabel_soft_margin_loss",
    "torch.nn.functional.soft_margin_loss",
    "torchvision.ops.focal_loss.sigmoid_focal_loss",
    "monai.losses.dice.DiceCELoss",
    "monai.losses.dice.DiceFocalLoss",
    "monai.losses.dice.GeneralizedDiceFocalLoss",
    "monai.losses.dice.GeneralizedWassersteinDiceLoss",
    "monai.losses.focal_loss.FocalLoss",
    "monai.losses.focal_loss.sigmoid_focal_loss",
    "monai.losses.focal_loss.softmax_focal_loss",
    "monai.losses.nacl_loss.NACLLoss",
    "segmentation_models_pytorch.losses.focal.FocalLoss",
    "segmentation_models_pytorch.losses.soft_bce.SoftBCEWithLogitsLoss",
    "segmentation_models_pytorch.losses.soft_ce.SoftCrossEntropyLoss",
}
# Options that make a loss activate what it is given: of MONAI, nnU-Net, segmentation_models_pytorch, mmsegmentation.
_FLAGS = ("sigmoid", "softmax", "pre_sigmoid", "pre_softmax", "from_logits", "use_sigmoid", "use_softmax")
_FUNCTIONS = ("other_act", "apply_nonlin")
_ACTIVATIONS = (
    torch.nn.Sigmoid,
    torch.nn.LogSigmoid,
    torch.nn.Softmax,
    torch.nn.Softmax2d,
    torch.nn.LogSoftmax,
)


def refuse_activation(name: str, loss: Callable[..., Any] | None) -> None:
    """A criterion of instances or centres sees activated volumes, so it must not activate them once more.

    What a fused form was registered for is not looked into, nor what a plain function does.
    """
    found = None if loss is None else _activating(loss, set())
    if found is not None:
        part, what, instead = found
        what = what if part is loss else f"{what} in {_kind(loss)}"
        raise ValueError(
            f"{name} must be a loss of volumes that are activated already (0 and 1, or probabilities), but {what} "
            f"activates them again, and then a perfect output has a loss too: {instead}."
        )


def _activating(loss: Any, seen: set[int]) -> tuple[Any, str, str] | None:
    """What activates in `loss`, or is `loss`, how to call it and what to do instead; None if nothing is known to."""
    if id(loss) in seen or isinstance(loss, type) or not callable(loss) or fused_form(loss) is not None:
        return None
    seen.add(id(loss))
    kind, held = _kind(loss), _held(loss)
    if not _OF_LOGITS.isdisjoint((_qualified_name(loss), *map(_type_name, type(loss).__mro__))):
        return loss, kind, "take a loss of probabilities instead, such as DiceLoss()"
    for option in (*_FLAGS, *_FUNCTIONS):
        value = held.get(option)
        flag = option in _FLAGS and isinstance(value, (int, np.bool_)) and value
        if flag or (option in _FUNCTIONS and callable(value) and not isinstance(value, torch.nn.Identity)):
            without = "from_logits=False" if option == "from_logits" else ""
            setting = f"{option.removeprefix('pre_')}={getattr(value, '__name__', value)}"
            return loss, f"{kind}({setting})", f"leave the activation out: {kind}({without})"
    for each in held.values():
        # (in a network, which has parameters, it is a layer like any other)
        if isinstance(each, _ACTIVATIONS) and not (isinstance(loss, torch.nn.Module) and any(loss.parameters())):
            return each, _kind(each), "leave the activation out"
        several = each.values() if isinstance(each, Mapping) else each if isinstance(each, (list, tuple)) else (each,)
        for part in several:
            found = _activating(part, seen)
            if found is not None:
                return found
    return None


def _held(loss: Any) -> dict[str, Any]:
    """Options and parts of a criterion, by name."""
    if isinstance(loss, functools.partial):
        return {**loss.keywords, "func": loss.func, "args": loss.args}
    if inspect.ismethod(loss):
        return {"__self__": loss.__self__}
    of_type = {option: getattr(type(loss), option, None) for option in _FLAGS}
    held: dict[str, Any] = {option: value for option, value in of_type.items() if isinstance(value, bool)}  # no methods
    held.update(getattr(loss, "__dict__", {}))
    held.update(held.pop("_modules", {}))
    return held


def _kind(loss: Any) -> str:
    """The name of a criterion in messages."""
    if isinstance(loss, functools.partial):
        return f"partial of {_kind(loss.func)}"
    return str(getattr(loss, "__name__", type(loss).__name__))


def _qualified_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


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
    return _dice(loss.smooth, loss.smooth, jaccard=False, quantity="mass", batch="mean")


def _dice(smooth_nr: float, smooth_dr: float, *, jaccard: bool, quantity: str, batch: str | None) -> FusedCriterion:
    """1 - (2 I + smooth_nr) / (P + L + smooth_dr), or with jaccard over (2 (P + L - I) + smooth_dr)."""
    both, each = (-2.0, 2.0) if jaccard else (0.0, 1.0)
    below = Linear(both, each, each, constant=smooth_dr)
    return _one_minus(Linear(2.0, constant=smooth_nr), below, quantity, batch)


def _one_minus(above: Linear, below: Linear, quantity: str, batch: str | None) -> FusedCriterion:
    """1 - above / below."""
    difference = Linear(
        below.intersection - above.intersection,
        below.prediction - above.prediction,
        below.label - above.label,
        below.voxels - above.voxels,
        below.constant - above.constant,
    )
    return FusedCriterion(quantity, difference, below, batch)


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
    quantity, batch = "square" if loss.squared_pred else "mass", None if loss.batch else "mean"
    return _dice(loss.smooth_nr, loss.smooth_dr, jaccard=loss.jaccard, quantity=quantity, batch=batch)


def _fuse_monai_tversky(loss: Any) -> FusedCriterion | None:
    """1 - (I + smooth_nr) / (I + alpha (P - I) + beta (L - I) + smooth_dr)."""
    if not _plain(loss):
        return None
    above = Linear(1.0, constant=loss.smooth_nr)
    below = Linear(1.0 - loss.alpha - loss.beta, loss.alpha, loss.beta, constant=loss.smooth_dr)
    return _one_minus(above, below, "mass", None if loss.batch else "mean")


def _fuse_torch(quantity: str) -> Fuse:
    def fuse(loss: Any) -> FusedCriterion | None:
        if loss.reduction not in ("mean", "sum") or getattr(loss, "weight", None) is not None:
            return None
        # Whether its inputs are probabilities, BCELoss checks itself where it is called, as the pixel term.
        batch = None if quantity == "cross_entropy" else loss.reduction
        below = Linear(voxels=1.0) if loss.reduction == "mean" else ONE
        return FusedCriterion(quantity, Linear(prediction=1.0), below, batch)

    return fuse


register_criterion(DiceLoss, _fuse_dice)
DICE_FORM = _fuse_dice(DICE)
register_criterion("monai.losses.dice.DiceLoss", _fuse_monai_dice)
register_criterion("monai.losses.tversky.TverskyLoss", _fuse_monai_tversky)
register_criterion(torch.nn.MSELoss, _fuse_torch("squared_error"))
register_criterion(torch.nn.L1Loss, _fuse_torch("absolute_error"))
register_criterion(torch.nn.BCELoss, _fuse_torch("cross_entropy"))
