"""Every check of arguments, with one wording: the argument, its value, and what is allowed."""

import difflib
import math
import numbers
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

DEBUG_VARIABLE = "TRITON_INSTANCE_LOSS_DEBUG"
MAX_VOXELS = 2**31 - 1
LABEL_ADVICE = (
    "If they are a mask of 0 and 255, give labels == 255; if class numbers, say to_onehot_y=True; if numbers of "
    "instances, give labels > 0, and the numbers as cc_label_batch. For voxels without a label there are ignore_index "
    "and ignore_mask."
)
MAX_SAMPLES = 2**15 - 1  # outputs and labels are labelled together, and a CUDA grid has 65535 places for samples
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")
_WITH_LIMITS = {torch.bool: torch.uint8, torch.bfloat16: torch.float32}  # for types that PyTorch finds no limits of
_Function = TypeVar("_Function", bound=Callable[..., Any])


def plain(value: Any) -> Any:
    """A number, flag or sequence as plain Python has it, whatever type it came in; anything else as it is.

    So options of NumPy or a configuration have a JSON form, copies and a `repr` like all others, and compile.
    """
    if value is None or type(value) in (int, float, bool, str):  # what it nearly always is, and the compiler follows
        return value
    if type(value) in (tuple, list):
        return tuple([plain(each) for each in value])
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple([plain(each) for each in value])
    return value


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """`value` must be one of the words `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def integer(name: str, value: Any, minimum: int) -> int:
    """`value` must be a whole number of at least `minimum`; gives it as a plain int."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return value


def number(
    name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf, *, above_minimum: bool = False
) -> float:
    """`value` must be a finite number in [minimum, maximum], or in (minimum, maximum] with `above_minimum`.

    Gives it as a plain int or float.
    """
    value = plain(value)
    low = "" if minimum == -math.inf else f" {'above' if above_minimum else 'of at least'} {minimum:g}"
    high = "" if maximum == math.inf else f"{' and' if low else ''} of at most {maximum:g}"
    allowed = f"a finite number{low}{high}"
    # (a pair, no union: torch 2.6 can't compile that)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r}.")
    too_low = value <= minimum if above_minimum else value < minimum
    # (no math.isfinite: the compiler does not follow it where a number may change between calls)
    if not -math.inf < value < math.inf or too_low or value > maximum:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return value


def ascending(
    name: str, value: Any, minimum: float, maximum: float = math.inf, *, above_minimum: bool = False
) -> tuple[float, ...]:
    """`value` must be a sequence of numbers as `number` has them, each larger than the one before; gives a tuple."""
    value = plain(value)
    if not isinstance(value, tuple) or not value:
        raise TypeError(f"{name} must be a sequence of ascending numbers, one at least, got {value!r}.")
    for place, each in enumerate(value):
        number(f"{name}[{place}]", each, minimum, maximum, above_minimum=above_minimum)
    if any(value[place] <= value[place - 1] for place in range(1, len(value))):
        raise ValueError(f"{name} must be a sequence of ascending numbers, one at least, got {value!r}.")
    return value


def spacing(name: str, value: Any, axes: int) -> tuple[float, ...]:
    """`value` must be a positive number for each of some axes; gives them as plain numbers."""
    value = plain(value)
    allowed = f"a positive number for each of {axes} axes (spatial_dims={axes})"
    if not isinstance(value, tuple):
        raise TypeError(f"{name} must be {allowed}, or None, got {value!r}.")
    if len(value) != axes:
        raise ValueError(f"{name} must be {allowed}, got {len(value)}: {value!r}.")
    return tuple(float(number(f"{name}[{axis}]", step, 0, above_minimum=True)) for axis, step in enumerate(value))


def not_nearly(loss: Any, name: str, allowed: Collection[str]) -> None:
    """A module may be given any attribute, but not one of ours one that is nearly an option, which would do nothing."""
    ours = type(loss).__module__.startswith(f"{__package__}.")  # a subclass may have some of its own
    if ours and not name.startswith("_") and not hasattr(loss, name):
        meant = difflib.get_close_matches(name, allowed, n=1, cutoff=0.8)
        if meant:
            raise AttributeError(
                f"{type(loss).__name__} has no option {name!r}; did you mean {meant[0]!r}? Allowed: "
                f"{', '.join(allowed)}."
            )


