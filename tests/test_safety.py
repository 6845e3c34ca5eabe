"""What real patches and labels do to the losses: empty, full and saturated input, other kinds of labels, caps."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, TverskyLoss

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, WeightedSum, connected_components, functional, ops
from triton_instance_loss.metrics import instance_metrics
from triton_instance_loss.nnunet.loss import OneAgainstTheRest

INSTANCE_TERMS = InstanceLoss.terms._fields[1:]
CRITERIA = {
    "our dice": None,
    "dice": DiceLoss(),
    "jaccard": DiceLoss(jaccard=True),
    "tversky": TverskyLoss(alpha=0.3, beta=0.7),
    "slow dice": lambda u, w: DiceLoss().forward(u, w),
}
SHAPE = (6, 7, 5)


def cube(*corners, size=2):
    """One sample (1, 1, *SHAPE) of cubes."""
    volume = torch.zeros(1, 1, *SHAPE)
    for x, y, z in corners:
        volume[..., x : x + size, y : y + size, z : z + size] = 1
    return volume


EMPTY, FULL, ONE_VOXEL, LESION = cube(), torch.ones(1, 1, *SHAPE), cube((2, 3, 1), size=1), cube((1, 1, 1))
PATCHES = {"empty": EMPTY, "full": FULL, "one voxel": ONE_VOXEL, "lesion": LESION, "two": cube((0, 0, 0), (3, 4, 3))}


def loss_of(criterion, **options):
    """`InstanceLoss` with a criterion of each kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a criterion is slow
        return InstanceLoss(None, CRITERIA[criterion], CRITERIA[criterion], **options)


def logits_of(mask, activation, certainty, device):
    """Logits in float64 that are foreground on a mask, one channel, or two with "softmax"."""
    x = torch.where(mask > 0, certainty, -certainty).double().to(device)
    return (torch.cat((torch.zeros_like(x), x), dim=1) if activation == "softmax" else x).requires_grad_()


def options_of(activation):
    """A channel of its own, or the second of two."""
    return {"activation": activation, "num_out_chn": 2 if activation == "softmax" else 1}


@pytest.mark.parametrize("certainty", [1.0, 15.0], ids=["unsure", "saturated"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradients_are_bounded(criterion, activation, certainty, backend):
    """By the derivative in `a`, from the instances that terms are means over; nothing anywhere else."""
    label, output = (torch.cat(side) for side in zip(*itertools.product(PATCHES.values(), repeat=2), strict=True))
    x = logits_of(output, activation, certainty, backend)
    terms = loss_of(criterion, instance_wise_reduce="data", **options_of(activation))(x, label.to(backend))
    p = torch.sigmoid(torch.tensor(certainty, dtype=torch.float64)).item()
    for name in INSTANCE_TERMS[:-1]:
        (grad,) = torch.autograd.grad(getattr(terms, name), x, retain_graph=True)
        by_a = len(label) * grad[:, -1:].cpu() / (p * (1 - p))  # terms are means over samples
        instances = 2 if name.endswith("s") else 1  # counts are no means over instances
        assert by_a.isfinite().all()
        assert by_a.abs().flatten(1).sum(1).max() <= 4 * instances, name
        assert not by_a[(label == 0) & (output == 0)].any(), name


@pytest.mark.parametrize(("reduce", "gradients"), [("instance", "surrogate"), ("data", "log")])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_empty_patch_has_no_gradient_and_changes_no_other(criterion, activation, reduce, gradients, backend):
    options = {"instance_wise_reduce": reduce, "rate_instead_number": True, "gradients": gradients}
    loss = loss_of(criterion, **options_of(activation), **options)
    label = torch.cat((LESION, EMPTY)).to(backend)
    x = logits_of(torch.cat((ONE_VOXEL, EMPTY)), activation, 2.0, backend)
    sum(loss(x, label)[1:]).backward()
    assert not x.grad[1].any()
    assert 0 < x.grad[0].abs().sum() < 10


def test_the_example_of_a_batch_with_an_empty_patch(backend):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 1, 12, 12, 12, generator=generator) * 0.5 - 5).to(backend).requires_grad_()
    y = torch.zeros(2, 1, 12, 12, 12, device=backend)
    y[0, 0, 5:8, 5:8, 5:8] = 1
    for sum_of in (WeightedSum(InstanceLoss(rate_instead_number=True)), WeightedSum(InstanceCenterLoss())):
        x.grad = None
        sum_of(x, y).backward()
        assert x.grad[1].norm() < 1e-3 * x.grad[0].norm()


