"""Losses on components that others published, on our instances: blob loss, CC-DiceCE and BiCC, CAT, false ones."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from torch.nn.modules.loss import _Loss

from . import checks, ops
from .options import Options
from .regions import BOTH, Scene

# The options of the family that these losses share.
SHARED = (
    "activation",
    "num_out_chn",
    "object_chn",
    "spatial_dims",
    "segmentation_threshold",
    "to_onehot_y",
    "ignore_index",
)
MODES = ("dice_ce", "dice", "ce")


class ComponentLoss(_Loss):
    """What the component losses share: their options, how they are called, and changing them.

    A loss says in `_check` what its own arguments, `own`, may be, and in `evaluate` what it makes of a scene.
    """

    own: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        activation: str = "sigmoid",
        num_out_chn: int = 1,
        object_chn: int | Sequence[int] = 1,
        spatial_dims: int = 3,
        segmentation_threshold: float | None = None,
        to_onehot_y: bool = False,
        ignore_index: float | None = None,
        **own: Any,
    ) -> None:
        super().__init__()
        self._refuse_unknown("__init__", own)
        options = Options(
            activation=activation,
            num_out_chn=num_out_chn,
            object_chn=object_chn,
            spatial_dims=spatial_dims,
            segmentation_threshold=segmentation_threshold,
            to_onehot_y=to_onehot_y,
            ignore_index=ignore_index,
            max_cc_out=0,  # every output is kept,
            mul_too_many=checks.MAX_VOXELS,  # and there are never too many
        )
        self._set(options, own)

    def forward(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None = None,
        *,
        ignore_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a 0-d tensor."""
        scene = Scene(outputs, labels, cc_label_batch, ignore_mask, self.options, self.looks_at_outputs)
        return self.evaluate(scene)

    @property
    def looks_at_outputs(self) -> bool:
        """Whether the components of the outputs are needed."""
        return False

    def evaluate(self, scene: Scene) -> Tensor:
        """The loss of a scene, which several losses with the same options may look at."""
        raise NotImplementedError

    def edit_parameters(self, **changes: Any) -> None:
        """Change any of the arguments of the class, with the same checks; nothing changes if one is not allowed.

        `loss.smooth = 1.0` does the same for one of them.

        Raises:
            TypeError: An unknown argument, or a value of the wrong type.
            ValueError: A value that is not allowed.
        """
        self._refuse_unknown("edit_parameters", {name for name in changes if name not in SHARED})
        own = self.settings | {name: changes.pop(name) for name in self.own if name in changes}
        self._set(dataclasses.replace(self.options, **changes), own)

    def extra_repr(self) -> str:
        """The arguments, for `print(loss)`."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self.own, *SHARED))

    def _refuse_unknown(self, method: str, names: Collection[str]) -> None:
        if unknown := sorted(set(names) - set(self.own)):
            allowed = ", ".join((*self.own, *SHARED))
            raise TypeError(
                f"{type(self).__name__}.{method} got unknown {', '.join(map(repr, unknown))}; allowed: {allowed}."
            )

    def _set(self, options: Options, own: dict[str, Any]) -> None:
        own = {name: checks.plain(value) for name, value in own.items()}
        self._check(own, options)
        self.__dict__["options"], self.__dict__["settings"] = options, own

    def _check(self, own: dict[str, Any], options: Options) -> None:
        """Raise if one of the loss's own arguments is not allowed."""

    def _look_at_cross_entropy(self, scene: Scene) -> None:
        """A cross entropy of what is no logit wants probabilities."""
        if not self.options.hard and self.mode != "dice":
            checks.probabilities(f"mode={self.mode!r}", scene.x)

    def __getattr__(self, name: str) -> Any:
        # Arguments read like attributes: loss.smooth.
        if name in SHARED and "options" in self.__dict__:
            return getattr(self.__dict__["options"], name)
        if name in type(self).own and "settings" in self.__dict__:
            return self.__dict__["settings"][name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*type(self).own, *SHARED):
            self.edit_parameters(**{name: value})
        else:
            checks.not_nearly(self, name, (*type(self).own, *SHARED))
            super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        checks.refuse_script()


def _parts(mode: str) -> tuple[float, float]:
    """How often Dice and cross entropy count."""
    return float(mode != "ce"), float(mode != "dice")


