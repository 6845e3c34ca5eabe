"""Half precision as it comes out of a network under autocast: terms, counts and scaled gradients.

The losses widen half precision to float32, so on the CPU everything is equal to the last bit. On a GPU sums are added
up in any order: terms repeat to the rounding of float64, and a gradient may then round to the neighbouring half.
"""

import time

import pytest
import torch
from monai.losses import DiceLoss
from training import fell, mostly_empty, patches, tiny_network

from triton_instance_loss import InstanceLoss, WeightedSum, connected_components

HALVES = [torch.float16, torch.bfloat16]
SCALE = 65536.0  # where torch.amp.GradScaler begins


def random_batch(device, dtype, channels=1, seed=0, shape=(9, 7, 8)):
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(2, channels, *shape, generator=generator)
    labels = (torch.rand(2, 1, *shape, generator=generator) > 0.85).to(device, dtype)
    return outputs.to(device, dtype), labels


def matrix_product(u, w):
    """A criterion that autocast would evaluate in half precision."""
    return 1 - 2 * (u.flatten()[None] @ w.flatten()[:, None]).squeeze() / (u.sum() + w.sum() + 1e-5)


def assert_same(actual, expected, dtype):
    tolerance = 0.0 if actual.device.type == "cpu" else torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*no fused form")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize("criterion", [None, DiceLoss(), matrix_product], ids=["default", "monai", "slow"])
def test_terms_and_gradients_are_those_of_the_widened_inputs(device, dtype, activation, criterion):
    softmax = activation == "softmax"
    half, labels = random_batch(device, dtype, channels=2 if softmax else 1)
    half = half.sigmoid() if activation == "none" else half
    loss = InstanceLoss(criterion, criterion, criterion, activation=activation, num_out_chn=2 if softmax else 1)
    results = []
    for outputs, truth in ((half, labels), (half.float(), labels.float())):
        outputs.requires_grad_()
        with torch.autocast(device.type, dtype=dtype, enabled=outputs.dtype == dtype):
            terms = torch.stack(loss(outputs, truth))
        assert terms.dtype == torch.float32
        results.append((terms, torch.autograd.grad(terms[:6].sum() + 0.01 * terms[6], outputs)[0]))
    (terms, grad), (expected_terms, expected_grad) = results
    assert_same(terms, expected_terms, torch.float32)
    assert grad.dtype == dtype
    assert expected_grad.any()
    assert_same(grad, expected_grad.to(dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_more_instances_than_half_precision_counts(device, dtype):
    """4900 single voxels in an image of 19600: float16 counts to 2048, bfloat16 to 256."""
    labels = torch.zeros(1, 1, 140, 140, device=device, dtype=dtype)
    labels[..., ::2, ::2] = 1
    ids, counts = connected_components(labels, relabel=True)
    assert counts.item() == 4900
    assert torch.equal(ids.unique().cpu(), torch.arange(4901, dtype=ids.dtype))
    loss = InstanceLoss(spatial_dims=2, max_cc_out=0)
    with torch.autocast(device.type, dtype=dtype):
        missed, matched = loss(0 * labels - 8, labels), loss(16 * labels - 8, labels)
        false = loss(16 * labels - 8, 0 * labels)
    counts = [(terms.missed_instances.item(), terms.false_instances.item()) for terms in (missed, matched, false)]
    assert counts == [(4900, 0), (0, 0), (0, 4900)]


@pytest.mark.parametrize("dtype", HALVES)
def test_scaled_gradients_stay_finite_where_they_are_largest(device, dtype):
    """A missed label and a false output of one voxel each, alone in the patch, where the sigmoid is steepest."""
    outputs = torch.full((1, 1, 7, 7, 7), -8.0, device=device, dtype=dtype)
    labels = torch.zeros_like(outputs)
    labels[..., 1, 1, 1] = 1
    outputs[..., 1, 1, 1] = -0.01
    outputs[..., 5, 5, 5] = 0.0
    loss = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=0.1)
    grads = []
    for values in (outputs, outputs.float()):
        values = values.clone().requires_grad_()
        (SCALE * loss(values, labels)).backward()
        grads.append(values.grad)
    grad, expected = grads
    assert torch.isfinite(grad).all()
    assert grad[..., 1, 1, 1] < -0.01 * SCALE
    assert grad[..., 5, 5, 5] > 0.01 * SCALE
    assert_same(grad, expected.to(dtype), dtype)


def test_scaled_gradients_of_half_probabilities_overflow_and_widened_ones_do_not(device):
    """What docs/recipes.md says of activation="none": Dice of one voxel has a derivative of 2; 2 * 65536 overflows."""
    logits = torch.full((1, 1, 7, 7, 7), -8.0, device=device, dtype=torch.float16)
    labels = torch.zeros_like(logits)
    labels[..., 1, 1, 1] = 1
    loss = WeightedSum(InstanceLoss(activation="none", rate_instead_number=True))
    finite = {}
    for widened in (False, True):
        x = logits.clone().requires_grad_()
        (SCALE * loss(torch.sigmoid(x.float() if widened else x), labels)).backward()
        finite[widened] = bool(torch.isfinite(x.grad).all())
    assert finite == {False: False, True: True}


@pytest.mark.parametrize("dtype", HALVES)
def test_trains_under_autocast_with_a_scaler(device, dtype):
    """No step is skipped: the scale stays where it began."""
    images, labels = (volume.to(device) for volume in patches(2, (12, 12, 12)))
    network = tiny_network().to(device)
    loss = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=0.01)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            outputs = network(images)
            value = loss(outputs, labels)
        assert (outputs.dtype, value.dtype) == (dtype, torch.float32)
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
        scaler.step(optimiser)
        scaler.update()
        losses.append(value.item())
    assert scaler.get_scale() == SCALE
    assert fell(losses)


