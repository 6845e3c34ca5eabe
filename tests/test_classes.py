"""Several classes in one call, labels as one-hot or numbers, and voxels that are ignored."""

import functools
import re

import pytest
import torch
from golden import TERMS
from monai.losses import DiceCELoss, DiceLoss
from reference import reference_terms

from triton_instance_loss import InstanceLoss, WeightedSum, functional

SHAPE = (4, 7, 6)
CLASSES = (1, 3)
OPTIONS = {"num_out_chn": 4, "spatial_dims": 2, "rate_instead_number": True}


def several(device, seed=0, batch=1):
    """Four channels of outputs, and the number of the class of each pixel (batch, 1, 7, 6); 0 is background."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn((batch, *SHAPE), generator=generator, dtype=torch.float64)
    numbers = torch.randint(0, 4, (batch, 1, *SHAPE[1:]), generator=generator)
    numbers[torch.rand(numbers.shape, generator=generator) < 0.6] = 0
    return outputs.to(device).requires_grad_(), numbers.to(device)


def one_hot(numbers):
    return torch.cat([numbers == number for number in range(SHAPE[0])], 1)


def assert_same_terms(ours, expected, outputs, proximity=1e-9):
    """Values, and the gradient of each term."""
    for name in TERMS:
        tolerance = {"rtol": proximity if name == "proximity" else 1e-9, "atol": 1e-12}
        torch.testing.assert_close(ours[name], expected[name], **tolerance)
        both = (
            torch.autograd.grad(terms[name], outputs, retain_graph=True, materialize_grads=True)[0]
            for terms in (ours, expected)
        )
        torch.testing.assert_close(*both, **tolerance)


@pytest.mark.parametrize(("activation", "reduce"), [("softmax", "instance"), ("sigmoid", "data")])
def test_terms_are_averaged_over_classes(backend, activation, reduce):
    outputs, numbers = several(backend, batch=2)
    options = {**OPTIONS, "activation": activation, "instance_wise_reduce": reduce}
    ours = InstanceLoss(object_chn=CLASSES, **options)(outputs, one_hot(numbers))._asdict()
    each = [reference_terms(outputs, one_hot(numbers), object_chn=number, **options) for number in CLASSES]
    expected = {name: torch.stack([terms[name] for terms in each]).mean() for name in TERMS}
    assert_same_terms(ours, expected, outputs)


@pytest.mark.parametrize("classes", [3, (3, 1), (0, 1, 2, 3)])
def test_numbers_of_classes_are_one_hot_labels(backend, classes):
    outputs, numbers = several(backend, 1)
    options = {**OPTIONS, "object_chn": classes, "activation": "softmax"}
    ours = InstanceLoss(to_onehot_y=True, **options)(outputs, numbers.to(torch.int16))._asdict()
    assert_same_terms(ours, InstanceLoss(**options)(outputs, one_hot(numbers))._asdict(), outputs)
    assert ours["instance_label"] > 0


def test_order_of_classes_and_a_list_from_json(backend):
    outputs, numbers = several(backend, 2)
    one, other = (
        InstanceLoss(object_chn=classes, activation="softmax", **OPTIONS)(outputs, one_hot(numbers))
        for classes in ([3, 1, 2], (1, 2, 3))
    )
    torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-12, atol=0)
    assert InstanceLoss(object_chn=[3, 1, 2], activation="softmax", **OPTIONS).object_chn == (3, 1, 2)


def test_classes_of_3d_volumes_share_given_ids(backend):
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn((1, 2, 3, 4, 5), generator=generator, dtype=torch.float64).to(backend).requires_grad_()
    labels = (torch.rand(outputs.shape, generator=generator) > 0.7).to(backend)
    ids = torch.randint(1, 9, (1, 1, 3, 4, 5), generator=generator).to(backend)
    ours = InstanceLoss(num_out_chn=2, object_chn=(0, 1))(outputs, labels, ids)._asdict()
    each = [InstanceLoss(num_out_chn=2, object_chn=c)(outputs, labels, ids)._asdict() for c in (0, 1)]
    # The mean over instances is one over those of a class.
    expected = {name: torch.stack([terms[name] for terms in each]).mean() for name in TERMS}
    assert_same_terms(ours, expected, outputs)


@pytest.mark.filterwarnings("ignore:.*no fused form")
def test_criteria_without_a_fused_form_see_each_class(backend):
    outputs, numbers = several(backend, 4)

    def cosine(u, w):
        return 1 - (u * w).sum() / ((u * u).sum() * (w * w).sum()).clamp(min=1e-5).sqrt()

    make = functools.partial(InstanceLoss, cosine, cosine, cosine, activation="softmax", **OPTIONS)
    ours = make(object_chn=CLASSES)(outputs, one_hot(numbers))._asdict()
    each = [make(object_chn=number)(outputs, one_hot(numbers))._asdict() for number in CLASSES]
    expected = {name: torch.stack([terms[name] for terms in each]).mean() for name in TERMS}
    assert_same_terms(ours, expected, outputs)


def test_the_pixel_loss_of_raw_outputs_is_called_once(backend):
    outputs, numbers = several(backend, 5)
    pixel = DiceCELoss(softmax=True, to_onehot_y=True)
    options = {**OPTIONS, "object_chn": CLASSES, "to_onehot_y": True}
    ours = InstanceLoss(pixel, **options)(outputs, numbers).pixel
    torch.testing.assert_close(ours, pixel(outputs, numbers.double()))


def test_one_hot_labels_of_several_classes_are_asked_for():
    outputs, numbers = several("cpu")
    message = "labels must have shape (1, 4, 7, 6) beside outputs of (1, 4, 7, 6), got (1, 1, 7, 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        InstanceLoss(object_chn=CLASSES, activation="softmax", **OPTIONS)(outputs, numbers)
    with pytest.raises(ValueError, match=re.escape("labels must have shape (1, 1, 7, 6)")):
        InstanceLoss(object_chn=1, activation="softmax", to_onehot_y=True, **OPTIONS)(outputs, one_hot(numbers))


# --- voxels that are ignored


def with_ignored(device, activation, seed=6):
    """A batch, what is ignored, and the outputs and labels that have background there."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn((1, 1, 7, 6), generator=generator, dtype=torch.float64)
    outputs = outputs if activation == "sigmoid" else outputs.sigmoid()
    labels = (torch.rand(outputs.shape, generator=generator) > 0.7).double()
    ignored = torch.rand(outputs.shape, generator=generator) < 0.3
    hidden = torch.where(ignored, -1e4 if activation == "sigmoid" else 0.0, outputs)
    volumes = outputs, labels, ignored, hidden, labels * ~ignored
    return [volume.to(device) for volume in volumes]


