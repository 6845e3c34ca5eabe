"""From the tensors of a call to what the instances are made of: activated outputs and binary labels, as volumes."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .options import Options


class Activated(NamedTuple):
    """One foreground channel of a batch, as contiguous volumes (B, D, H, W); images have D = 1."""

    probabilities: Tensor  # float32 or float64: sigmoid, softmax or the outputs themselves; what gradients flow into
    a: Tensor  # activated outputs: bool for "sigmoid" and "softmax", the probabilities for "none"
    foreground: Tensor  # bool: where instances of the outputs are looked for
    y: Tensor  # bool: the labels
    health: Tensor  # 0-d: 1, or NaN if any output is NaN or infinite; every term is multiplied by it


def unwrap(value: Tensor) -> Tensor:
    """A plain tensor on the same storage, gradients intact; types with a dispatch of their own stay as they are."""
    if type(value) is Tensor or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    return value.as_subclass(Tensor)


def widen(value: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def select(value: Tensor, options: Options) -> Tensor:
    """The channel that is looked at, (B, 1, *spatial)."""
    return value[:, options.channel : options.channel + 1] if value.shape[1] > 1 else value


def to_volume(value: Tensor) -> Tensor:
    """(B, 1, *spatial) -> contiguous (B, D, H, W)."""
    return (value if value.ndim == 4 else value[:, 0]).contiguous()


def activate(outputs: Tensor, labels: Tensor, options: Options) -> Activated:
    """Apply the activation of SPEC section 3 to widened `outputs` and binarise `labels`."""
    looked_at = outputs if options.activation == "softmax" else select(outputs, options)
    low, high = torch.aminmax(looked_at.detach())
    health = 1.0 + 0.0 * low + 0.0 * high

    if options.activation == "sigmoid":
        probabilities, threshold = torch.sigmoid(looked_at), options.segmentation_threshold
    elif options.activation == "softmax":
        probabilities, threshold = select(torch.softmax(looked_at, dim=1), options), 1.0 / options.num_out_chn
    else:
        probabilities, threshold = looked_at, options.segmentation_threshold
    probabilities = to_volume(probabilities)
    a = probabilities.detach()
    if options.hard:
        a = foreground = a >= threshold
    else:
        foreground = a >= threshold if threshold > 0 else a == 1
    return Activated(probabilities, a, foreground, to_volume(select(labels, options)) == 1, health)


def check_and_widen(
    outputs: Tensor, labels: Tensor, cc_label_batch: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The public boundary: plain, checked tensors; half outputs widened."""
    checks.inputs(outputs, labels, cc_label_batch, options.spatial_dims, options.num_out_chn)
    ids = None if cc_label_batch is None else unwrap(cc_label_batch)
    return widen(unwrap(outputs)), unwrap(labels), ids