def test_functions_have_the_same_gradient(backend):
    x, y = logits_of(EMPTY, "sigmoid", 5.0, backend), EMPTY.to(backend)
    values = [
        *functional.instance_segmentation_loss(x, y),
        functional.instance_center_loss(x, y),
        *functional.false_instance_rate_loss(x, y),
        functional.instance_proximity_loss(x, y),
    ]
    sum(values).backward()
    assert not x.grad.any()


def test_classes_that_are_absent_have_no_gradient(backend):
    """Four classes of which two are in the image."""
    numbers = torch.zeros(1, 1, *SHAPE)
    numbers[LESION > 0] = 1
    numbers[ONE_VOXEL > 0] = 2
    x = torch.full((1, 5, *SHAPE), -5.0, dtype=torch.float64)
    x[:, 0] = 5
    x = x.to(backend).requires_grad_()
    options = {"num_out_chn": 5, "object_chn": (1, 2, 3, 4), "to_onehot_y": True, "rate_instead_number": True}
    sum(
        InstanceLoss(DiceCELoss(softmax=True, to_onehot_y=True), activation="sigmoid", **options)(
            x, numbers.to(backend)
        )[1:]
    ).backward()
    assert x.grad[:, 1:3].any()
    assert not x.grad[:, 3:].any()
    assert x.grad.abs().sum() < 10


@pytest.mark.parametrize("regions", [True, False])
def test_nnunet_loss_has_none_either(regions, backend):
    channels = 2 if regions else 3
    loss = OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=channels, regions=regions)
    target = torch.zeros(2, channels if regions else 1, *SHAPE, dtype=torch.int16)
    target[0, 0][LESION[0, 0] > 0] = 1
    x = torch.full((2, channels, *SHAPE), -5.0, dtype=torch.float64)
    x[:, 0] = -5 if regions else 5
    x = x.to(backend).requires_grad_()
    loss(x, target.to(backend)).backward()
    assert not x.grad[1].any()
    assert 0 < x.grad[0].abs().sum() < 10


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_hard_pixel_term_is_right_in_the_background(activation, backend):
    """With "softmax" a given criterion sees 0 and 1, and nothing of an empty image."""
    x = logits_of(EMPTY, activation, 1.0, backend)
    pixel = DiceLoss(sigmoid=True) if activation == "sigmoid" else DiceLoss()
    for names in (("pixel",), ("pixel", "instance_label")):  # called, and from sums
        term = InstanceLoss(pixel, **options_of(activation)).evaluate(x, EMPTY.to(backend), None, None, names)["pixel"]
        (grad,) = torch.autograd.grad(term, x, allow_unused=True)
        assert grad.any() == (activation == "sigmoid")


# gradients="log"


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("certainty", [0.5, 8.0, 12.0, 80.0, 300.0])
def test_the_slope_of_a_logarithm(activation, certainty, backend):
    """The slope p / |O| over a false output, -(1 - p) / |L| over a missed label, however sure the network is."""
    loss = InstanceLoss(gradients="log", **options_of(activation))
    label, output = cube((0, 0, 0)), cube((3, 4, 3), size=1)
    x = logits_of(output, activation, certainty, backend)
    terms = loss(x, label.to(backend))
    assert (terms.false_instances.item(), terms.missed_instances.item()) == (1, 1)
    p = 1 / (1 + math.exp(-certainty))
    for term, where, slope in (
        (terms.false_instances, output, p),
        (terms.missed_instances, label, -p / 8),  # 1 - p there is p here
    ):
        (grad,) = torch.autograd.grad(term, x, retain_graph=True)
        expected = (slope * where).double().to(backend)
        if activation == "softmax":
            expected = torch.cat((-expected, expected), dim=1)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12)


