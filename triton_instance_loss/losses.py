"""The losses: `InstanceLoss`, `InstanceCenterLoss`, and `WeightedSum` that makes one number of their terms."""

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from . import checks, criteria
from .activation import unwrap, widen
from .functional import Criterion, evaluate_sum, evaluate_terms
from .options import NAMES, Options
from .regions import Scene


class InstanceTerms(NamedTuple):
    """The terms of `InstanceLoss`, 0-d tensors in float32, or float64 if the outputs are."""

    pixel: Tensor
    instance_label: Tensor
    instance_output: Tensor
    center: Tensor
    false_instances: Tensor
    missed_instances: Tensor
    proximity: Tensor


class InstanceCenterTerms(NamedTuple):
    """The terms of `InstanceCenterLoss`, 0-d tensors in float32, or float64 if the outputs are."""

    pixel: Tensor
    instance_label: Tensor
    instance_output: Tensor
    center: Tensor
    false_instances: Tensor
    missed_instances: Tensor


CRITERIA = ("loss_function_pixel", "loss_function_instance", "loss_function_center")


class Family(_Loss):
    """What `InstanceLoss` and `InstanceCenterLoss` share: the three criteria, the options, and changing them."""

    terms: ClassVar[Any]  # a named tuple

    def __init__(
        self,
        loss_function_pixel: Criterion | None = None,
        loss_function_instance: Criterion | None = None,
        loss_function_center: Criterion | None = None,
        *,
        activation: str = "sigmoid",
        num_out_chn: int = 1,
        object_chn: int | Sequence[int] = 1,
        spatial_dims: int = 3,
        reduce_segmentation: str = "mean",
        instance_wise_reduce: str = "instance",
        num_iterations: int | None = None,
        segmentation_threshold: float | None = None,
        max_cc_out: int = 4096,
        mul_too_many: float = 50,
        min_instance_size: int = 0,
        centroid_offset: float = 3,
        smoother: float = 1e-7,
        instance_wise_loss_no_tp: bool = True,
        rate_instead_number: bool = False,
        gradients: str = "surrogate",
        to_onehot_y: bool = False,
        ignore_index: float | None = None,
        process_group: Any = None,
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.options = Options(
            activation=activation,
            num_out_chn=num_out_chn,
            object_chn=object_chn,
            spatial_dims=spatial_dims,
            reduce_segmentation=reduce_segmentation,
            instance_wise_reduce=instance_wise_reduce,
            num_iterations=num_iterations,
            segmentation_threshold=segmentation_threshold,
            max_cc_out=max_cc_out,
            mul_too_many=mul_too_many,
            min_instance_size=min_instance_size,
            centroid_offset=centroid_offset,
            smoother=smoother,
            instance_wise_loss_no_tp=instance_wise_loss_no_tp,
            rate_instead_number=rate_instead_number,
            gradients=gradients,
            to_onehot_y=to_onehot_y,
            ignore_index=ignore_index,
            process_group=process_group,
            spacing=spacing,
        )
        self._set_criteria(
            loss_function_pixel=loss_function_pixel,
            loss_function_instance=loss_function_instance,
            loss_function_center=loss_function_center,
        )

    def forward(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None = None,
        *,
        ignore_mask: Tensor | None = None,
    ) -> Any:
        """The terms of a batch; the class says what goes in and what comes out."""
        return self.terms(**self.evaluate(outputs, labels, cc_label_batch, ignore_mask, self.terms._fields))

    def evaluate(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        names: Collection[str],
        scene: Scene | None = None,
    ) -> dict[str, Tensor]:
        """Only the terms `names`, by name, in the order of the terms; `scene` as in `evaluate_sum`."""
        return evaluate_terms(
            outputs, labels, cc_label_batch, ignore_mask, self.options, names, scene=scene, **self._criteria()
        )

    def evaluate_sum(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        weights: Mapping[str, float],
        scene: Scene | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum of the terms named in `weights`, None if there are none, and these terms, detached.

        `scene` is what was made of the tensors, if other losses look at them too.
        """
        return evaluate_sum(
            outputs, labels, cc_label_batch, ignore_mask, self.options, weights, scene=scene, **self._criteria()
        )

    def _criteria(self) -> dict[str, Criterion | None]:
        return {
            "pixel": self.loss_function_pixel,
            "instance": self.loss_function_instance,
            "center": self.loss_function_center,
        }

    def edit_parameters(self, **changes: Any) -> None:
        """Change any of the arguments of the class, with the same checks; nothing changes if one is not allowed.

        `loss.max_cc_out = 100` does the same for one of them.

        Raises:
            TypeError: An unknown argument, or a value of the wrong type.
            ValueError: A value that is not allowed.
        """
        chosen = {name: changes.pop(name) for name in CRITERIA if name in changes}
        unknown = sorted(set(changes) - set(NAMES))
        if unknown:
            allowed = ", ".join((*CRITERIA, *NAMES))
            raise TypeError(f"edit_parameters got unknown {', '.join(map(repr, unknown))}; allowed: {allowed}.")
        options = dataclasses.replace(self.options, **changes)
        self._set_criteria(**chosen)
        self.options = options

    def print_parameters(self) -> None:
        """Print every argument and its value."""
        print(f"{type(self).__name__}\n" + "\n".join(f"  {name}: {value}" for name, value in self._parameters_in_use()))

    def extra_repr(self) -> str:
        """The arguments, for `print(loss)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._parameters_in_use() if name not in self._modules)

    def _parameters_in_use(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in (*CRITERIA, *NAMES)]

    def _set_criteria(self, **chosen: Criterion | None) -> None:
        for name, criterion in chosen.items():
            checks.criterion(name, criterion)
            if name != "loss_function_pixel":  # which sees the outputs as they are
                criteria.refuse_activation(name, criterion)
        criteria.refuse_cross_entropy("loss_function_center", chosen.get("loss_function_center"), self.options.smoother)
        instance = chosen.get("loss_function_instance")
        if instance is not None and instance is not getattr(self, "loss_function_instance", None):
            criteria.warn_if_slow("loss_function_instance", instance)
        for name, criterion in chosen.items():
            self._modules.pop(name, None)  # a function may take the place of a module
            super().__setattr__(name, criterion)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Options read like attributes, as in the published classes: loss.max_cc_out.
        options = self.__dict__.get("options")
        if options is not None and name in NAMES:
            return getattr(options, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            self.options = dataclasses.replace(self.options, **{name: value})
        elif name in CRITERIA:
            self._set_criteria(**{name: value})
        else:
            checks.not_nearly(self, name, (*CRITERIA, *NAMES))
            super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        checks.refuse_script()


class InstanceLoss(Family):
    """The instance-level loss family: seven terms of one labelling of outputs and labels.

    pixel, instance_label, instance_output, center, false_instances, missed_instances, proximity; the functions of
    `triton_instance_loss.functional` give the formula of each.

    Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`:

    - outputs: (B, N, H, W) or (B, N, H, W, D), float16, bfloat16, float32 or float64: logits, or with
      `activation="none"` probabilities or any finite numbers. Half precision is widened to float32.
    - labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype, bool included; 0 or 1, foreground where above 0.5.
      What is not in [-0.5, 1.5] is an error on the CPU, and on CUDA under TRITON_INSTANCE_LOSS_DEBUG=1; there, without
      it, every term is NaN.
    - cc_label_batch: (B, 1, *spatial), optional: the components of `labels`, precomputed; 0 = background, any positive
      whole number = an instance.
    - ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background for any
      term, and gets no gradient.

    Args:
        loss_function_pixel: the loss of the pixel term, on the raw `outputs` and `labels` (widened; with "softmax" on
            the activated output). None: Dice on the activated probabilities.
        loss_function_instance: the loss of two volumes (1, 1, *spatial) behind the instance terms. None: Dice. The
            volumes are activated, so it must not do that itself: `DiceLoss()`, not `DiceLoss(sigmoid=True)`. MONAI's
            DiceLoss and TverskyLoss, torch's MSELoss, L1Loss and BCELoss, and what `criteria.register_criterion` was
            told are evaluated from sums; any other loss volume by volume, slowly, after one warning.
        loss_function_center: the loss of the two volumes of centre boxes, likewise. None: Dice.
        activation: "sigmoid" and "softmax" make the output 0 or 1 (and pass the derivative of the probability);
            "none" takes it as it is.
        num_out_chn: channels N of `outputs`; at least 2 for "softmax".
        object_chn: the channel that is looked at, counted from 0; with one channel, that one whatever the value. Of
            several, each is a class against the rest, `labels` have N channels (or see `to_onehot_y`), and terms are
            averaged over classes. The pixel loss is called once all the same where it works on the raw tensors.
        spatial_dims: 2 or 3.
        reduce_segmentation: "mean" or "sum" over the instances of a sample, with `instance_wise_reduce="data"`; without
            effect with "instance", as published.
        instance_wise_reduce: "instance": mean over all instances of the batch; "data": per sample, then mean.
        num_iterations: None finds whole components; k cuts them as k rounds of max-pooling do (published: 350).
        segmentation_threshold: activated outputs of at least this are foreground; None: 0.5, or 1 / N with "softmax".
            At most 1 unless `activation="none"`; there, 0 or less means outputs equal to 1.
        max_cc_out: output instances used individually, in id order; 0 = all. Those beyond it count as false, and a
            label that only they touch as missed; on the CPU, one warning says so. The published 50 is less than images
            of cells hold.
        mul_too_many: with more than this many outputs a label, no output is used individually.
        min_instance_size: components of so many voxels or fewer are background.
        centroid_offset: half the side of the centre boxes, in voxels of the longest axis. A box is [c - o - 1, c + o)
            around its centre c, as published: half a voxel low.
        smoother: keeps divisions from zero, above 0.
        instance_wise_loss_no_tp: leave out of a label's value what its outputs cover of other labels.
        rate_instead_number: give false and missed instances as rates.
        gradients: "surrogate" gives every term a gradient; "log" the same, but with "sigmoid" and "softmax" that of
            false_instances and missed_instances is the gradient of a cross entropy, which does not vanish where the
            network is sure; "reference" those of the published code, zero for center, false_instances and
            missed_instances, and for all instance terms with "sigmoid" and "softmax".
        to_onehot_y: `labels` are (B, 1, *spatial) and hold the number of a class; foreground where it rounds to
            `object_chn`. A number that is no channel, and is not ignored, is an error as for `labels`.
        ignore_index: voxels of this label (in any channel) are ignored, like those of `ignore_mask`. A pixel loss sees
            background there; one that averages over voxels still counts them. Not 0 or 1 where labels are 0 and 1.
        process_group: with `instance_wise_reduce="instance"`, average over the instances of all processes: "world", or
            a group of torch.distributed. The loss of a process is then its share, and the mean of all shares, whose
            gradient is what DistributedDataParallel makes, is the loss of the joint batch. None: each for itself.
            Without effect with "data", which averages over samples.
        spacing: the size of a voxel along each spatial axis, in their order, positive numbers: centre boxes are then as
            wide in it along all axes, and the distances of proximity are in its units. None: voxels, as published.

    Raises:
        TypeError: An argument of the wrong type; a criterion that is not callable or returns no tensor; integer or
            complex `outputs`.
        ValueError: An option that is not allowed; a criterion of instances or centres that activates what it is given;
            shapes, devices or channels that do not fit; tensors on another device than the CPU or CUDA; no voxel, or
            more than 2^31 - 1 a sample; a criterion that returns more than one number; a negative or fractional id
            (looked for on the CPU always, on CUDA if the environment variable TRITON_INSTANCE_LOSS_DEBUG is 1).
        RuntimeError: A CUDA tensor where Triton is missing; a second derivative.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.
        AttributeError: An attribute is set whose name is nearly that of an argument.

    Note:
        The same input gives bitwise the same terms and gradients on the CPU, and on a GPU with "sigmoid" and "softmax",
        whose sums are of whole numbers. With "none", atomics add up float64 in any order there, which shows in the
        last bits; `torch.use_deterministic_algorithms(True)` has one program a sample add them in order, which is far
        slower. A NaN or infinite output makes every term NaN. Samples without outputs or labels give finite, connected
        terms. Half precision, autocast, MetaTensor and torch.compile are fine; fused criteria never synchronise with
        the host on CUDA.

    Source:
        Rachmadi, Byra and Skibbe, Computers in Biology and Medicine 2024, doi 10.1016/j.compbiomed.2024.108414.
        `docs/differences.md` lists every deviation from the code published with it.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 8, 8, 8)
        >>> labels[..., 1:3, 1:3, 1:3] = 1
        >>> outputs = torch.full_like(labels, -4).requires_grad_()
        >>> terms = InstanceLoss()(outputs, labels)
        >>> terms.missed_instances.item(), terms.false_instances.item(), round(terms.instance_label.item(), 3)
        (1.0, 0.0, 1.0)
        >>> terms.missed_instances.backward()
        >>> bool(outputs.grad[..., 1:3, 1:3, 1:3].max() < 0)
        True
    """

    terms = InstanceTerms


class InstanceCenterLoss(Family):
    """The instance-level loss family without proximity: six terms of one labelling of outputs and labels.

    pixel, instance_label, instance_output, center, false_instances, missed_instances. How it is called, its arguments,
    errors and notes are those of `InstanceLoss`.

    Source:
        Rachmadi, Poon and Skibbe, MIDL 2023, arXiv 2304.06229, with the false instance rate of Rachmadi et al. 2024.
        `docs/differences.md` lists every deviation from the published code.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 1, 9, 9)
        >>> labels[..., 1:3, 1:3] = 1
        >>> terms = InstanceCenterLoss(spatial_dims=2, activation="none")(labels, labels)
        >>> terms.missed_instances.item()
        0.0
    """

    terms = InstanceCenterTerms


DEFAULT_WEIGHTS = {
    "pixel": 1.0,
    "instance_label": 0.5,
    "instance_output": 0.5,
    "center": 0.25,
    "false_instances": 0.25,
    "missed_instances": 0.25,
    "proximity": 0.0,
}


_OF_ALL_LOSSES = DEFAULT_WEIGHTS | {"instance": 0.5, "fdr": 0.25}  # those of ICILoss and dICILoss too


class Weights(dict[str, float]):
    """A dict with one finite number for each of `names`, in their order, whatever is done to it.

    Raises:
        TypeError: A weight is no number; the weights are no mapping.
        ValueError: A weight is not finite; another name; a name without a weight.
    """

    def __init__(self, names: Sequence[str], values: Mapping[str, float]) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"weights must be a mapping from the names of terms to numbers, got {values!r}.")
        for name, weight in values.items():
            checks.choice("the name of a weight", name, names)
            checks.number(f"weight {name}", weight)
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(
                f"weights must have one for each of {', '.join(map(repr, names))}, got none for "
                f"{', '.join(map(repr, missing))}; a weight of 0 leaves a term out, and update() changes some of them."
            )
        super().__init__({name: float(checks.plain(values[name])) for name in names})
        self.plain = dict(self)  # the same, for the compiler: before torch 2.7 it knows no subclass of dict

    def update(self, *args: Any, **changes: Any) -> None:
        """As of a dict; nothing changes if one of them is not allowed."""
        super().update(Weights(tuple(self), {**self, **dict(*args, **changes)}))
        self.plain.update(self)

    def __setitem__(self, name: str, weight: float) -> None:
        self.update({name: weight})

    def __ior__(self, changes: Any) -> "Weights":  # type: ignore[misc, override]
        self.update(changes)
        return self

    def setdefault(self, name: str, default: float = 0.0) -> float:
        """The weight; every term has one."""
        checks.choice("the name of a weight", name, tuple(self))
        return self[name]

    def __delitem__(self, name: str) -> NoReturn:
        checks.choice("the name of a weight", name, tuple(self))
        raise ValueError(f"weight {name} must be a finite number and can't be deleted; 0 leaves the term out.")

    def pop(self, name: str, *default: Any) -> NoReturn:
        """Refused, as every term has a weight."""
        del self[name]

    def popitem(self) -> NoReturn:
        """Refused, as every term has a weight."""
        del self[next(reversed(self))]

    def clear(self) -> NoReturn:
        """Refused, as every term has a weight."""
        del self[next(iter(self))]

    def __reduce__(self) -> Any:
        return Weights, (tuple(self), dict(self))


class WeightedSum(_Loss):
    """One number for a training loop: sum of weight * term over the terms of `loss`.

    The default weights (pixel 1, instance_label and instance_output 0.5, center, false_instances and missed_instances
    0.25, proximity 0) are meant for `rate_instead_number=True`: counts with a weight get one warning, as an untrained
    network has thousands of false instances. A term of weight 0 is not computed.

    Args:
        loss: an `InstanceLoss`, `InstanceCenterLoss`, `ICILoss` or `dICILoss`; its options and criteria are changed
            there, `loss.loss`.
        **weights: one finite number a term name; terms left out keep their default.

    Attributes:
        weights: the weight of every term by name; may be changed between calls, with the same checks.
        terms: the detached terms of the last call by name, on their device; empty before the first.

    Raises:
        TypeError: `loss` is no loss of the family, `weights` no mapping, or a weight no number.
        ValueError: A weight for a term that `loss` does not have, a weight that is not finite, or a term without one.
        AttributeError: An option, a criterion or a weight is set as an attribute of the sum.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Called as `loss(outputs, labels, cc_label_batch=None, *, ignore_mask=None)`, it returns a 0-d tensor, connected
        to the graph of `outputs` whatever the input: empty patches never leave a parameter without a gradient.

    Example:
        >>> import torch
        >>> loss = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=0.1)
        >>> outputs = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
        >>> loss(outputs, torch.zeros(1, 1, 8, 8, 8)).backward()
        >>> sorted(loss.terms)[:2]
        ['center', 'false_instances']
    """

    weights: Weights

    def __init__(self, loss: Family, **weights: float) -> None:
        super().__init__()
        self.loss = loss
        names = loss.terms._fields
        self.weights = Weights(names, {name: _OF_ALL_LOSSES[name] for name in names} | weights)
        self.terms: dict[str, Tensor] = {}
        counts = [name for name in ("false_instances", "missed_instances") if self.weights[name] != 0.0]
        if counts and not loss.rate_instead_number:
            warnings.warn(
                f"{' and '.join(counts)} are counts, thousands for an untrained network, and the default weights are "
                f"meant for rates: give {type(loss).__name__} rate_instead_number=True, or them a weight of 0.",
                stacklevel=2,
            )

    def forward(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None = None,
        *,
        ignore_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of a batch."""
        return self.evaluate(outputs, labels, cc_label_batch, ignore_mask)

    def evaluate(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None,
        ignore_mask: Tensor | None,
        scene: Scene | None = None,
    ) -> Tensor:
        """The same; `scene` is what was made of the tensors, if other losses look at them too."""
        used = {name: weight for name, weight in self.weights.plain.items() if weight != 0.0}
        inputs = outputs, labels, cc_label_batch, ignore_mask
        total, terms = self.loss.evaluate_sum(*inputs, used, scene)
        if torch.compiler.is_compiling():  # before torch 2.7 the compiler follows nothing else
            self.terms = terms
        else:  # torch.nn.Module would take its time to look at what is set
            self.__dict__["terms"] = terms
        if total is not None and (total.requires_grad or not outputs.requires_grad):
            return total
        # The sum of no voxels is connected to all of them, and costs no pass.
        nothing = widen(unwrap(outputs)[:0]).sum()
        return nothing if total is None else total - nothing  # (-0 + 0 would be another zero)

    def extra_repr(self) -> str:
        """The weights, for `print(loss)`."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":
            if not isinstance(value, Family):
                allowed = "an InstanceLoss, InstanceCenterLoss, ICILoss or dICILoss"
                raise TypeError(f"loss must be {allowed}, got {type(value).__name__}.")
            if "weights" in self.__dict__ and set(self.weights) != set(value.terms._fields):
                raise ValueError(f"loss must have the terms {', '.join(self.weights)}, got {type(value).__name__}.")
        elif name == "weights":
            value = Weights(self.loss.terms._fields, value)
        elif name in (*NAMES, *CRITERIA):
            raise AttributeError(f"{name} belongs to the loss that is summed: set loss.loss.{name} instead.")
        elif name in _OF_ALL_LOSSES:
            raise AttributeError(f"{name} is a term: set its weight, loss.weights[{name!r}], instead.")
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        checks.refuse_script()
