"""The kernels that sum over instances against drawn truths, and against a plain statement of what they compute."""

import pytest
import torch
from kernel_cases import DEVICE, FAR, GRADIENT_ERRORS, SHAPES, assert_same

pytest.importorskip("triton")

from triton_instance_loss.kernels import tables

pytestmark = pytest.mark.usefixtures("poison")


def phi(u, w, quantity):
    """What criteria measure at a voxel; w is 0 or 1."""
    if quantity == 4:
        return -(w * u.log().clamp(min=-100) + (1 - w) * (1 - u).log().clamp(min=-100))
    return [u, u * u, (u - w).abs(), (u - w) ** 2][quantity]


def plain_sums(a, y, out_rows, lab_rows, kept, quantity, no_tp, out_capacity, lab_capacity):
    """The three tables of sums, differentiable in a, and the set of pairs of each sample; one row after the other."""
    zeros, ones = torch.zeros_like(a), torch.ones_like(a)
    batch = a.shape[0]
    on_label = (lab_rows > 0).to(a.dtype)
    inside = ((out_rows > 0) & (out_rows <= kept.view(-1, 1, 1, 1))).double()
    excess = phi(a * a.detach(), zeros, quantity) * ~y if no_tp else phi(a, zeros, quantity)
    cost = phi(a, ones, quantity) - (0 if no_tp else phi(a, zeros, quantity))
    of_output = [a, a * on_label, phi(a, on_label, quantity), excess, on_label]
    of_label = [a, a * inside, cost * inside, (out_rows > 0).double(), inside]
    of_sample = [a * y, phi(a, y.to(a.dtype), quantity), y]

    def table(columns, rows, capacity):
        sums = [
            [torch.stack([(c[b].double() * (rows[b] == r)).sum() for c in columns]) for r in range(1, capacity + 1)]
            for b in range(batch)
        ]
        return torch.stack([torch.stack(sample) for sample in sums])

    sample_sums = torch.stack([torch.stack([c[b].double().sum() for c in of_sample]) for b in range(batch)])
    pairs = []
    for b in range(batch):
        touching = (inside[b] > 0) & (lab_rows[b] > 0)
        pairs.append(set(zip(out_rows[b][touching].tolist(), lab_rows[b][touching].tolist(), strict=True)))
    return table(of_output, out_rows, out_capacity), table(of_label, lab_rows, lab_capacity), sample_sums, pairs