class BlobLoss(ComponentLoss):
    """Blob loss: each label instance against the background, as if it were the only one.

    With p the probability, G_1..G_K the label instances of a sample, B the voxels with y = 0, S sums of p and E of the
    cross entropy, for each G:

    - Dice: 1 - (2 S_G + smooth) / (S_G + S_B + |G| + smooth);
    - cross entropy: (E_G + E_B) / (|G| + |B|).

    Mean over the G of a sample, then over the samples that have any; 0 if none has. So a small instance counts as much
    as a large one. Add it to a loss of the whole volume: it is weak on false instances, and says nothing of a sample
    without labels.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, as `InstanceLoss` is, it returns a 0-d
    tensor in float32, or float64 if `outputs` is.

    Args:
        mode: "dice_ce" (the sum of both), "dice" or "ce".
        smooth: added to numerator and denominator of Dice, at least 0.
        masking: "probabilities": other instances are left out. "logits", the authors' code: their logits become 0, so
            that their voxels count as p = 1/2: with F the sum of all |G|, Dice has (F - |G|) / 2 more in its
            denominator, and the cross entropy is (E_G + E_B + (F - |G|) log 2) / (F + |B|).
        activation: "sigmoid", "softmax" or "none"; this and the others are as in `InstanceLoss`.
        num_out_chn: channels N of `outputs`.
        object_chn: the channel that is looked at, or several: each is a class against the rest, and the loss is the
            mean over classes.
        spatial_dims: 2 or 3.
        segmentation_threshold: without effect here, where outputs are not labelled.
        to_onehot_y: `labels` are (B, 1, *spatial) and hold the number of a class.
        ignore_index: voxels of this label belong to no region, like those of `ignore_mask`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument that is not allowed; tensors that do not fit each other or the options; labels that are
            neither 0 nor 1, and with "none" and a cross entropy outputs outside [0, 1] (looked for on the CPU always,
            on CUDA if the environment variable TRITON_INSTANCE_LOSS_DEBUG is 1).
        RuntimeError: A second derivative.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        The gradient is the exact one in the logits, for every voxel of an instance or of the background; regions are
        not differentiated. A NaN or infinite output gives NaN. Bitwise the same in each run on the CPU; on a GPU sums
        of floats may differ in the last bits. No synchronisation with the host on CUDA. A voxel with a label, but in no
        instance of `cc_label_batch`, is in no region.

    Source:
        Kofler et al., blob loss: instance imbalance aware loss functions for semantic segmentation, IPMI 2023, arXiv
        2205.08209. Deviations from the authors' code: `masking` (above); samples without instances are left out of the
        mean there too, but the loss then is 0 and connected, where they have nothing to return.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1.0, 1.0, 0.0, 0.0, 1.0]]]])
        >>> outputs = torch.tensor([[[[9.0, 9.0, -9.0, -9.0, -9.0]]]], requires_grad=True)
        >>> loss = BlobLoss("dice", spatial_dims=2)(outputs, labels)
        >>> round(loss.item(), 2)  # one of two is found
        0.5
        >>> loss.backward()
        >>> bool(outputs.grad[..., 4] < 0)
        True
    """

    own = ("mode", "smooth", "masking")

    def __init__(
        self, mode: str = "dice_ce", smooth: float = 1e-5, masking: str = "probabilities", **shared: Any
    ) -> None:
        super().__init__(mode=mode, smooth=smooth, masking=masking, **shared)

    def _check(self, own: dict[str, Any], options: Options) -> None:
        checks.choice("mode", own["mode"], MODES)
        checks.number("smooth", own["smooth"], 0)
        checks.choice("masking", own["masking"], ("probabilities", "logits"))

    def evaluate(self, scene: Scene) -> Tensor:
        """The loss of a scene."""
        self._look_at_cross_entropy(scene)
        numbers = *_parts(self.mode), float(self.smooth), float(self.masking == "logits")
        return scene.loss(scene.instances(ops.LABELS), ops.BLOB, numbers)