def channels(name: str, value: Any, count: int) -> None:
    """`value` must be a channel, or a tuple of different ones, of `count`; of a single one, any number will do."""
    several = isinstance(value, tuple)
    for channel in value if several else (value,):
        integer(name, channel, 0)
        if count > 1 and channel >= count:
            raise ValueError(f"{name} must be a channel from 0 to {count - 1} (num_out_chn={count}), got {value!r}.")
    if several and (len(set(value)) != len(value) or not value or (count == 1 and len(value) > 1)):
        raise ValueError(f"{name} must be one channel or several different ones of num_out_chn={count}, got {value!r}.")


def process_group(name: str, value: Any) -> None:
    """`value` must be None, "world" or a process group of torch.distributed."""
    group = getattr(torch.distributed, "ProcessGroup", None) if torch.distributed.is_available() else None
    if value is not None and value != "world" and (group is None or not isinstance(value, group)):
        raise TypeError(f'{name} must be None, "world" or a torch.distributed.ProcessGroup, got {value!r}.')


def flag(name: str, value: Any) -> bool:
    """`value` must be True or False; gives it as a plain bool."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def criterion(name: str, value: Any) -> None:
    """`value` must be a loss on two volumes, or None for our own Dice."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a callable loss(outputs, labels), or None for Dice, got {value!r}.")


def scalar(name: str, value: Any) -> Tensor:
    """What the criterion called `name` returned must be a 0-d tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a 0-d tensor, got {type(value).__name__}.")
    if value.ndim != 0:
        raise ValueError(f"{name} must return a 0-d tensor, got shape {tuple(value.shape)}; is its reduction 'none'?")
    return value


def not_scriptable(function: _Function) -> _Function:
    """`function` as it is, with an error of ours in `torch.jit.script`."""
    function.__dict__["__prepare_scriptable__"] = refuse_script
    return function


def refuse_script() -> NoReturn:
    """What `torch.jit.script` calls before it looks at anything."""
    raise NotImplementedError(
        "torch.jit.script of the losses, metrics and components is not supported: script the network without them, or "
        "use torch.compile."
    )


def untransformed(name: str, value: Tensor) -> None:
    """No transform of torch stands between `value` and its numbers, which the operators work on."""
    if torch.compiler.is_compiling():  # where torch reports what the operators can't do
        return
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise NotImplementedError(
            f"{name} is traced by torch.jit.trace, which is not supported: a trace keeps what hangs on this one input. "
            "Trace the network without the loss, or use torch.compile."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent of forward-mode differentiation (jvp), which is not supported: use backward, or "
            "torch.func.grad or vjp."
        )
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            raise NotImplementedError(
                f"{name} has an axis of torch.vmap, which is not supported: give it as the first axis of one call, "
                "(B, N, *spatial), or call once for each in a loop."
            )
        value = torch._C._functorch.get_unwrapped(value)


def tensor(name: str, value: Any) -> None:
    """`value` must be a dense tensor of a real dtype, outside of transforms that the operators do not take part in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    untransformed(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}.")
    if value.dtype.is_complex:
        raise TypeError(f"{name} must have a real dtype, got {value.dtype}.")
    if value.dtype.is_floating_point and value.dtype.itemsize < 2:
        raise TypeError(f"{name} must have a dtype that can be compared, got {value.dtype}.")


