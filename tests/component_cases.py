"""Component losses with arguments of each kind, and batches, for the tests of them."""

import pytest
import torch
from component_reference import reference_loss

from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss

# Each loss with arguments of each kind, for tests that hold for all.
LOSSES = {
    "blob": (BlobLoss, {}),
    "blob_logits": (BlobLoss, {"masking": "logits", "smooth": 0.5}),
    "blob_dice": (BlobLoss, {"mode": "dice"}),
    "blob_ce": (BlobLoss, {"mode": "ce"}),
    "cc": (CCLoss, {"spacing": (1.0, 1.5, 0.5)}),
    "bicc": (CCLoss, {"alpha": 0.5, "smooth": 1.0}),
    "bicc_dice": (CCLoss, {"alpha": 0.75, "mode": "dice"}),
    "cc_ce": (CCLoss, {"mode": "ce", "alpha": 1.0}),
    "cat": (ComponentTverskyLoss, {}),
    "cat_other": (ComponentTverskyLoss, {"alpha": 0.6, "beta": 0.2, "gamma": 0.5, "epsilon": 1.0, "smooth": 0.1}),
    "false": (FalseComponentLoss, {}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
# One of each kind where each takes long.
each_kind = pytest.mark.parametrize("name", ["blob", "bicc", "cat", "false"])


def make(name, **options):
    """The loss of that name, with further options; spacing as long as there are axes."""
    kind, own = LOSSES[name]
    own = dict(own)
    if "spacing" in own and options.get("spatial_dims") == 2:
        own["spacing"] = own["spacing"][1:]
    return kind(**own, **options)


def expected_of(loss, *tensors, **options):
    own = {key: getattr(loss, key) for key in loss.own}
    return reference_loss(type(loss).__name__, *tensors, **options, **own)


def batch(shape=(2, 1, 5, 6, 7), seed=0, dtype=torch.float64, probabilities=False):
    """Logits (or probabilities) with a few components on both sides, some of which touch, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(shape, generator=generator) > 0.85).to(torch.uint8)
    x = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) - 1.5 + 2.0 * labels
    return (x.sigmoid() if probabilities else x).to(dtype), labels


def line(*values):
    """An image of one line."""
    return torch.tensor([[[values]]], dtype=torch.float64)


def value_and_gradient(loss, outputs, labels, *ids, **given):
    outputs = outputs.detach().clone().requires_grad_()
    value = loss(outputs, labels, *ids, **given)
    value.backward()
    return value.detach(), outputs.grad
