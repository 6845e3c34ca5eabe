"""From the tensors of a call to volumes: checked, widened, one channel."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .ops import GIVEN, NONE, SIGMOID
from .options import Options

# Types that formulas or comparisons are not made in, and what holds their values (those of uint64 up to rounding).
WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.float64,
}


def unwrap(value: Tensor) -> Tensor:
    """A plain tensor on the same storage, gradients intact; types with a dispatch of their own stay as they are."""
    if type(value) is Tensor or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    return value.as_subclass(Tensor)


def widen(value: Tensor) -> Tensor:
    """Half precision becomes float32, wide unsigned integers what is larger; anything else stays."""
    dtype = WIDER.get(value.dtype)
    return value if dtype is None else value.to(dtype)


def equals(value: Tensor, number: float) -> Tensor:
    """Where `value` is `number`, as numbers: PyTorch would wrap 257 to 1 beside uint8."""
    if not value.is_floating_point() and value.dtype != torch.bool:
        limits = torch.iinfo(value.dtype)
        if not (limits.min <= number <= limits.max and number == int(number)):
            return torch.zeros_like(value, dtype=torch.bool)
        number = int(number)
    return value == number


def select(value: Tensor, options: Options) -> Tensor:
    """The channels that are looked at, (B, classes, *spatial)."""
    if value.shape[1] == 1 or options.channels == tuple(range(value.shape[1])):
        return value
    return torch.stack([value[:, channel] for channel in options.channels], 1)


def to_volume(value: Tensor) -> Tensor:
    """(B, classes, *spatial) -> contiguous (B * classes, D, H, W): each class of a sample is a sample."""
    value = value.flatten(0, 1)
    return (value.unsqueeze(1) if value.ndim == 3 else value).contiguous()


def for_each_class(value: Tensor, options: Options) -> Tensor:
    """The volume of what all classes share, (B, 1, *spatial): each of them sees it."""
    return to_volume(value.expand(-1, len(options.classes), *value.shape[2:]))


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A context in which nothing is cast; where nothing would be, it costs nothing."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class Given(NamedTuple):
    """What a call is about: plain, checked tensors, narrow types widened, ignored voxels out of sight."""

    outputs: Tensor  # (B, N, *spatial), 0 where ignored
    labels: Tensor  # (B, 1 or N, *spatial), 0 where ignored
    ids: Tensor | None  # (B, 1, *spatial)
    ignored: Tensor | None  # (B, 1, *spatial) bool


def check_and_widen(
    outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None, ignore_mask: Tensor | None, options: Options
) -> Given:
    """The public boundary."""
    several = len(options.classes) > 1
    checks.inputs(
        outputs,
        labels,
        cc_label_batch,
        ignore_mask,
        spatial_dims=options.spatial_dims,
        num_out_chn=options.num_out_chn,
        num_classes=len(options.classes),
        label_channels=(1,) if options.to_onehot_y else (options.num_out_chn,) if several else (1, options.num_out_chn),
    )
    ids = None if cc_label_batch is None else whole("cc_label_batch", unwrap(cc_label_batch))
    outputs, labels = widen(unwrap(outputs)), widen(unwrap(labels))
    ignored = None if ignore_mask is None else unwrap(ignore_mask)
    if options.ignore_index is not None:
        by_label = equals(labels, options.ignore_index).any(1, keepdim=True)
        ignored = by_label if ignored is None else ignored | by_label
    if ignored is not None:
        options.check_ignoring()
        outputs, labels = outputs.masked_fill(ignored, 0.0), labels.masked_fill(ignored, 0)
    if checks.debugging(labels) and not options.to_onehot_y:
        checks.mask("labels", labels, checks.LABEL_ADVICE)
    return Given(outputs, labels, ids, ignored)


def whole(name: str, ids: Tensor) -> Tensor:
    """Given ids as int32 if they are, else as int64; looked at where that is free, or under the debug switch."""
    # (uint64 wraps, and shows as negative)
    ids = ids if ids.dtype == torch.uint64 else widen(ids)
    numbers = ids if ids.dtype == torch.int32 else ids.long()
    if checks.debugging(ids):
        checks.component_ids(name, ids if ids.is_floating_point() else numbers)
    return numbers


def activation_of(options: Options) -> tuple[int, float]:
    """The code of the activation, and its threshold."""
    codes = {"sigmoid": SIGMOID, "softmax": GIVEN, "none": NONE}
    return codes[options.activation], options.threshold


def background(options: Options) -> float:
    """An output that is background: 0, or a logit whose probability is 0."""
    return -1e4 if options.activation == "sigmoid" else 0.0


def to_activate(given: Given, options: Options) -> Tensor:
    """The volume that the activation works on: the channels that are looked at, of the softmax if there is one."""
    outputs = torch.softmax(given.outputs.detach(), dim=1) if options.activation == "softmax" else given.outputs
    x = select(outputs, options)
    return to_volume(x if given.ignored is None else x.masked_fill(given.ignored, background(options)))


def carrier_of(x: Tensor, given: Given, options: Options) -> Tensor:
    """The volume that gradients flow into, from the one that the activation works on.

    With "softmax" it is the logit of each class against the rest: its sigmoid is the probability, and, unlike that of
    the probability itself, its derivative keeps all digits where the network is sure.
    """
    if options.activation != "softmax":
        return x
    logits = torch.stack([against_the_rest(given.outputs, channel) for channel in options.channels], 1)
    return to_volume(logits if given.ignored is None else logits.masked_fill(given.ignored, 0.0))


def against_the_rest(outputs: Tensor, channel: int) -> Tensor:
    """The logit of one class against all others, x_c - logsumexp(x_k, k != c), (B, *spatial)."""
    rest = torch.cat((outputs[:, :channel], outputs[:, channel + 1 :]), dim=1)
    return outputs[:, channel] - torch.logsumexp(rest, dim=1)


def to_compare(given: Given, options: Options) -> Tensor:
    """The volume of labels beside it; foreground where above 0.5."""
    if not options.to_onehot_y:
        return to_volume(select(given.labels, options))
    labels = class_masks("labels", given.labels, options.classes, options.num_out_chn)
    return to_volume(labels if given.ignored is None else labels.masked_fill(given.ignored, 0))


def class_masks(name: str, labels: Tensor, classes: Sequence[int], num_classes: int) -> Tensor:
    """Class numbers (B, 1, *spatial) as masks of some of 0..num_classes - 1, (B, len(classes), *spatial).

    A number that is no class is an error where looking is free; elsewhere it becomes 2, which no label may be.
    """
    numbers = labels.round() if labels.is_floating_point() else labels
    masks = torch.cat([equals(numbers, number) for number in classes], 1)
    if checks.debugging(labels):
        checks.class_numbers(name, labels, num_classes)
        return masks
    if num_classes == 1 and not labels.is_floating_point():
        return masks  # any whole number will do
    low, high = (0, num_classes - 1) if num_classes > 1 else (-torch.inf, torch.inf)
    if not labels.is_floating_point() and labels.dtype != torch.bool:  # a limit beyond those of the dtype would wrap
        high = min(high, torch.iinfo(labels.dtype).max)
    return torch.where((numbers >= low) & (numbers <= high), masks.byte(), 2)


def probabilities(carrier: Tensor, options: Options) -> Tensor:
    """The activated output before it is made 0 or 1."""
    return torch.sigmoid(carrier) if options.hard else carrier


def straight_through(value: Tensor, soft: Tensor, options: Options) -> Tensor:
    """`value` in forward; in backward the derivative of `soft`, or zero with the published gradients."""
    change = soft - soft.detach()
    return value + (change if options.surrogate else 0.0 * change)


def activated(x: Tensor, carrier: Tensor, foreground: Tensor, y: Tensor, options: Options) -> Tensor:
    """The activated output as a differentiable volume; a hard one has a derivative in `foreground` and `y` alone."""
    if not options.hard:
        return carrier
    p = probabilities(carrier, options)
    return straight_through(foreground.to(x.dtype), torch.where(foreground | y, p, p.detach()), options)


def health_of(outputs: Tensor, truth: Tensor, dim: int | None = None) -> Tensor:
    """1, or NaN if an output is not finite or a label neither 0 nor 1: what terms are multiplied by."""
    low, high = torch.aminmax(outputs.detach(), dim=dim)
    health = 1.0 + 0.0 * low + 0.0 * high
    if truth.dtype == torch.bool:
        return health
    low, high = torch.aminmax(truth, dim=dim)
    return torch.where((low >= -0.5) & (high <= 1.5), health, torch.nan)