def random_case(shape, dtype, seed=0):
    """Outputs a in (0, 1) or hard, y, row maps whose labels are not exactly y, and a cap that some samples exceed."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator, dtype=torch.float64)
    a = a > 0.5 if dtype == torch.bool else a.to(dtype)
    coarse = torch.randint(0, 5, shape, generator=generator, dtype=torch.int32)
    out_rows = torch.where(torch.rand(shape, generator=generator) < 0.5, coarse, 0)
    lab_rows = torch.where(torch.rand(shape, generator=generator) < 0.6, (coarse + 1) % 4, 0)
    y = (lab_rows > 0) ^ (torch.rand(shape, generator=generator) < 0.1)
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
    out_sums, lab_sums, sample_sums, pairs = tables.launch_sum_instances(
        a, y, out_rows, lab_rows, kept, 0, True, 2, 1, 4
    )
    # mass, intersection, cost, excess, overlap: the too small label at the first voxel is background, yet y = 1 there
    assert out_sums.tolist() == [[[1.75, 1.0, 1.75, 0.0625, 1.0], [0.0] * 5]]
    assert lab_sums.tolist() == [[[1.0, 1.0, 1.0, 1.0, 1.0]]]
    assert sample_sums.tolist() == [[1.5, 1.75, 2.0]]
    assert sorted(pairs[0].tolist()) == [0, 0, 0, (1 << 32) | 1]


def assert_sums(case, quantity, no_tp, tolerance):
    """Tables, pairs and gradient of one case against the plain statement."""
    a, y, out_rows, lab_rows, kept = case
    ours = tables.launch_sum_instances(*case, quantity, no_tp, 5, 4, 32)
    wide = a.float() if a.dtype == torch.bool else a
    wide = wide.clone().requires_grad_()
    *expected, pairs = plain_sums(wide, y, out_rows, lab_rows, kept, quantity, no_tp, 5, 4)
    for table, plain in zip(ours, expected, strict=False):
        torch.testing.assert_close(table, plain.detach(), rtol=tolerance, atol=tolerance)
    assert found_pairs(ours[3]) == pairs

    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(DEVICE) for t in expected]
    grads[0] = grads[0][:, :1].expand_as(grads[0])
    (plain,) = torch.autograd.grad(expected, wide, grads)
    ours = tables.launch_sum_instances_backward(*grads, *case, quantity, no_tp, wide.dtype)
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


@pytest.mark.usefixtures("any_order")
def test_sums_in_any_order():
    assert_sums(random_case((2, 5, 11, 13), torch.bool), 0, True, 0.0)


def test_sums_of_raw_logits():
    a, *case = random_case((1, 3, 5, 7), torch.float64)
    assert_sums([(a - 0.5) * 1e4, *case], 3, False, 1e-12)


def test_sums_of_saturated_cross_entropy():
    a, *case = random_case((1, 3, 5, 7), torch.float32)
    case = [(a > 0.5).float(), *case]
    ours = tables.launch_sum_instances(*case, 4, False, 5, 4, 32)
    expected = plain_sums(*case, 4, False, 5, 4)
    assert_same(ours[:3], expected[:3])  # log 0 is -100, as in torch
    grad_a = tables.launch_sum_instances_backward(*[torch.ones_like(t) for t in ours[:3]], *case, 4, False, a.dtype)
    assert grad_a.isfinite().all()
    assert grad_a.abs().max() >= 1e11


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_sums_of_broken_outputs_end(value):
    a, *case = random_case((2, 3, 5, 7), torch.float32)
    a[0, 0, 0, 0] = value
    for quantity in (0, 4):
        tables_ours = tables.launch_sum_instances(a, *case, quantity, True, 5, 4, 32)
        grads = [torch.ones_like(t) for t in tables_ours[:3]]
        tables.launch_sum_instances_backward(*grads, a, *case, quantity, True, a.dtype)
    assert tables_ours[0][1].isfinite().all()


def test_pairs_fill_the_table_and_no_more():
    # 64 pairs: exactly full; then more than there is room for, which must end and keep what it has
    out_rows = torch.arange(1, 9, dtype=torch.int32, device=DEVICE).view(1, 1, 8, 1).repeat(1, 1, 1, 8).contiguous()
    lab_rows = out_rows.transpose(2, 3).contiguous()
    a = torch.ones((1, 1, 8, 8), device=DEVICE)
    kept = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    for slots in (64, 16, 1):
        pairs = tables.launch_sum_instances(a, a > 0, out_rows, lab_rows, kept, 0, True, 8, 8, slots)[3]
        assert len(found_pairs(pairs)[0]) == slots


@pytest.mark.parametrize("pair_capacity", [0, 3, 12, -4])
def test_pair_capacity_must_be_a_power_of_two(pair_capacity):
    with pytest.raises(ValueError, match=f"power of two, got {pair_capacity}"):
        tables.launch_sum_instances(*random_case((1, 1, 2, 2), torch.float32), 0, True, 2, 2, pair_capacity)


def test_sums_without_voxels():
    case = random_case((2, 0, 3, 3), torch.float32)
    out_sums, lab_sums, sample_sums, pairs = tables.launch_sum_instances(*case, 0, True, 2, 3, 4)
    assert_same([t.sum() for t in (out_sums, lab_sums, sample_sums)], [torch.zeros((), dtype=torch.float64)] * 3)
    assert (out_sums.shape, lab_sums.shape, sample_sums.shape) == ((2, 2, 5), (2, 3, 5), (2, 3))
    assert pairs.tolist() == [[0] * 4] * 2
    grad_a = tables.launch_sum_instances_backward(out_sums, lab_sums, sample_sums, *case, 0, True, torch.float64)
    assert (grad_a.shape, grad_a.dtype) == ((2, 0, 3, 3), torch.float64)


def test_sum_neighbours_drawn():
    pairs = torch.tensor([[(1 << 32) | 2, 0, (2 << 32) | 2, (2 << 32) | 1]], device=DEVICE)
    values = torch.tensor([[10.0, 1.0, 7.0]], dtype=torch.float64, device=DEVICE)
    assert tables.launch_sum_neighbours(values, pairs, True, 3).tolist() == [[1.0, 11.0, 0.0]]
    assert tables.launch_sum_neighbours(values, pairs, False, 3).tolist() == [[1.0, 11.0, 0.0]]
    values = values.expand(1, 3)[:, :2]
    assert tables.launch_sum_neighbours(values, pairs, False, 2).tolist() == [[1.0, 11.0]]


@pytest.mark.usefixtures("gpu_blocks")
def test_sum_neighbours_random():
    generator = torch.Generator().manual_seed(0)
    out = torch.randint(1, 8, (2, 301), generator=generator)
    pairs = torch.where(torch.rand((2, 301), generator=generator) < 0.5, out << 32 | out * 5 % 6 + 1, 0).to(DEVICE)
    values = torch.randint(-9, 9, (2, 7), generator=generator).double().to(DEVICE)
    for to_labels in (True, False):
        source, target = (pairs >> 32, pairs & FAR) if to_labels else (pairs & FAR, pairs >> 32)
        padded = torch.nn.functional.pad(values, (1, 0))
        expected = torch.zeros((2, 9), dtype=torch.float64, device=DEVICE)
        expected.scatter_add_(1, target, padded.gather(1, source))
        assert_same([tables.launch_sum_neighbours(values, pairs, to_labels, 8)], [expected[:, 1:]])