def test_the_slope_of_a_logarithm_of_several_logits(backend):
    """The derivatives of -log(1 - p_c) and -log p_c by every logit, in float32, where p itself is 1."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 3, *SHAPE, generator=generator)
    label, output = cube((0, 0, 0)), cube((3, 4, 3))
    x[:, 1:2] += 100 * output - 100 * (1 - output)
    x = x.to(backend).requires_grad_()
    loss = InstanceLoss(gradients="log", activation="softmax", num_out_chn=3)
    terms = loss(x, label.to(backend))
    truth_x = x.detach().double().requires_grad_()
    whole = torch.logsumexp(truth_x, dim=1)
    log_p, log_not_p = truth_x[:, 1] - whole, torch.logsumexp(truth_x[:, [0, 2]], dim=1) - whole
    for term, value, where in (
        (terms.false_instances, -log_not_p, output),
        (terms.missed_instances, -log_p, label),
    ):
        mine = torch.autograd.grad(term, x, retain_graph=True)[0].double()
        truth = torch.autograd.grad(value[where[:, 0].to(backend) > 0].mean(), truth_x, retain_graph=True)[0]
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-7)


def test_log_changes_two_gradients_and_no_value(backend):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 1, *SHAPE, generator=generator) - 3).to(backend, torch.float64).requires_grad_()
    label = torch.cat((LESION, PATCHES["two"])).to(backend)
    by_kind = {kind: InstanceLoss(gradients=kind)(x, label) for kind in ("surrogate", "log")}
    for name in InstanceLoss.terms._fields:
        one, other = (getattr(terms, name) for terms in by_kind.values())
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (one, other)]
        assert torch.equal(one, other)
        assert torch.equal(*grads) == (name not in ("false_instances", "missed_instances")), name


def test_log_of_probabilities_is_as_surrogate(backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, *SHAPE, generator=generator).to(backend).requires_grad_()
    label = torch.cat((LESION, PATCHES["two"])).to(backend)
    grads = []
    for kind in ("surrogate", "log"):
        grads.append(torch.autograd.grad(sum(InstanceLoss(activation="none", gradients=kind)(x, label)), x)[0])
    assert torch.equal(*grads)


def test_log_beyond_the_tables(backend):
    """Outputs that are only counted (max_cc_out) have the same slope."""
    x = logits_of(PATCHES["two"], "sigmoid", 6.0, backend)
    (grad,) = torch.autograd.grad(InstanceLoss(gradients="log", max_cc_out=1)(x, EMPTY.to(backend)).false_instances, x)
    p = 1 / (1 + math.exp(-6))
    torch.testing.assert_close(grad.cpu(), p / 8 * PATCHES["two"].double(), rtol=1e-12, atol=0)


# Labels

LABELS = {
    "255": (LESION * 255).byte(),
    "instances": LESION + 2 * cube((4, 4, 3)),
    "classes": (LESION * 3).to(torch.int16),
    "NaN": LESION * math.nan,
    "infinity": torch.where(LESION > 0, math.inf, 0.0),
    "-1": -LESION,
    "2 in float64": LESION.double() * 2,
    "uint16": torch.from_numpy((LESION * 300).numpy().astype(np.uint16)),
    "uint64": torch.from_numpy((LESION.numpy() * 2.0**63).astype(np.uint64)),
}


WAYS_IN = {
    "InstanceLoss": InstanceLoss(),
    "the sum of InstanceCenterLoss": WeightedSum(InstanceCenterLoss(rate_instead_number=True)),
    "pixel alone": lambda x, label: InstanceLoss().evaluate(x, label, None, None, ("pixel",)),
    "functional": functional.false_instance_rate_loss,
    "metrics": instance_metrics,
    "components": lambda x, label: connected_components(label),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA labels are looked at under the debug switch alone")
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("way", WAYS_IN)
def test_labels_that_are_no_mask_are_an_error(way, kind, backend):
    x, label = torch.full((1, 1, *SHAPE), -4.0), LABELS[kind]
    with pytest.raises(ValueError, match=r"(labels|mask) must be 0 or 1 \(from -0.5 to 1.5; .* got .* among them"):
        WAYS_IN[way](x, label)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("pixel", [None, DiceLoss(sigmoid=True)])
def test_where_labels_are_not_looked_at_terms_are_nan(pixel, kind, backend, monkeypatch):
    """On CUDA, and under torch.compile."""
    monkeypatch.setattr("triton_instance_loss.checks.debugging", lambda value: False)
    x = torch.full((1, 1, *SHAPE), -4.0, device=backend, requires_grad=True)
    label = LABELS[kind].to(backend)
    assert all(math.isnan(term) for term in InstanceLoss(pixel)(x, label))
    assert math.isnan(InstanceLoss(pixel).evaluate(x, label, None, None, ("pixel",))["pixel"])
    value = WeightedSum(InstanceLoss(pixel, rate_instead_number=True))(x, label)
    value.backward()
    assert math.isnan(value)
    assert x.grad.isnan().all()
    assert all(math.isnan(value) for value in instance_metrics(x, label))


def test_resampled_labels_are_a_mask(backend):
    """0.9999999998 as nibabel scales 1, 0.7 as interpolation leaves it."""
    x = torch.full((1, 1, *SHAPE), -4.0).to(backend)
    for high, low in ((0.9999999998, 0.0), (0.7, 0.3), (1.4, -0.4)):
        label = torch.where(LESION.double() > 0, high, low).to(backend)
        assert InstanceLoss()(x, label).missed_instances.item() == 1
        assert instance_metrics(x, label).missed.item() == 1
        assert connected_components(label, relabel=True)[1].item() == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64, torch.uint16, torch.uint64])
def test_class_numbers(dtype, backend):
    numbers = torch.zeros(1, 1, *SHAPE)
    numbers[LESION > 0], numbers[ONE_VOXEL > 0] = 2, 1
    x = torch.zeros(1, 3, *SHAPE, device=backend)
    options = {"activation": "softmax", "num_out_chn": 3, "object_chn": 2, "to_onehot_y": True}
    x[:, 0] = 4
    loss = InstanceLoss(**options)
    given = numbers.to(dtype).to(backend)
    assert loss(x, given).missed_instances.item() == 1
    if dtype.is_floating_point:
        assert loss(x, given - 0.2).missed_instances.item() == 1
    for wrong in (3, 255):
        wrong_numbers = torch.where(numbers == 2, wrong, numbers).to(dtype).to(backend)
        message = rf"labels must be class numbers from 0 to 2 \(num_out_chn=3\), got {wrong}"
        if backend.type != "cuda":
            with pytest.raises(ValueError, match=message):
                loss(x, wrong_numbers)
            with pytest.raises(ValueError, match=message):
                instance_metrics(x, wrong_numbers, **options)
        assert InstanceLoss(ignore_index=wrong, **options)(x, wrong_numbers).missed_instances.item() == 0


def test_class_numbers_that_are_not_looked_at(backend, monkeypatch):
    monkeypatch.setattr("triton_instance_loss.checks.debugging", lambda value: False)
    options = {"activation": "softmax", "num_out_chn": 3, "object_chn": (1, 2), "to_onehot_y": True}
    x = torch.zeros(1, 3, *SHAPE, device=backend)
    x[:, 0] = 4
    for wrong in (3 * LESION, -LESION, LESION * math.nan):
        assert all(math.isnan(term) for term in InstanceLoss(**options)(x, wrong.to(backend)))
    ours = InstanceLoss(ignore_index=3, **options)(x, (3 * LESION + ONE_VOXEL * (LESION == 0)).to(backend))
    assert ours.missed_instances.item() == 0.5
    target = OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=3, regions=False)
    assert math.isnan(target(x, (3 * LESION).short().to(backend)))


def test_nnunet_targets_are_looked_at(backend):
    if backend.type == "cuda":
        pytest.skip("on CUDA labels are not looked at")
    x = torch.zeros(1, 2, *SHAPE, device=backend)
    loss = OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=2, regions=False)
    with pytest.raises(ValueError, match="target must be class numbers from 0 to 1"):
        loss(x, (255 * LESION).short().to(backend))
    loss = OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=2, regions=True)
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        loss(x, (255 * LESION).short().expand(-1, 2, -1, -1, -1).to(backend))


# Nothing wraps


@pytest.mark.parametrize("number", [256, 257, -1, -255, 2**40, 511.0, 0.5])
def test_ignoring_does_not_wrap(number, backend):
    x, label = torch.full((1, 1, *SHAPE), -4.0).to(backend), LESION.byte().to(backend)
    plain, ignoring = InstanceLoss()(x, label), InstanceLoss(ignore_index=number)(x, label)
    assert torch.equal(torch.stack(plain), torch.stack(ignoring))
    for dtype in (torch.bool, torch.int8, torch.int16):
        assert torch.equal(torch.stack(InstanceLoss(ignore_index=number)(x, label.to(dtype))), torch.stack(plain))


def test_class_numbers_do_not_wrap(backend):
    """Class 257 is not class 1 of a byte, in the losses and for nnU-Net."""
    x = torch.full((1, 1, *SHAPE), -4.0).to(backend)
    assert InstanceLoss(to_onehot_y=True, object_chn=257)(x, LESION.byte().to(backend)).missed_instances.item() == 0
    loss = OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=2, regions=False, ignore_label=257)
    outputs = torch.cat((-x, x), dim=1)
    assert loss(outputs, LESION.byte().to(backend)).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_more_classes_than_the_dtype_holds(dtype, backend, monkeypatch):
    monkeypatch.setattr("triton_instance_loss.checks.debugging", lambda value: False)
    x = torch.zeros(1, 300, *SHAPE, device=backend)
    x[:, 0] = 20
    loss = InstanceLoss(activation="softmax", num_out_chn=300, object_chn=100, to_onehot_y=True)
    assert loss(x, (100 * LESION).to(dtype).to(backend)).missed_instances.item() == 1


@pytest.mark.parametrize("number", [0, 1, 0.0])
def test_a_mask_has_no_label_to_ignore(number):
    with pytest.raises(ValueError, match="ignore_index must not be"):
        InstanceLoss(ignore_index=number)
    with pytest.raises(ValueError, match="ignore_index must not be"):
        InstanceLoss(ignore_index=number, num_out_chn=2, activation="softmax")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_wide_unsigned_labels_and_ids(dtype, backend):
    """As tifffile, SimpleITK and Cellpose give them."""
    x = torch.full((1, 1, *SHAPE), -4.0).to(backend)
    label = torch.from_numpy(PATCHES["two"].numpy().astype(dtype)).to(backend)
    ids = torch.from_numpy((LESION.numpy() * 60000 + cube((3, 4, 3)).numpy() * 7).astype(dtype)).to(backend)
    assert InstanceLoss()(x, label).missed_instances.item() == 2
    assert InstanceLoss(ignore_index=255)(x, label).missed_instances.item() == 2
    assert InstanceLoss()(x, (ids.long() > 0).float(), ids).missed_instances.item() == 2
    assert instance_metrics(x, label).missed.item() == 2
    assert connected_components(label, relabel=True)[1].item() == 2


def test_a_mask_is_no_instance_map(backend):
    x, label = torch.full((1, 1, *SHAPE), -4.0).to(backend), LESION.to(backend)
    for call in (InstanceLoss(), instance_metrics):
        with pytest.raises(
            TypeError, match=r"cc_label_batch must hold the number of an instance .* torch.bool, a mask"
        ):
            call(x, label, label > 0)


# Caps, thresholds, probabilities


@pytest.mark.parametrize("side", [16, 64])
def test_many_objects(side, backend):
    """Perfect outputs are perfect, however many they are: 64 or 1024 nuclei."""
    if side == 64 and backend.type == "cpu" and ops.backend(torch.zeros(1)) == "triton":
        pytest.skip("takes minutes in the interpreter")
    label = torch.zeros(1, 1, side, side)
    label[..., ::2, ::2] = 1
    terms = InstanceLoss(spatial_dims=2, rate_instead_number=True)((16 * label - 8).to(backend), label.to(backend))
    assert max(terms[1:]).item() < 1e-5
    assert InstanceLoss().max_cc_out == 4096


def test_a_cap_that_is_met_is_said_once():
    label = PATCHES["two"]
    loss = InstanceLoss(max_cc_out=1)
    with pytest.warns(UserWarning, match="a sample has 2 output instances, of which max_cc_out=1 are used"):
        loss(8 * label - 4, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(8 * label - 4, label)
        InstanceLoss(max_cc_out=2)(8 * label - 4, label)
        InstanceLoss(max_cc_out=1, mul_too_many=0.5)(8 * label - 4, LESION)  # none are used one by one
    loss.max_cc_out = 1  # set anew
    with pytest.warns(UserWarning, match="max_cc_out"):
        loss(8 * label - 4, label)


def test_a_threshold_with_softmax(backend):
    label = LESION.to(backend)
    x = torch.cat((torch.zeros_like(label), 1.2 * label - 1), dim=1)  # probability 0.55 of the lesion
    options = {"activation": "softmax", "num_out_chn": 2}
    for threshold, missed in ((None, 0), (0.5, 0), (0.54, 0), (0.56, 1), (0.9, 1)):
        options["segmentation_threshold"] = threshold
        assert InstanceLoss(**options)(x, label).missed_instances.item() == missed
        assert instance_metrics(x, label, **options).missed.item() == missed


def test_metrics_of_classes_count_the_largest_probability(backend):
    """Of three classes at 0.4, 0.35 and 0.25, only the first one is an output, though the second is above 1/3."""
    x = torch.log(torch.tensor([0.4, 0.35, 0.25])).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE).contiguous().to(backend)
    labels = torch.zeros(1, 3, *SHAPE, device=backend)
    options = {"activation": "softmax", "num_out_chn": 3, "object_chn": (0, 1, 2)}
    assert instance_metrics(x, labels, **options).num_outputs.tolist() == [[1, 0, 0]]
    assert instance_metrics(x, labels, segmentation_threshold=1 / 3, **options).num_outputs.tolist() == [[1, 1, 0]]
    ignored = torch.zeros(1, 1, *SHAPE, dtype=torch.bool, device=backend)
    ignored[:, :, 1:3] = True
    found = instance_metrics(x, labels, ignore_mask=ignored, **options)
    assert found.num_outputs.tolist() == [[2, 0, 0]]


def test_probabilities_taken_for_logits():
    label = LESION
    for outputs in (torch.zeros_like(label), 0.9 * label, label.half()):
        with pytest.raises(ValueError, match=r"outputs must be logits .* all of them lie in \[0, 1\]"):
            instance_metrics(outputs, label)
        loss = WeightedSum(InstanceLoss(rate_instead_number=True))
        with pytest.warns(UserWarning, match="outputs must be logits"):
            loss(outputs, label)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(outputs, label)  # once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InstanceLoss()(8 * label - 4, label)
        InstanceLoss(activation="none")(label, label)
        everything = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
        InstanceLoss()(torch.zeros_like(label), label, ignore_mask=everything)
    assert instance_metrics(label, label, activation="none").f1.item() == 1
