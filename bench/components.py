"""Who takes a training step with a loss on components: ours, MONAI's Dice as the yardstick, and authors' own code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss

from .cases import Inputs
from .entry import Answer, Function, Provider, Setup
from .steps import DICE, defaults, on_host, read, run_step

Make = Callable[..., Any]

LOSSES: dict[str, tuple[Make, dict[str, Any]]] = {
    "BlobLoss": (BlobLoss, {}),
    "CCLoss": (CCLoss, {}),
    "CCLoss(alpha=0.5), BiCC": (CCLoss, {"alpha": 0.5}),
    "ComponentTverskyLoss": (ComponentTverskyLoss, {}),
    "FalseComponentLoss": (FalseComponentLoss, {}),
}
# What the authors' code of blob loss computes, with Dice.
AS_AUTHORS = BlobLoss, {"mode": "dice", "masking": "logits"}


def _ours(make: Make, options: dict[str, Any]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: run_step(make(**defaults(inputs), **options), inputs)


def _by_cpu(make: Make, options: dict[str, Any]) -> Callable[[Inputs, Setup], Answer]:
    """The CPU backend's answer in float64."""

    def truth(inputs: Inputs, setup: Setup) -> Answer:
        host = on_host(inputs)
        return read(_ours(make, options)(Inputs(host.outputs.double(), host.labels), setup)())

    return truth


def _blob_loss_of_authors(inputs: Inputs, setup: Setup) -> Function:
    """Their loop over components, which SciPy labels, as their code wants them from outside."""
    from monai.losses import DiceLoss
    from scipy import ndimage

    criterion = {"dice": {"name": "dice", "loss": DiceLoss(sigmoid=True), "weight": 1.0, "sigmoid": False}}
    weights = {"main_weight": 0, "blob_weight": 1}
    neighbours = ndimage.generate_binary_structure(inputs.outputs.ndim - 2, inputs.outputs.ndim - 2)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        samples = [ndimage.label(sample[0], neighbours)[0][None] for sample in labels.cpu().numpy()]
        numbers = torch.stack([torch.from_numpy(sample) for sample in samples]).to(labels.device)
        value: Tensor
        value, *_ = setup.references["blob_loss"].compute_loss(weights, {}, criterion, outputs, labels, numbers)
        return value

    return run_step(loss, inputs)


# Truths are compared by what they are, so each is made once.
_TRUTHS = {name: _by_cpu(*made) for name, made in LOSSES.items()}
_TRUTH_OF_AUTHORS = _by_cpu(*AS_AUTHORS)

PROVIDERS = (
    *DICE,
    *(Provider(name, _ours(*made), _TRUTHS[name]) for name, made in LOSSES.items()),
    Provider("BlobLoss, as its authors' code", _ours(*AS_AUTHORS), _TRUTH_OF_AUTHORS),
    Provider("blob loss, its authors' code", _blob_loss_of_authors, _TRUTH_OF_AUTHORS, ("blob_loss", "monai", "scipy")),
)