class CCLoss(ComponentLoss):
    """CC-DiceCE and BiCC: Dice and cross entropy in the cell of each instance.

    (1 - alpha) C(V) + alpha C(W). V: every voxel belongs to the cell of the label instance that is nearest to it, by
    Euclidean distance to its nearest voxel in units of `spacing`, of equally near ones to the one with the largest id.
    W: the same of the components of the outputs. C: mean over samples of the mean over cells of d + E / n, with sums S
    of p, T of y, I of p y, E of the cross entropy over the n voxels of the cell, and

    - d = 1 - (2 I + smooth) / max(S + T + smooth, 1e-8) where T > 0;
    - d = (sum of p stopgrad(p)) / max(stopgrad(S), 1e-8) in a cell without truth, which only W has: a false instance.

    A sample without components on that side is one cell with the first form of d. So a small instance has as much to
    say as a large one, about all that is near to it.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, as `InstanceLoss` is, it returns a 0-d
    tensor in float32, or float64 if `outputs` is.

    Args:
        mode: "dice_ce" (the sum of both), "dice" or "ce".
        smooth: added to numerator and denominator of Dice, at least 0.
        alpha: share of the cells of outputs, from 0 (CC-DiceCE) to 1; 0.5 is BiCC. Without a share, a side is not
            labelled.
        spacing: a positive number for each spatial axis, in their order: the size of a voxel. None: all alike.
        **shared: `activation`, `num_out_chn`, `object_chn`, `spatial_dims`, `segmentation_threshold` (of the outputs'
            components), `to_onehot_y` and `ignore_index`, as in `InstanceLoss` and `BlobLoss`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument that is not allowed, a `spacing` of another length than `spatial_dims` among them; else
            as `BlobLoss`.
        RuntimeError: A second derivative.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        The gradient is the exact one in the logits, at every voxel; cells are not differentiated. Determinism, NaN and
        CUDA as `BlobLoss` has them. The cells are exact, and take 8 bytes a voxel while they are made, 4 after.

    Source:
        Jaus et al., Every Component Counts, AAAI 2025, arXiv 2410.18684, and CC-DiceCE, 2025. Deviations from the
        authors' code: 2D too, several classes, labels and outputs of any number of components; components touch
        through corners, as everywhere here.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]]])
        >>> outputs = torch.tensor([[[[9.0, 9.0, -9.0, -9.0, -9.0, -9.0]]]], requires_grad=True)
        >>> round(CCLoss("dice", spatial_dims=2)(outputs, labels).item(), 2)  # one of two is found
        0.5
        >>> round(CCLoss("dice", alpha=0.5, spatial_dims=2, spacing=(3.0, 0.8))(outputs, labels).item(), 2)
        0.35
    """

    own = ("mode", "smooth", "alpha", "spacing")

    def __init__(
        self,
        mode: str = "dice_ce",
        smooth: float = 0.0,
        alpha: float = 0.0,
        spacing: Sequence[float] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(mode=mode, smooth=smooth, alpha=alpha, spacing=spacing, **shared)

    def _check(self, own: dict[str, Any], options: Options) -> None:
        checks.choice("mode", own["mode"], MODES)
        checks.number("smooth", own["smooth"], 0)
        checks.number("alpha", own["alpha"], 0, 1)
        if own["spacing"] is not None:
            own["spacing"] = checks.spacing("spacing", own["spacing"], options.spatial_dims)

    @property
    def looks_at_outputs(self) -> bool:
        """Whether the components of the outputs are needed."""
        return bool(self.alpha > 0)

    def evaluate(self, scene: Scene) -> Tensor:
        """The loss of a scene."""
        self._look_at_cross_entropy(scene)
        alpha = float(self.alpha)
        sides = BOTH if 0 < alpha < 1 else (ops.OUTPUTS if alpha > 0 else ops.LABELS,)
        return scene.loss(scene.cells(sides, self.spacing), ops.CELLS, (*_parts(self.mode), float(self.smooth), alpha))


class ComponentTverskyLoss(ComponentLoss):
    """CAT of CATMIL: a Tversky loss whose label instances weigh the more the smaller they are.

    With w_k = (|G_k| + epsilon)^-gamma, S sums of p over a label instance G_k or the background B:
    tp = sum w_k S_Gk, fn = sum w_k (|G_k| - S_Gk), fp = background_weight S_B, and the loss is

        1 - mean over samples of (tp + smooth) / (tp + alpha fp + beta fn + smooth);

    0 if no sample has foreground.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, as `InstanceLoss` is, it returns a 0-d
    tensor in float32, or float64 if `outputs` is.

    Args:
        alpha: weight of false positives, at least 0.
        beta: weight of false negatives, at least 0.
        gamma: how much smaller instances weigh more, at least 0; 0 weighs all voxels alike.
        epsilon: voxels added to the size of each instance, at least 0.
        background_weight: weight of the background, at least 0.
        smooth: added to numerator and denominator, at least 0.
        **shared: `activation`, `num_out_chn`, `object_chn`, `spatial_dims`, `segmentation_threshold` (without effect),
            `to_onehot_y` and `ignore_index`, as in `InstanceLoss` and `BlobLoss`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument that is not allowed; else as `BlobLoss`.
        RuntimeError: A second derivative.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        The gradient is the exact one in the logits, for every voxel of an instance or of the background. Determinism,
        NaN and CUDA as `BlobLoss` has them.

    Source:
        CATMIL, 2026. Deviations from the authors' code: components touch through corners too (26 neighbours, theirs 6),
        unless `cc_label_batch` says otherwise; 2D, several classes.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1.0, 1.0, 1.0, 0.0, 1.0]]]])
        >>> small = torch.tensor([[[[9.0, 9.0, 9.0, -9.0, -9.0]]]])
        >>> large = torch.tensor([[[[-9.0, -9.0, -9.0, -9.0, 9.0]]]])
        >>> loss = ComponentTverskyLoss(spatial_dims=2)
        >>> bool(loss(small, labels) < loss(large, labels))  # a larger instance is missed
        True
    """

    own = ("alpha", "beta", "gamma", "epsilon", "background_weight", "smooth")

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        epsilon: float = 5.0,
        background_weight: float = 0.1,
        smooth: float = 1e-5,
        **shared: Any,
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            epsilon=epsilon,
            background_weight=background_weight,
            smooth=smooth,
            **shared,
        )

    def _check(self, own: dict[str, Any], options: Options) -> None:
        for name, value in own.items():
            checks.number(name, value, 0)

    def evaluate(self, scene: Scene) -> Tensor:
        """The loss of a scene."""
        numbers = tuple(float(getattr(self, name)) for name in self.own)
        return scene.loss(scene.instances(ops.LABELS), ops.TVERSKY, numbers)