@pytest.mark.parametrize("gradients", ["surrogate", "log"])
@pytest.mark.parametrize("shift", [0.0, 5.0, 10.0], ids="{:g} lower".format)
def test_empty_patches_leave_the_scale_where_it_is(device, gradients, shift):
    """Batches of which most patches, or all, have no lesion: no step is skipped, however sure the network is."""
    images, labels = (volume.to(device) for volume in mostly_empty(10, (12, 12, 12)))
    network = tiny_network().to(device)
    with torch.no_grad():
        network[-1].bias -= shift
    loss = WeightedSum(InstanceLoss(rate_instead_number=True, gradients=gradients), proximity=0.01)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    order = torch.Generator().manual_seed(0)
    lesions = []
    for _ in range(15):
        batch = torch.randperm(len(images), generator=order)[:2]
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            value = loss(network(images[batch]), labels[batch])
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        scaler.step(optimiser)
        scaler.update()
        lesions.append(bool(labels[batch].any()))
    assert scaler.get_scale() == SCALE
    assert set(lesions) == {False, True}


def large_patch():
    """Logits and labels of 160 x 192 x 160 with 200 labels on a grid: 150 found, 50 missed; 40 outputs invented."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.full((1, 1, 160, 192, 160), -8.0, dtype=torch.float16)
    labels = torch.zeros(outputs.shape, dtype=torch.uint8)
    for number in range(200):
        corner = torch.tensor([26 * (number // 36), 32 * (number // 6 % 6), 26 * (number % 6)])
        sides = torch.randint(2, 7, (3,), generator=generator)

        def box(shift, corner=corner, sides=sides):
            low = (corner + shift).tolist()
            return (0, 0, *(slice(a, a + b) for a, b in zip(low, sides.tolist(), strict=True)))

        labels[box(1)] = 1
        if number < 150:
            outputs[box(2)] = 4.0  # one voxel off along each axis
        if number % 5 == 0:
            outputs[box(14)] = 4.0
    return outputs, labels


def test_large_patch_in_half_precision(device):
    half, labels = (volume.to(device) for volume in large_patch())
    loss = WeightedSum(InstanceLoss(max_cc_out=0, rate_instead_number=True), proximity=1e-4)
    results = []
    for outputs in (half, half.float()):
        outputs.requires_grad_()
        began = time.process_time()
        with torch.autocast(device.type, dtype=torch.float16):
            value = loss(outputs, labels)
        (SCALE * value).backward()
        took = time.process_time() - began
        assert took < 20, f"{took:.1f} s of processor time; 0.5 was measured"
        results.append((torch.stack(list(loss.terms.values())), outputs.grad))
    assert loss.terms["missed_instances"].item() == pytest.approx(50 / 200)
    assert loss.terms["false_instances"].item() == pytest.approx(40 / 190)
    (terms, grad), (expected_terms, expected_grad) = results
    assert_same(terms, expected_terms, torch.float32)
    assert torch.isfinite(grad).all()
    assert (grad != 0).all()
    assert_same(grad, expected_grad.half(), torch.float16)