def volume(name: str, value: Tensor, spatial_dims: int, num_classes: int = 1) -> None:
    """`value` must be (B, N, *spatial) with `spatial_dims` axes, not empty, and no larger than can be counted.

    Each of `num_classes` of a sample is labelled like a sample.
    """
    if value.device.type not in DEVICES:
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {value.device}; move it there first.")
    axes = "(B, N, H, W)" if spatial_dims == 2 else "(B, N, H, W, D)"
    if value.ndim != spatial_dims + 2:
        raise ValueError(
            f"{name} must have shape {axes} for spatial_dims={spatial_dims}, got {tuple(value.shape)} "
            f"({value.ndim} axes instead of {spatial_dims + 2})."
        )
    if any(size == 0 for size in value.shape):
        raise ValueError(f"{name} must have at least one element along every axis {axes}, got {tuple(value.shape)}.")
    if value.shape[0] * num_classes > MAX_SAMPLES:
        classes = f" with {num_classes} classes" if num_classes > 1 else ""
        raise ValueError(
            f"{name} must have at most {MAX_SAMPLES // num_classes} samples{classes}, got {value.shape[0]}."
        )
    voxels = math.prod(value.shape[2:])
    if voxels > MAX_VOXELS:
        raise ValueError(f"{name} must have at most 2^31 - 1 voxels a sample, got {voxels} of {tuple(value.shape)}.")


def same_place(name: str, value: Tensor, outputs: Tensor, channels: Collection[int]) -> None:
    """`value` must agree with `outputs` in batch, spatial shape and device, and have one of `channels` channels."""
    allowed = [(outputs.shape[0], c, *outputs.shape[2:]) for c in sorted(set(channels))]
    if tuple(value.shape) not in allowed:
        shapes = " or ".join(map(str, allowed))
        raise ValueError(
            f"{name} must have shape {shapes} beside outputs of {tuple(outputs.shape)}, got {tuple(value.shape)}."
        )
    if value.device != outputs.device:
        raise ValueError(f"{name} must be on the device of outputs, {outputs.device}, got {value.device}.")


def inputs(
    outputs: Any,
    labels: Any,
    cc_label_batch: Any,
    ignore_mask: Any,
    *,
    spatial_dims: int,
    num_out_chn: int,
    num_classes: int,
    label_channels: Collection[int],
) -> None:
    """The tensors of a call fit each other and the options."""
    tensor("outputs", outputs)
    if outputs.dtype not in FLOAT_DTYPES:
        raise TypeError(f"outputs must be float16, bfloat16, float32 or float64, got {outputs.dtype}.")
    volume("outputs", outputs, spatial_dims, num_classes)
    if outputs.shape[1] != num_out_chn:
        raise ValueError(
            f"outputs must have num_out_chn={num_out_chn} channels, got {outputs.shape[1]} in {tuple(outputs.shape)}."
        )
    tensor("labels", labels)
    same_place("labels", labels, outputs, label_channels)
    if cc_label_batch is not None:
        instance_numbers("cc_label_batch", cc_label_batch, outputs)
    if ignore_mask is not None:
        tensor("ignore_mask", ignore_mask)
        if ignore_mask.dtype != torch.bool:
            raise TypeError(f"ignore_mask must be bool, True where a voxel is ignored, got {ignore_mask.dtype}.")
        same_place("ignore_mask", ignore_mask, outputs, (1,))


def instance_numbers(name: str, value: Any, outputs: Tensor) -> None:
    """`value` must hold the number of an instance at each voxel of `outputs`."""
    tensor(name, value)
    if value.dtype == torch.bool:
        raise TypeError(
            f"{name} must hold the number of an instance at each voxel, got torch.bool, a mask; leave it out, and "
            "components are found."
        )
    same_place(name, value, outputs, (1,))


def warn_once(owner: Any, topic: str, message: str) -> None:
    """Warn, unless `owner`, a loss's options, was the reason for a warning on that topic before."""
    said = owner.__dict__.setdefault("_said", set())
    if topic not in said:
        said.add(topic)
        warnings.warn(message, stacklevel=2)


def debugging(value: Tensor) -> bool:
    """Whether values may be looked at: free on the CPU, a synchronisation on CUDA, so there only on demand."""
    if torch.compiler.is_compiling() or _is_traced(value):
        return False
    return value.device.type == "cpu" or os.environ.get(DEBUG_VARIABLE) == "1"


def _is_traced(value: Tensor) -> bool:
    """Whether `value` stands for data that is not there (a fake or functional tensor)."""
    return type(value) not in (Tensor, torch.nn.Parameter) and hasattr(value, "fake_mode")