PIXEL = {"default": None, "MONAI, fused": DiceLoss(batch=True), "MONAI, not fused": DiceCELoss(sigmoid=True)}


@pytest.mark.parametrize(
    ("activation", "gradients", "pixel"),
    [
        ("sigmoid", "surrogate", "default"),
        ("sigmoid", "reference", "MONAI, fused"),
        ("none", "surrogate", "MONAI, fused"),
        ("none", "reference", "default"),
    ],
)
def test_ignored_voxels_are_background_without_a_gradient(backend, activation, gradients, pixel):
    outputs, labels, ignored, hidden, visible = with_ignored(backend, activation)
    loss = InstanceLoss(PIXEL[pixel], activation=activation, spatial_dims=2, gradients=gradients)
    if activation == "sigmoid" and pixel == "MONAI, fused":
        loss.edit_parameters(loss_function_pixel=DiceLoss(sigmoid=True))
    outputs.requires_grad_()
    hidden.requires_grad_()
    ours, expected = loss(outputs, labels, ignore_mask=ignored), loss(hidden, visible)
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-12, atol=0)
    for term, other in zip(ours, expected, strict=True):
        (grad,) = torch.autograd.grad(term, outputs, retain_graph=True, materialize_grads=True)
        (want,) = torch.autograd.grad(other, hidden, retain_graph=True, materialize_grads=True)
        assert (grad[ignored] == 0).all()
        torch.testing.assert_close(grad, torch.where(ignored, 0.0, want), rtol=1e-9, atol=1e-14)


