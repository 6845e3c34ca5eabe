"""The kernels that sum over instances against drawn truths, and against a plain statement of what they compute."""

import math

import pytest
import torch
from kernel_cases import (
    DEVICE,
    GRADIENT_ERRORS,
    SHAPES,
    activate,
    assert_same,
    sum_instances,
    sum_instances_backward,
    touching,
)

pytest.importorskip("triton")

from triton_instance_loss.kernels import blocks

from triton_instance_loss import ops
from triton_instance_loss.ops import GIVEN, HARD, NONE, NOT_FUSED, PROBABILITY, RAW, SIGMOID

pytestmark = pytest.mark.usefixtures("poison")


def phi(u, w, quantity):
    """What criteria measure at a voxel; w is 0 or 1."""
    if quantity == 4:
        return -(w * u.log().clamp(min=-100) + (1 - w) * (1 - u).log().clamp(min=-100))
    return [u, u * u, (u - w).abs(), (u - w) ** 2][quantity]


def plain_sums(a, y, out_rows, lab_rows, kept, quantity, no_tp, capacity):
    """The three tables of sums, differentiable in a, and the set of pairs of each sample; one row after the other."""
    zeros, ones = torch.zeros_like(a), torch.ones_like(a)
    batch = a.shape[0]
    on_label = (lab_rows > 0).to(a.dtype)
    inside = ((out_rows > 0) & (out_rows <= kept.view(-1, 1, 1, 1))).double()
    excess = phi(a * a.detach(), zeros, quantity) * ~y if no_tp else phi(a, zeros, quantity)
    cost = phi(a, ones, quantity) - (0 if no_tp else phi(a, zeros, quantity))
    nothing = torch.zeros_like(on_label)
    of_output = [a, a * on_label, phi(a, on_label, quantity), nothing, on_label]
    of_label = [a, a * inside, cost * inside, (out_rows > 0).double(), inside]
    of_sample = [a * y, phi(a, y.to(a.dtype), quantity), y]

    def table(columns, rows):
        sums = [
            [torch.stack([(c[b].double() * (rows[b] == r)).sum() for c in columns]) for r in range(1, capacity + 1)]
            for b in range(batch)
        ]
        return torch.stack([torch.stack(sample) for sample in sums])

    out_sums, lab_sums = table(of_output, out_rows), table(of_label, lab_rows)
    brought = table([excess], out_rows)[..., 0]
    pairs = touching(out_rows, lab_rows, kept)
    for b in range(batch):
        for out, lab in pairs[b]:
            out_sums[b, out - 1, ops.LABEL] += (lab_rows[b] == lab).sum()
            lab_sums[b, lab - 1, ops.COST] += brought[b, out - 1]
    sample_sums = torch.stack([torch.stack([c[b].double().sum() for c in of_sample]) for b in range(batch)])
    return out_sums, lab_sums, sample_sums, pairs