class FalseComponentLoss(ComponentLoss):
    """False components: the mean probability of output components that no label instance claims.

    Each label instance G claims the output component P with the largest Dice 2 |G and P| / (|G| + |P|) among those that
    touch it, of equals the one with the smaller id. Every other P is false, a second fragment of a G too. The loss is
    the mean over all false P of the batch of (sum of p over P) / |P|; 0 if there is none.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, as `InstanceLoss` is, it returns a 0-d
    tensor in float32, or float64 if `outputs` is.

    Args:
        **shared: `activation`, `num_out_chn`, `object_chn` (several: the mean over classes), `spatial_dims`,
            `segmentation_threshold` (outputs of at least this are foreground), `to_onehot_y` and `ignore_index`, as in
            `InstanceLoss` and `BlobLoss`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument that is not allowed; else as `BlobLoss`.
        RuntimeError: A second derivative.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Only voxels of false components have a gradient, that of p; which are false is not differentiated. The loss is
        0 where there is no output at all: beside Dice + cross entropy and with the same weight, it trained a network
        to find nothing (docs/study.md). Give it a tenth, to a network that finds objects already. On CUDA the matching
        takes 3 bytes a voxel. Determinism, NaN and CUDA as `BlobLoss` has them.

    Source:
        A team of the BraTS-METS challenge, 2026. Deviations from the authors' code: 2D, several classes.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1.0, 1.0, 0.0, 0.0, 0.0]]]])
        >>> outputs = torch.tensor([[[[9.0, 9.0, -9.0, -9.0, 9.0]]]], requires_grad=True)
        >>> loss = FalseComponentLoss(spatial_dims=2)(outputs, labels)
        >>> round(loss.item(), 2)
        1.0
        >>> loss.backward()
        >>> outputs.grad.nonzero().tolist()
        [[0, 0, 0, 4]]
    """

    own = ()

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)

    @property
    def looks_at_outputs(self) -> bool:
        """Whether the components of the outputs are needed."""
        return True

    def evaluate(self, scene: Scene) -> Tensor:
        """The loss of a scene."""
        return scene.loss(scene.instances(ops.OUTPUTS), ops.FALSE, chosen=scene.unclaimed())