def test_pixel_losses_on_logits_see_background(backend):
    outputs, labels, ignored, hidden, visible = with_ignored(backend, "sigmoid")
    loss = InstanceLoss(PIXEL["MONAI, not fused"], spatial_dims=2)
    ours, expected = loss(outputs, labels, ignore_mask=ignored), loss(hidden, visible)
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_nothing_in_an_ignored_voxel_matters(backend, activation):
    outputs, labels, ignored, *_ = with_ignored(backend, activation)
    channels = 2 if activation == "softmax" else 1
    outputs = outputs.repeat(1, channels, 1, 1)
    loss = WeightedSum(
        InstanceLoss(
            activation=activation, num_out_chn=channels, spatial_dims=2, ignore_index=7, rate_instead_number=True
        ),
        proximity=1e-3,
    )
    results = []
    for anything in (1e3, torch.nan, torch.inf):
        x = outputs.masked_fill(ignored, anything).requires_grad_()
        value = loss(x, labels.masked_fill(ignored, 7.0))
        value.backward()
        results.append((value.detach(), x.grad))
    value, grad = results[0]
    assert grad.isfinite().all()
    assert grad.any()
    for result in results[1:]:
        torch.testing.assert_close(result, (value, grad), rtol=1e-12, atol=0)


def test_a_number_a_mask_and_numbers_of_classes_together(backend):
    outputs, numbers = several(backend, 7)
    first, second = (torch.zeros(numbers.shape, dtype=torch.bool, device=backend) for _ in range(2))
    first[..., :2], second[:, :, -2:] = True, True
    options = {**OPTIONS, "object_chn": CLASSES, "activation": "softmax", "to_onehot_y": True}
    expected = InstanceLoss(**options)(outputs, numbers, ignore_mask=first | second)
    ours = InstanceLoss(ignore_index=255, **options)(outputs, numbers.masked_fill(first, 255), ignore_mask=second)
    assert_same_terms(ours._asdict(), expected._asdict(), outputs)


def test_functions_and_given_ids_ignore_too(backend):
    outputs, labels, ignored, hidden, visible = with_ignored(backend, "sigmoid", 8)
    ids = torch.randint(1, 5, labels.shape, generator=torch.Generator().manual_seed(9)).to(backend)
    for function in (functional.false_instance_rate_loss, functional.instance_proximity_loss):
        ours = function(outputs, labels, ids, ignore_mask=ignored, spatial_dims=2)
        torch.testing.assert_close(ours, function(hidden, visible, ids, spatial_dims=2), rtol=1e-12, atol=0)


def test_bad_ignore_masks():
    outputs = torch.zeros(2, 1, 4, 5)
    loss = InstanceLoss(spatial_dims=2)
    with pytest.raises(TypeError, match=r"ignore_mask must be bool, True where a voxel is ignored, got torch\.float32"):
        loss(outputs, outputs, ignore_mask=outputs)
    with pytest.raises(ValueError, match=re.escape("ignore_mask must have shape (2, 1, 4, 5)")):
        loss(outputs, outputs, ignore_mask=torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=re.escape("ignore_mask must be a torch.Tensor, got list")):
        loss(outputs, outputs, ignore_mask=[True])
    loss.edit_parameters(segmentation_threshold=-1.0)
    with pytest.raises(ValueError, match="segmentation_threshold must be above 0 where voxels are ignored"):
        loss(outputs, outputs, ignore_mask=torch.zeros(2, 1, 4, 5, dtype=torch.bool))
