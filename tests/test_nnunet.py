"""The loss of the nnU-Net trainers, without nnU-Net; `nnunet_training.py` trains with it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_close

from triton_instance_loss import (
    BlobLoss,
    CCLoss,
    ComponentTverskyLoss,
    FalseComponentLoss,
    InstanceCenterLoss,
    InstanceLoss,
)
from triton_instance_loss.nnunet.loss import OneAgainstTheRest, WithInstanceTerms

TERMS = ("instance_label", "instance_output", "center", "false_instances", "missed_instances", "proximity")
EVERYTHING = dict.fromkeys(TERMS, 1.0)
SHAPES = {2: (11, 13), 3: (7, 9, 8)}
IGNORE = 4


def batch(spatial_dims, channels, *, regions, ignore=False, seed=0):
    """Logits, and a target as nnU-Net gives it, the first third of its rows to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[spatial_dims]
    outputs = 3 * torch.randn(2, channels, *shape, generator=generator)
    if regions:
        target = torch.rand(2, channels + ignore, *shape, generator=generator) > 0.85
        if ignore:
            target[:, -1] = False
            target[:, -1, : shape[0] // 3] = True
    else:
        target = torch.randint(0, channels, (2, 1, *shape), generator=generator, dtype=torch.int16)
        target *= torch.rand(target.shape, generator=generator) > 0.7
        if ignore:
            target[:, :, : shape[0] // 3] = IGNORE
    return outputs.requires_grad_(), target


def loss_of(spatial_dims, channels, *, regions, ignore=False, family=InstanceLoss, **options):
    options = {"weights": EVERYTHING if family is InstanceLoss else {}, **options}
    ignore_label = IGNORE if ignore else None
    return OneAgainstTheRest(
        family, spatial_dims=spatial_dims, num_channels=channels, regions=regions, ignore_label=ignore_label, **options
    )


COMPONENT_LOSSES = [(BlobLoss, {}), (CCLoss, {"alpha": 0.5}), (ComponentTverskyLoss, {}), (FalseComponentLoss, {})]


@pytest.mark.parametrize(("loss", "options"), COMPONENT_LOSSES)
@pytest.mark.parametrize("regions", [False, True])
def test_component_losses_of_each_class(loss, options, regions):
    """Of regions the loss of each channel; of labels that of the logit of a class against the rest."""
    outputs, target = batch(2, 3, regions=regions, ignore=True)
    ignored = target[:, -1:] if regions else target == IGNORE
    instance = OneAgainstTheRest(loss, spatial_dims=2, num_channels=3, regions=regions, ignore_label=IGNORE, **options)
    value = instance(outputs, target)
    assert instance.terms == {loss.__name__: value}
    classes = (0, 1, 2) if regions else (1, 2)
    expected = torch.zeros(())
    for number in classes:
        others = [channel for channel in range(3) if channel != number]
        logits = outputs[:, [number]]
        if not regions:
            logits = logits - outputs[:, others].logsumexp(dim=1, keepdim=True)
        labels = target[:, [number]] if regions else target == number
        of_class = loss(spatial_dims=2, **options)(logits, labels, ignore_mask=ignored)
        expected = expected + of_class / len(classes)
    assert_close(value, expected, torch.float32, scale=expected.detach())
    gradient, truth = gradient_of(value, outputs), gradient_of(expected, outputs)
    assert_close(gradient, truth, torch.float32, scale=truth.abs().max())
    assert (gradient[ignored.expand_as(outputs)] == 0).all()


def gradient_of(value, outputs):
    return torch.autograd.grad(value, outputs, retain_graph=True)[0]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_two_classes_are_the_softmax_of_the_family(spatial_dims):
    outputs, target = batch(spatial_dims, 2, regions=False)
    value = loss_of(spatial_dims, 2, regions=False)(outputs, target)
    family = InstanceLoss(activation="softmax", num_out_chn=2, spatial_dims=spatial_dims, rate_instead_number=True)
    expected = torch.stack(family(outputs, target)[1:]).sum()
    assert value.shape == ()
    assert_close(value, expected, torch.float32)
    gradient, truth = gradient_of(value, outputs), gradient_of(expected, outputs)
    assert_close(gradient, truth, torch.float32, scale=truth.abs().max())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_class_is_where_its_probability_is_half(spatial_dims):
    """With the softmax of the family it would be where the probability is 1 / classes."""
    outputs, target = batch(spatial_dims, 4, regions=False)
    loss = loss_of(spatial_dims, 4, regions=False)
    loss(outputs, target)
    family = InstanceLoss(activation="none", spatial_dims=spatial_dims, rate_instead_number=True)
    masks = (outputs.softmax(dim=1) >= 0.5).float()
    terms = [family(masks[:, c : c + 1], target == c) for c in (1, 2, 3)]
    for name in TERMS:
        expected = sum(getattr(values, name) for values in terms) / 3
        assert_close(loss.terms[name], expected, torch.float32, scale=expected, what=name)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_regions_are_channels_of_the_family(spatial_dims):
    outputs, target = batch(spatial_dims, 3, regions=True)
    value = loss_of(spatial_dims, 3, regions=True)(outputs, target)
    expected = torch.zeros(())
    for channel in range(3):
        family = InstanceLoss(num_out_chn=3, object_chn=channel, spatial_dims=spatial_dims, rate_instead_number=True)
        expected = expected + torch.stack(family(outputs, target)[1:]).sum() / 3
    assert_close(value, expected, torch.float32, scale=expected.detach())
    gradient, truth = gradient_of(value, outputs), gradient_of(expected, outputs)
    assert_close(gradient, truth, torch.float32, scale=truth.abs().max())


def test_a_missed_lesion_raises_its_class_and_lowers_the_rest():
    target = torch.zeros(1, 1, 9, 9, dtype=torch.int16)
    target[..., 2:4, 2:4] = 2
    outputs = torch.zeros(1, 3, 9, 9)
    outputs[:, 0] = 3
    outputs.requires_grad_()
    loss_of(2, 3, regions=False, weights={"proximity": 0.0})(outputs, target).backward()
    inside = outputs.grad[0, :, 2:4, 2:4]
    assert (inside[2] < 0).all()
    assert (inside[:2] > 0).all()
    assert outputs.grad.abs().max() < 1


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_ignored_voxels_change_nothing_and_get_no_gradient(spatial_dims, regions):
    outputs, target = batch(spatial_dims, 3, regions=regions, ignore=True)
    ignored = target[:, -1:] if regions else target == IGNORE
    loss = loss_of(spatial_dims, 3, regions=regions, ignore=True)
    value = loss(outputs, target)
    gradient = gradient_of(value, outputs)
    everywhere = ignored.expand_as(outputs)
    assert (gradient[everywhere] == 0).all()
    assert (gradient[~everywhere] != 0).any()
    others = torch.where(ignored, -outputs, outputs)
    assert torch.equal(loss(others, target), value)
    if regions:
        flipped = torch.cat((target[:, :-1] ^ ignored, ignored), dim=1)
        assert torch.equal(loss(outputs, flipped), value)


@pytest.mark.parametrize("regions", [False, True])
def test_everything_ignored(regions):
    outputs, target = batch(3, 3, regions=regions, ignore=True)
    target[:, -1] = IGNORE
    value = loss_of(3, 3, regions=regions, ignore=True)(outputs, target)
    assert torch.isfinite(value)
    assert (gradient_of(value, outputs) == 0).all()


@pytest.mark.parametrize("regions", [False, True])
def test_a_class_that_is_nowhere_keeps_the_graph_without_a_gradient(regions):
    """The Dice of two empty volumes has a derivative of 1 / smooth at every voxel, which would drown all others."""
    outputs, target = batch(3, 3, regions=regions)
    with torch.no_grad():
        outputs[0, 2] = -9.0
        target[0] = False if regions else torch.where(target[0] == 2, 0, target[0])
    loss = loss_of(3, 3, regions=regions, weights={"proximity": 0.0})
    gradient = gradient_of(loss(outputs, target), outputs)
    assert gradient.abs().max() < 1
    if regions:
        assert (gradient[0, 2] == 0).all()
    outputs = outputs[:1, :, :3].detach().clamp(max=-1.0)
    outputs[:, 0] = -1.0 if regions else 9.0
    outputs.requires_grad_()
    value = loss(outputs, torch.zeros_like(target[:1, :, :3]))
    assert torch.isfinite(value)
    assert (gradient_of(value, outputs) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regions", [False, True])
def test_autocast_and_half_precision(regions, dtype):
    outputs, target = batch(3, 3, regions=regions, ignore=True)
    halves = outputs.detach().to(dtype).requires_grad_()
    loss = loss_of(3, 3, regions=regions, ignore=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(halves, target)
    expected = loss(halves.float(), target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert gradient_of(value, halves).dtype == dtype


def test_no_grad_gives_the_same_number():
    outputs, target = batch(3, 3, regions=False, ignore=True)
    loss = loss_of(3, 3, regions=False, ignore=True)
    with torch.no_grad():
        value = loss(outputs, target)
    assert not value.requires_grad
    assert torch.equal(value, loss(outputs, target))


def test_terms_are_detached_and_of_weight():
    outputs, target = batch(3, 2, regions=True)
    loss = loss_of(3, 2, regions=True, family=InstanceCenterLoss, weights={"center": 0.0})
    loss(outputs, target)
    assert list(loss.terms) == ["instance_label", "instance_output", "false_instances", "missed_instances"]
    assert not any(term.requires_grad for term in loss.terms.values())


def test_compiles_whole():
    torch.compiler.reset()
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    loss = WithInstanceTerms(lambda output, target: output.square().mean(), loss_of(3, 3, regions=False, ignore=True))
    _, target = batch(3, 3, regions=False, ignore=True)
    image = torch.randn(2, 1, *SHAPES[3], generator=torch.Generator().manual_seed(1))

    def step(image, target):
        return loss(network(image), target)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(image, target)
    expected = step(image, target)
    torch.testing.assert_close(compiled, expected)
    parameters = list(network.parameters())
    torch.testing.assert_close(torch.autograd.grad(compiled, parameters), torch.autograd.grad(expected, parameters))


def levels():
    """Outputs and targets of three levels of deep supervision, full resolution first."""
    outputs, target = batch(3, 3, regions=False)
    outputs = [outputs.detach()[..., ::step, ::step, ::step].clone().requires_grad_() for step in (1, 2, 4)]
    return outputs, [target[..., ::step, ::step, ::step] for step in (1, 2, 4)]


def own(outputs, targets):
    """Stands for nnU-Net's loss."""
    return 0.0 * sum(output.sum() for output in outputs)


def test_deep_supervision_looks_at_full_resolution():
    outputs, targets = levels()
    instance = loss_of(3, 3, regions=False)
    value = WithInstanceTerms(own, instance)(outputs, targets)
    assert value.shape == ()
    assert torch.equal(value, instance(outputs[0], targets[0]))
    value.backward()
    assert [bool((output.grad != 0).any()) for output in outputs] == [True, False, False]


def test_deep_supervision_on_every_level():
    outputs, targets = levels()
    instance = loss_of(3, 3, regions=False)
    value = WithInstanceTerms(own, instance, (0.75, 0.25, 0.0))(outputs, targets)
    terms = dict(instance.terms)
    second = instance(outputs[1], targets[1])
    first = instance(outputs[0], targets[0])
    assert_close(value, 0.75 * first + 0.25 * second, torch.float32, scale=first.detach())
    assert terms == instance.terms, "those of the full resolution"
    value.backward()
    assert [bool((output.grad != 0).any()) for output in outputs] == [True, True, False]
    with pytest.raises(ValueError, match="zip"):
        WithInstanceTerms(own, instance, (0.5, 0.5))(outputs, targets)


def test_levels_with_voxels_of_their_own():
    outputs, targets = levels()
    of_levels = [
        OneAgainstTheRest(CCLoss, spatial_dims=3, num_channels=3, regions=False, spacing=spacing)
        for spacing in ((3.0, 1.0, 1.0), (3.0, 2.0, 2.0), (3.0, 4.0, 4.0))
    ]
    loss = WithInstanceTerms(own, of_levels[0], (0.5, 0.3, 0.2), of_levels[1:])
    expected = [each(*level) for each, *level in zip(of_levels, outputs, targets, strict=True)]
    assert_close(loss(outputs, targets), 0.5 * expected[0] + 0.3 * expected[1] + 0.2 * expected[2], torch.float32, 9)
    assert loss.instance.terms == {"CCLoss": expected[0]}
    with pytest.raises(ValueError, match="coarser must have a loss for each level but the first, 2 of them, got 1"):
        WithInstanceTerms(own, of_levels[0], (0.5, 0.3, 0.2), of_levels[1:2])


def test_factor_multiplies_the_instance_terms():
    outputs, target = batch(3, 2, regions=True)
    instance = loss_of(3, 2, regions=True)
    loss = WithInstanceTerms(lambda outputs, target: outputs.mean(), instance)
    for factor in (0.0, 0.5, 1.0):
        loss.factor = factor
        assert_close(loss(outputs, target), outputs.mean() + factor * instance(outputs, target), torch.float32, scale=9)


def test_errors():
    with pytest.raises(ValueError, match="num_channels must leave a class besides the background, got 1"):
        loss_of(3, 1, regions=False)
    with pytest.raises(ValueError, match="the name of a weight must be one of"):
        loss_of(3, 2, regions=True, weights={"centre": 1.0})
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        loss_of(4, 2, regions=True)
    with pytest.raises(ValueError, match="weights must be None with BlobLoss, which has no terms"):
        loss_of(3, 2, regions=True, family=BlobLoss, weights={"center": 1.0})
    with pytest.raises(TypeError, match="loss must be a class of losses, such as InstanceLoss or BlobLoss, got "):
        loss_of(3, 2, regions=True, family=InstanceLoss())
    outputs, target = batch(3, 3, regions=True)
    message = (
        r"must have shapes \(B, 3, \*spatial\) and \(B, 4, \*spatial\), got \(2, 3, 7, 9, 8\) and \(2, 3, 7, 9, 8\)"
    )
    with pytest.raises(ValueError, match=message):
        loss_of(3, 3, regions=True, ignore=True)(outputs, target)
    for loss in (loss_of(3, 3, regions=False), loss_of(3, 2, regions=True)):
        with pytest.raises(ValueError, match="must have shapes"):
            loss(outputs, target)
    with pytest.raises(ValueError, match="must have shapes"):
        loss_of(3, 3, regions=True)(outputs, target[..., 1:])


def test_folder_of_the_trainers():
    """It holds nothing but files whose bare names are taken by nobody else."""
    printed = subprocess.run(
        [sys.executable, "-m", "triton_instance_loss.nnunet"], capture_output=True, text=True, check=True
    )
    files = [path.name for path in Path(printed.stdout.strip()).iterdir() if path.name != "__pycache__"]
    assert files == ["triton_instance_loss_trainers.py"]