def component_ids(name: str, ids: Tensor) -> None:
    """Precomputed components are 0 or positive whole numbers."""
    lowest = ids.min()  # of int64 several times as fast as amin
    broken = lowest if not bool(lowest >= 0) else None  # catches NaN too
    if broken is None and ids.is_floating_point():
        outside = (ids != ids.trunc()) | (ids >= 2.0**63)
        broken = ids[outside].flatten()[0] if bool(outside.any()) else None
    if broken is not None:
        raise ValueError(f"{name} must hold whole numbers >= 0, got {broken.item()!r} among them.")


def mask(name: str, values: Tensor, advice: str) -> None:
    """`values` are 0 or 1, or close enough to be meant as that."""
    if values.dtype == torch.bool:
        return
    low, high = _limits(values)
    if not (low >= -0.5 and high <= 1.5):
        raise ValueError(
            f"{name} must be 0 or 1 (from -0.5 to 1.5; foreground above 0.5), got {_unlike(low, high, 1.5)!r} among "
            f"them. {advice}"
        )


def class_numbers(name: str, values: Tensor, num_classes: int) -> None:
    """`values` round to class numbers from 0 to `num_classes` - 1; of a single channel, to any number."""
    low, high = _limits(values)
    most = num_classes - 1 if num_classes > 1 else math.inf
    # (rounds halves to even, as PyTorch does; NaN cannot be rounded)
    finite = math.isfinite(low) and math.isfinite(high)
    if not (finite and (num_classes == 1 or (round(low) >= 0 and round(high) <= most))):
        allowed = f"from 0 to {most} (num_out_chn={num_classes})" if num_classes > 1 else "(finite)"
        raise ValueError(
            f"{name} must be class numbers {allowed}, got {_unlike(low, high, most)!r} among them. For voxels without "
            "a label there are ignore_index and ignore_mask."
        )


def _unlike(low: float, high: float, most: float) -> float:
    """Which of the smallest and the largest value is to be shown as one that is not allowed."""
    return high if high > most else low


def logits(outputs: Tensor, activation: str, ignored: Tensor | None) -> str | None:
    """What to say of outputs that look like probabilities or a mask where logits are expected; None if nothing.

    They are (B, N, *spatial), float32 or float64.
    """
    if activation == "none" or not debugging(outputs):
        return None
    # Few outputs are looked at first: any of a network that is below 0 tells, and then all is well.
    if _shares_memory(outputs):
        few = outputs.detach().numpy()[0, 0, 0].ravel()[:1024]
        if few[0] < 0 or few[0] > 1 or few.min() < 0 or few.max() > 1:
            return None
    low, high = _limits(outputs)
    if not (low >= 0 and high <= 1):
        return None
    if ignored is not None and bool(ignored.all()):
        return None
    return (
        f"outputs must be logits with activation={activation!r}, but all of them lie in [0, 1]; what is 0 in a "
        'probability or mask is then a logit of 0, which is no background. Probabilities and masks: activation="none".'
    )


def _shares_memory(values: Tensor) -> bool:
    """Whether NumPy can look at them, whose calls cost less than PyTorch's."""
    transformed = torch._C._are_functorch_transforms_active()
    transformed = transformed or torch._C._functorch.is_functorch_wrapped_tensor(values)
    return type(values) is Tensor and values.device.type == "cpu" and not transformed


def _limits(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest value, NaN if one is NaN."""
    if values.dtype in _WITH_LIMITS:
        values = values.to(_WITH_LIMITS[values.dtype])
    low, high = torch.aminmax(values.detach())
    if _shares_memory(low):
        low, high = low.numpy(), high.numpy()  # type: ignore[assignment] # nothing waits, and no tool counts it as that
    return low.item(), high.item()


def probabilities(name: str, a: Tensor) -> None:
    """Cross entropy needs outputs in [0, 1]; looked at where that is free, or under the debug switch."""
    if debugging(a) and not bool(((a >= 0) & (a <= 1) | a.isnan()).all()):
        low, high = torch.aminmax(a)
        raise ValueError(f"{name} is a cross entropy and needs outputs in [0, 1], got [{low.item()}, {high.item()}].")


def room_for_labels(most: int, room: int) -> None:
    """There are at most as many label instances in a sample as tables have room for."""
    if most > room:
        raise ValueError(f"labels must have at most {room} instances in a sample of this size, got {most}.")
