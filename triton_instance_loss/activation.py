"""From the tensors of a call to volumes: checked, widened, one channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .ops import GIVEN, NONE, SIGMOID
from .options import Options


def unwrap(value: Tensor) -> Tensor:
    """A plain tensor on the same storage, gradients intact; types with a dispatch of their own stay as they are."""
    if type(value) is Tensor or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    return value.as_subclass(Tensor)


def widen(value: Tensor) -> Tensor:
    """Half precision becomes float32; anything else stays."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def select(value: Tensor, options: Options) -> Tensor:
    """The channels that are looked at, (B, classes, *spatial)."""
    if value.shape[1] == 1 or options.channels == tuple(range(value.shape[1])):
        return value
    return torch.stack([value[:, channel] for channel in options.channels], 1)


def to_volume(value: Tensor) -> Tensor:
    """(B, classes, *spatial) -> contiguous (B * classes, D, H, W): each class of a sample is a sample."""
    value = value.flatten(0, 1)
    return (value.unsqueeze(1) if value.ndim == 3 else value).contiguous()


class Given(NamedTuple):
    """What a call is about: plain, checked tensors, halves widened, ignored voxels out of sight."""

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
    ids = None if cc_label_batch is None else unwrap(cc_label_batch)
    outputs, labels = widen(unwrap(outputs)), widen(unwrap(labels))
    ignored = None if ignore_mask is None else unwrap(ignore_mask)
    if options.ignore_index is not None:
        by_label = (labels == options.ignore_index).any(1, keepdim=True)
        ignored = by_label if ignored is None else ignored | by_label
    if ignored is None:
        return Given(outputs, labels, ids, None)
    options.check_ignoring()
    return Given(outputs.masked_fill(ignored, 0.0), labels.masked_fill(ignored, 0), ids, ignored)


def activation_of(options: Options) -> tuple[int, float]:
    """The code of the activation, and its threshold."""
    if options.activation == "softmax":
        return GIVEN, 1.0 / options.num_out_chn
    return SIGMOID if options.activation == "sigmoid" else NONE, float(options.segmentation_threshold)


def background(options: Options) -> float:
    """An output that is background: 0, or a logit whose probability is 0."""
    return -1e4 if options.activation == "sigmoid" else 0.0


def to_activate(given: Given, options: Options) -> Tensor:
    """The volume that the activation works on: the channels that are looked at, of the softmax if there is one."""
    outputs = torch.softmax(given.outputs, dim=1) if options.activation == "softmax" else given.outputs
    x = select(outputs, options)
    return to_volume(x if given.ignored is None else x.masked_fill(given.ignored, background(options)))


def to_compare(given: Given, options: Options) -> Tensor:
    """The volume of labels beside it; foreground where 1."""
    if not options.to_onehot_y:
        return to_volume(select(given.labels, options))
    labels = torch.cat([given.labels == number for number in options.classes], 1)
    return to_volume(labels if given.ignored is None else labels & ~given.ignored)


def probabilities(x: Tensor, options: Options) -> Tensor:
    """What gradients flow into, from the volume that the activation works on."""
    return torch.sigmoid(x) if options.activation == "sigmoid" else x


def straight_through(value: Tensor, carrier: Tensor, options: Options) -> Tensor:
    """`value` in forward; in backward the derivative of `carrier`, or zero with the published gradients."""
    change = carrier - carrier.detach()
    return value + (change if options.surrogate else 0.0 * change)


def activated(x: Tensor, foreground: Tensor, options: Options) -> Tensor:
    """The activated output as a differentiable volume."""
    if not options.hard:
        return x
    return straight_through(foreground.to(x.dtype), probabilities(x, options), options)