def random_case(shape, dtype, seed=0):
    """Outputs a in (0, 1) or hard, y, row maps, and a cap that some samples exceed; foregrounds have a little more."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator, dtype=torch.float64)
    a = a > 0.5 if dtype == torch.bool else a.to(dtype)
    coarse = torch.randint(0, 5, shape, generator=generator, dtype=torch.int32)
    out_rows = torch.where(torch.rand(shape, generator=generator) < 0.5, coarse, 0)
    lab_rows = torch.where(torch.rand(shape, generator=generator) < 0.6, (coarse + 1) % 4, 0)
    y = (lab_rows > 0) | (torch.rand(shape, generator=generator) < 0.1)
    a = a | (out_rows > 0) if dtype == torch.bool else a
    kept = torch.tensor([3, 0, 9])[: shape[0]].int()
    return [t.to(DEVICE) for t in (a, y, out_rows, lab_rows, kept)]


def found_pairs(pairs):
    """The keys of each sample as a set of rows; fails on a key that is there twice."""
    sets = []
    for sample in pairs.tolist():
        keys = [key for key in sample if key]
        assert len(keys) == len(set(keys))
        sets.append({(key >> 32, key & 0xFFFFFFFF) for key in keys})
    return sets


def test_sums_drawn():
    a = torch.tensor([[[[0.5, 1.0, 0.25, 0.0]]]], device=DEVICE)
    y = torch.tensor([[[[True, True, False, False]]]], device=DEVICE)
    out_rows = torch.tensor([[[[1, 1, 1, 0]]]], dtype=torch.int32, device=DEVICE)
    lab_rows = torch.tensor([[[[0, 1, 0, 0]]]], dtype=torch.int32, device=DEVICE)
    kept = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    out_sums, lab_sums, _, pairs = sum_instances(a, y, out_rows, lab_rows, kept, 0, True, 2, 4)
    # mass, intersection, cost, label or touched, overlap: the too small label at the first voxel is background, yet
    # y = 1 there, so the output brings 0.25^2 into the other label
    assert out_sums.tolist() == [[[1.75, 1.0, 1.75, 1.0, 1.0], [0.0] * 5]]
    assert lab_sums.tolist() == [[[1.0, 1.0, 1.0625, 1.0, 1.0], [0.0] * 5]]
    assert sorted(pairs[0].tolist()) == [0, 0, 0, (1 << 32) | 1]
    *_, sample_sums, pairs = sum_instances(a, y, out_rows, lab_rows, 0 * kept, 0, True, 2, 4)
    assert sample_sums.tolist() == [[1.5, 1.75, 2.0]]
    assert pairs[0].tolist() == [0] * 4


def gradient_of_a(grads, case, quantity, no_tp):
    """The gradient where x is a itself, or 1/2 the probability behind a hard a, and no pixel term is fused."""
    a, *case = case
    hard = a.dtype == torch.bool
    x, code, foreground = (torch.full(a.shape, 0.5, device=DEVICE), GIVEN, a) if hard else (a, NONE, case[1] > 0)
    no_pixel = torch.full((a.shape[0], 3), float("nan"), dtype=torch.float64, device=DEVICE)
    arguments = (x, torch.full_like(x, float("nan")), foreground, *case, quantity, no_tp, code, NOT_FUSED, 4)
    by_logit = sum_instances_backward(*grads, no_pixel, *arguments)
    return 4 * by_logit if hard else by_logit


def assert_sums(case, quantity, no_tp, tolerance):
    """Tables, pairs and gradient of one case against the plain statement."""
    a, y, out_rows, lab_rows, kept = case
    ours = sum_instances(*case, quantity, no_tp, 5, 32)
    wide = a.float() if a.dtype == torch.bool else a
    wide = wide.clone().requires_grad_()
    *expected, pairs = plain_sums(wide, y, out_rows, lab_rows, kept, quantity, no_tp, 5)
    alone = kept == 0  # of other samples, the sums over all voxels are not asked for
    for table, plain in zip((*ours[:2], ours[2][alone]), (*expected[:2], expected[2][alone]), strict=True):
        torch.testing.assert_close(table, plain.detach(), rtol=tolerance, atol=tolerance)
    assert found_pairs(ours[3]) == pairs

    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(DEVICE) for t in expected]
    (plain,) = torch.autograd.grad(expected, wide, grads)
    if a.dtype == torch.bool:  # what is background of both has no gradient
        plain = plain * (a | y)
    ours = gradient_of_a(grads, case, quantity, no_tp)
    torch.testing.assert_close(ours, plain, rtol=0, atol=GRADIENT_ERRORS[wide.dtype] * float(plain.abs().max()))


@pytest.mark.parametrize("no_tp", [True, False])
@pytest.mark.parametrize("quantity", range(5))
def test_sums_random(quantity, no_tp):
    assert_sums(random_case((2, 3, 5, 7), torch.float64), quantity, no_tp, 1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantity", [0, 4])
def test_sums_in_float32(shape, quantity):
    assert_sums(random_case(shape, torch.float32), quantity, True, 3e-6)


@pytest.mark.parametrize("quantity", [0, 1, 2, 3])
def test_sums_of_hard_outputs_are_exact(quantity):
    assert_sums(random_case((2, 3, 5, 7), torch.bool), quantity, quantity != 2, 0.0)


@pytest.mark.usefixtures("gpu_blocks")
def test_sums_at_gpu_block_sizes():
    assert_sums(random_case((2, 5, 11, 13), torch.float32), 3, True, 3e-6)


@pytest.mark.usefixtures("interleaved")
def test_sums_at_once():
    assert_sums(random_case((2, 5, 11, 13), torch.bool), 0, True, 0.0)


def test_sums_of_raw_logits():
    a, *case = random_case((1, 3, 5, 7), torch.float64)
    assert_sums([(a - 0.5) * 1e4, *case], 3, False, 1e-12)


def test_sums_of_saturated_cross_entropy():
    a, *case = random_case((1, 3, 5, 7), torch.float32)
    case = [(a > 0.5).float(), *case]
    ours = sum_instances(*case, 4, False, 5, 32)
    expected = plain_sums(*case, 4, False, 5)
    assert_same(ours[:2], expected[:2])  # log 0 is -100, as in torch
    assert_same([sum_instances(*case[:-1], 0 * case[-1], 4, False, 5, 32)[2]], [expected[2]])
    grad_a = gradient_of_a([torch.ones_like(t) for t in ours[:3]], case, 4, False)
    assert grad_a.isfinite().all()
    assert grad_a.abs().max() >= 1e11


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_sums_of_broken_outputs_end(value):
    a, *case = random_case((2, 3, 5, 7), torch.float32)
    a[0, 0, 0, 0] = value
    for quantity in (0, 4):
        tables_ours = sum_instances(a, *case, quantity, True, 5, 32)
        grads = [torch.ones_like(t) for t in tables_ours[:3]]
        gradient_of_a(grads, [a, *case], quantity, True)
    assert tables_ours[0][1].isfinite().all()


def test_gradient_of_x_drawn():
    # Two outputs of one voxel and one voxel without; only the masses of outputs and the pixel term have gradients.
    x = torch.tensor([[[[0.0, math.log(3), -math.log(3)]]]], dtype=torch.float64, device=DEVICE)
    y = torch.tensor([[[[True, False, False]]]], device=DEVICE)
    labels = torch.tensor([[[[1, 0, 2]]]], device=DEVICE)
    rows = torch.tensor([[[[1, 2, 0]]]], dtype=torch.int32, device=DEVICE)
    kept = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    grads = [torch.zeros(shape, dtype=torch.float64, device=DEVICE) for shape in ((1, 2, 5), (1, 2, 5), (1, 3))]
    grads[0][0, :, 0] = torch.tensor([4.0, 16.0])
    pixel = torch.tensor([[8.0, 16.0, float("nan")]], dtype=torch.float64, device=DEVICE)  # truth has no gradient

    def gradient(*codes):
        arguments = (*grads, pixel, x, labels, rows > 0, y, rows, torch.zeros_like(rows), kept, 0, True, *codes)
        return sum_instances_backward(*arguments).flatten().tolist()

    # sigmoid(x) = 1/2, 3/4, 1/4, with slopes 1/4, 3/16, 3/16
    assert gradient(SIGMOID, NOT_FUSED, 3) == pytest.approx([4 / 4, 16 * 3 / 16, 0], rel=1e-15)
    slopes = [x * (1 - x) for x in (0.0, math.log(3))]  # by the logit of x
    assert gradient(GIVEN, NOT_FUSED, 3) == pytest.approx([4 * slopes[0], 16 * slopes[1], 0], rel=1e-15)
    # 8 w + 16 * 2 (u - w), with u = 1/2, 3/4, 1/4 and w = 1, 0, 0
    assert gradient(SIGMOID, PROBABILITY, 3) == pytest.approx([-4 / 4, (16 + 24) * 3 / 16, 8 * 3 / 16], rel=1e-15)
    # with the foreground u = 1, 1, 0 and w = 1, 0, 2; the last voxel is background of both
    assert gradient(SIGMOID, HARD, 3) == pytest.approx([12 / 4, (16 + 32) * 3 / 16, 0], rel=1e-15)
    # 8 w + 16 sign(x - w): the slope is not on its way, as this pixel term sees x
    assert gradient(SIGMOID, RAW, 2) == pytest.approx([4 / 4 + 8 - 16, 3 + 16, 0 + 16 - 16], rel=1e-15)
    assert gradient(NONE, PROBABILITY, 0) == [4 + 8 + 16, 16 + 16, 16]


def assert_gradient_of_x(shape, dtype, label_dtype, code, pixel, pixel_quantity, quantity=3):
    """The gradient of x against autograd through a plain statement, with what `launch_activate` gives."""
    generator = torch.Generator().manual_seed(1)
    _, _, out_rows, lab_rows, kept = random_case(shape, dtype)
    source = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    labels = torch.randint(0, 4, shape, generator=generator).to(DEVICE)
    labels = labels == 1 if label_dtype == torch.bool else labels.to(label_dtype)
    labels = labels * 0.5 if label_dtype.is_floating_point else labels
    foreground, y, *_ = activate(source, labels, code, 0.4, NOT_FUSED, 0)
    out_rows, lab_rows = out_rows * foreground, lab_rows * y

    x = source.clone().requires_grad_()
    # With GIVEN gradients flow into the logit of x.
    p = torch.sigmoid(x) if code == SIGMOID else source + source * (1 - source) * (x - source) if code == GIVEN else x
    hard = foreground.to(dtype) + (p - p.detach()) * (foreground | y)
    a = x if code == NONE else hard
    *sums, _ = plain_sums(a, y, out_rows, lab_rows, kept, quantity, True, 5)
    if pixel == NOT_FUSED:
        sums.append(torch.zeros((shape[0], 3), dtype=torch.float64, device=DEVICE) * x.sum())
    else:
        u = {RAW: x, PROBABILITY: p, HARD: hard}[pixel].double()
        w = (y if pixel == PROBABILITY else labels).double()
        parts = u * w, phi(u, w, pixel_quantity), w * w if pixel_quantity == 1 else w
        sums.append(torch.stack([part.sum((1, 2, 3)) for part in parts], 1))
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(DEVICE) for t in sums]
    (plain,) = torch.autograd.grad(sums, x, grads)
    case = (source, labels, foreground, y, out_rows, lab_rows, kept, quantity, True, code, pixel, pixel_quantity)
    ours = sum_instances_backward(*grads, *case)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain, rtol=0, atol=GRADIENT_ERRORS[dtype] * float(plain.abs().max()))


@pytest.mark.parametrize("code", [NONE, SIGMOID, GIVEN])
@pytest.mark.parametrize("pixel", [NOT_FUSED, RAW, PROBABILITY, HARD])
@pytest.mark.parametrize("pixel_quantity", range(4))
def test_gradient_of_x(code, pixel, pixel_quantity):
    assert_gradient_of_x((2, 3, 5, 7), torch.float64, torch.float32, code, pixel, pixel_quantity)


@pytest.mark.parametrize("label_dtype", [torch.bool, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_x_by_types(dtype, label_dtype):
    for code, pixel in ((NONE, RAW), (SIGMOID, PROBABILITY), (GIVEN, HARD)):
        assert_gradient_of_x((2, 3, 5, 7), dtype, label_dtype, code, pixel, 3, quantity=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_x_of_shapes(shape):
    assert_gradient_of_x(shape, torch.float32, torch.uint8, SIGMOID, RAW, 1)


@pytest.mark.usefixtures("interleaved")
def test_gradient_of_x_of_programs_at_once():
    assert_gradient_of_x((2, 5, 11, 13), torch.float32, torch.float32, SIGMOID, PROBABILITY, 3)


def test_gradient_of_x_where_the_sigmoid_is_saturated():
    x = torch.tensor([[[[-200.0, 15.0, 200.0, float("inf"), float("-inf")]]]], device=DEVICE)
    y, rows = x > 0, (x > 0).int()
    kept = torch.ones(1, dtype=torch.int32, device=DEVICE)
    grads = [torch.ones(shape, dtype=torch.float64, device=DEVICE) for shape in ((1, 1, 5), (1, 1, 5), (1, 3), (1, 3))]
    case = (x, y, y, y, rows, rows, kept, 0, True, SIGMOID, PROBABILITY, 0)
    ours = sum_instances_backward(*grads, *case).flatten()
    # mass, intersection and cost of an output and of a label, nothing brought; a y and phi of sample and pixel term
    slope = math.exp(-15.0) / (1.0 + math.exp(-15.0)) ** 2
    assert ours[1].item() == pytest.approx(10 * slope, rel=0.2)  # 1 - p has few bits left
    assert ours[[0, 2, 3, 4]].tolist() == [0.0] * 4


def test_pairs_fill_the_table_and_no_more():
    # 64 pairs: exactly full; then more than there is room for, which must end and keep what it has
    out_rows = torch.arange(1, 9, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 1).repeat(1, 1, 1, 8).contiguous()
    lab_rows = out_rows.transpose(2, 3).contiguous()
    a = torch.ones((1, 1, 8, 8), device=DEVICE)
    kept = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    for slots in (64, 37, 16, 1):
        pairs = sum_instances(a, a > 0, out_rows, lab_rows, kept, 0, True, 8, slots)[3]
        assert len(found_pairs(pairs)[0]) == slots


def test_sums_without_voxels():
    case = random_case((2, 0, 3, 3), torch.float64)
    out_sums, lab_sums, sample_sums, pairs = sum_instances(*case, 0, True, 2, 4)
    assert_same([t.sum() for t in (out_sums, lab_sums, sample_sums)], [torch.zeros((), dtype=torch.float64)] * 3)
    assert (out_sums.shape, lab_sums.shape, sample_sums.shape) == ((2, 2, 5), (2, 2, 5), (2, 3))
    assert pairs.tolist() == [[0] * 4] * 2
    grad_a = gradient_of_a((out_sums, lab_sums, sample_sums), case, 0, True)
    assert (grad_a.shape, grad_a.dtype) == ((2, 0, 3, 3), torch.float64)


def all_same(results):
    first, *others = [[table.view(torch.int64) for table in tables] for tables in results]
    return all(torch.equal(ours, theirs) for other in others for ours, theirs in zip(first, other, strict=True))


def in_many_programs(dtype):
    """One output on thirty labels: many programs add to its row, and find its pairs in any order."""
    shape = (1, 15, 8, 16)
    a = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    lab_rows = torch.arange(1, 31, dtype=torch.int32, device=DEVICE).view(1, 15, 1, 2).repeat(1, 1, 8, 8)
    out_rows, kept = torch.ones_like(lab_rows), torch.ones(1, dtype=torch.int32, device=DEVICE)
    return a if dtype == torch.float64 else a >= 0, lab_rows > 0, out_rows, lab_rows, kept


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("asked", [False, True])
def test_sums_are_deterministic_if_asked(monkeypatch, asked):
    monkeypatch.setattr(blocks, "deterministic", lambda: asked)
    case = in_many_programs(torch.float64)
    assert all_same([sum_instances(*case, 0, True, 30, 64)[:3] for _ in range(6)]) == asked


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_gradient_of_x_is_deterministic(dtype):
    case = in_many_programs(dtype)
    generator = torch.Generator().manual_seed(1)
    sizes = (1, 30, 5), (1, 30, 5), (1, 3)
    grads = [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE) for size in sizes]
    assert all_same([[gradient_of_a(grads, case, 0, False).double()] for _ in range(6)])
