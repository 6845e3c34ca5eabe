"""From the tensors of a call to volumes: checked, widened, one channel."""

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
    """The channel that is looked at, (B, 1, *spatial)."""
    return value[:, options.channel : options.channel + 1] if value.shape[1] > 1 else value


def to_volume(value: Tensor) -> Tensor:
    """(B, 1, *spatial) -> contiguous (B, D, H, W)."""
    return (value if value.ndim == 4 else value.squeeze(1)).contiguous()


def check_and_widen(
    outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The public boundary: plain, checked tensors; halves widened."""
    checks.inputs(outputs, labels, cc_label_batch, options.spatial_dims, options.num_out_chn)
    ids = None if cc_label_batch is None else unwrap(cc_label_batch)
    return widen(unwrap(outputs)), widen(unwrap(labels)), ids


def activation_of(options: Options) -> tuple[int, float]:
    """The code of the activation, and its threshold."""
    if options.activation == "softmax":
        return GIVEN, 1.0 / options.num_out_chn
    return SIGMOID if options.activation == "sigmoid" else NONE, float(options.segmentation_threshold)


def to_activate(outputs: Tensor, options: Options) -> Tensor:
    """The volume that the activation works on: the channel that is looked at, of the softmax if there is one."""
    return to_volume(select(torch.softmax(outputs, dim=1) if options.activation == "softmax" else outputs, options))


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
