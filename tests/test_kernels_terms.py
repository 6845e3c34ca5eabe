"""The kernels of the terms against a drawn truth, and against a plain statement that autograd differentiates."""

import pytest
import torch
from kernel_cases import DEVICE, FAR, assert_same

pytest.importorskip("triton")

from triton_instance_loss.kernels import terms

from triton_instance_loss import ops

pytestmark = pytest.mark.usefixtures("poison")

DICE = [-2.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # 1 - (2 I + 1) / (P + L + 1)
ROWS = (7, 6)


def ratio(numbers, sums):
    """A ratio of two linear functions of three sums."""
    above, below = (
        sum(n * s for n, s in zip(part, sums, strict=False)) + part[3] for part in (numbers[:4], numbers[4:8])
    )
    return above / below


def plain_terms(sums, geometry, counts, center, distances, values, numbers, reduction, rates, health):
    """The terms, differentiable in the sums and in values that are given, one sample and one row after the other."""
    out_sums, lab_sums, sample_sums, pixel_sums = sums
    batch = len(out_sums)
    results = [torch.zeros((), dtype=torch.float64, device=DEVICE) for _ in range(7)]
    averages = [[], []]
    for b in range(batch):
        num_outputs, num_labels, kept = (int(count[b]) for count in counts)
        results[ops.PIXEL] += ratio(numbers[ops.PIXEL_RATIO :], pixel_sums[b])
        sides = []
        for side, (table, used) in enumerate(((out_sums[b], kept), (lab_sums[b], num_labels))):
            of_rows = []
            for row in range(used):
                label = table[row, ops.LABEL] if side == 0 else geometry[1][b, row, ops.SIZE].double()
                cost = table[row, ops.COST] + numbers[ops.MISSING] * (label - table[row, ops.OVERLAP])
                of_rows.append(ratio(numbers[ops.INSTANCE_RATIO :], (table[row, ops.INTERSECTION], cost, label)))
            of_rows = of_rows or [ratio(numbers[ops.INSTANCE_RATIO :], sample_sums[b])]
            of_rows = [values[side][b, row] for row in range(max(used, 1))] if values else of_rows
            sides.append(torch.stack(of_rows))
            averages[side].append(sides[-1])
        if distances:
            weighted = [(near[b, : len(of)] * of).sum() for near, of in zip(distances, sides, strict=True)]
            too_many = num_outputs if kept == 0 else 0
            results[ops.PROXIMITY] += ((weighted[1] - weighted[0]) ** 2 + too_many) / batch

        def change(table, side, row, b=b):
            return (table[b, row, ops.MASS] - table[b, row, ops.MASS].detach()) / geometry[side][b, row, ops.SIZE]

        shares = [1 / (n + numbers[ops.SMOOTHER]) if rates else 1.0 for n in (num_outputs, num_labels)]
        correct = sum(float(out_sums[b, row, ops.OVERLAP] > 0) for row in range(kept))
        detected = sum(float(lab_sums[b, row, ops.OVERLAP] > 0) for row in range(num_labels))
        false = (
            num_outputs
            - correct
            + sum(change(out_sums, 0, row) for row in range(num_outputs) if out_sums[b, row, ops.OVERLAP] == 0)
        )
        missed = (
            num_labels
            - detected
            - sum(change(lab_sums, 1, row) for row in range(num_labels) if lab_sums[b, row, ops.TOUCHED] == 0)
        )
        results[ops.FALSE_INSTANCES] += shares[0] * false / batch
        results[ops.MISSED_INSTANCES] += shares[1] * missed / batch

        if center:
            outside, inside = center[0][b, :kept].double().unbind(1)
            grown = [change(out_sums, 0, row) for row in range(kept)]
            lines, slopes = numbers[ops.CENTER_RATIO : ops.CENTER_SLOPES], numbers[ops.CENTER_SLOPES : ops.SMOOTHER]
            parts = []
            for line, slope in ((lines[:4], slopes[:2]), (lines[4:], slopes[2:])):
                part = line[0] * inside.sum() + line[1] * outside.sum() + line[2] * center[1][b].double() + line[3]
                part = part + sum((slope[0] * inside[r] + slope[1] * outside[r]) * grown[r] for r in range(kept))
                parts.append(part)
            results[ops.CENTER] += parts[0] / parts[1] / batch
    for term, of_samples in ((ops.INSTANCE_OUTPUT, averages[0]), (ops.INSTANCE_LABEL, averages[1])):
        if reduction == ops.BY_INSTANCE:
            results[term] = torch.cat(of_samples).mean()
        else:
            results[term] = sum(s.mean() if reduction == ops.BY_MEAN else s.sum() for s in of_samples) / batch
    return health * torch.stack(results)


def random_case(seed=0):
    """Tables of four samples: an ordinary one, one without outputs, one without labels, one with too many outputs."""
    generator = torch.Generator().manual_seed(seed)
    counts = [torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([5, 0, 7, 6], [4, 6, 0, 1], [3, 0, 7, 0])]

    def table(rows, columns):
        values = 1 + torch.rand((4, rows, columns), generator=generator, dtype=torch.float64)
        hidden = torch.rand((4, rows, columns), generator=generator) < 0.4
        values[..., 3:] = torch.where(hidden, 0, values)[..., 3:]  # overlaps of some rows are 0
        return values.to(DEVICE)

    sums = [*(table(rows, ops.SUMS_COLUMNS) for rows in ROWS), *(table(1, 3)[:, 0] for _ in range(2))]
    geometry, distances, values = [], [], []
    for rows, count, used in zip(ROWS, counts[:2], (counts[2], counts[1]), strict=True):
        here = torch.arange(rows, device=DEVICE) < count[:, None]
        sizes = torch.randint(1, 9, (4, rows, ops.GEOMETRY_COLUMNS), generator=generator).to(DEVICE)
        geometry.append(torch.where(here[..., None], sizes, -FAR))
        used = torch.arange(rows, device=DEVICE) < used.clamp(min=1)[:, None]
        distances.append(torch.where(used, table(rows, 1)[..., 0], torch.nan))
        values.append(torch.where(used, table(rows, 1)[..., 0], 0))
    for side in range(2):  # what is not used, nothing reads
        here = torch.arange(ROWS[side], device=DEVICE) < counts[side][:, None]
        sums[side] = torch.where(here[..., None], sums[side], torch.nan)
    owned = torch.randint(0, 50, (4, ROWS[0], 2), generator=generator).to(DEVICE)
    center = [owned, torch.randint(1, 50, (4,), generator=generator).to(DEVICE)]
    numbers = (0.1 + torch.rand(ops.NUMBERS, generator=generator, dtype=torch.float64)).tolist()
    return sums, geometry, counts, center, distances, values, numbers


def assert_terms(case, reduction, rates, health=1.0):
    """Terms and gradients against the plain statement."""
    sums, geometry, counts, center, distances, values, numbers = case
    factor = torch.tensor(health, dtype=torch.float64, device=DEVICE)
    lists = center, distances, values
    ours, *slopes = terms.launch_terms(*sums, factor, *geometry, *counts, *lists, numbers, reduction, rates)
    leaves = [table.clone().requires_grad_() for table in sums]
    expected = plain_terms(leaves, geometry, counts, center, distances, values, numbers, reduction, rates, factor)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-13, atol=1e-13, equal_nan=True)

    grad = torch.linspace(0.5, 2.0, 7, dtype=torch.float64, device=DEVICE)
    plain = torch.autograd.grad(expected, leaves, grad, materialize_grads=True)
    grads = terms.launch_terms_backward(grad, *slopes, *counts, True, True)
    for side, (result, table) in enumerate(zip(grads, plain, strict=True)):
        table = table[..., : result.shape[-1]]
        if side < 2:
            here = torch.arange(ROWS[side], device=DEVICE) < counts[side][:, None]
            result, table = result[here], table[here]
        torch.testing.assert_close(result, table, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize(
    ("reduction", "rates", "left_out"),
    [
        (ops.BY_INSTANCE, False, "nothing"),
        (ops.BY_MEAN, True, "nothing"),
        (ops.BY_SUM, False, "center"),
        (ops.BY_INSTANCE, True, "distances"),
        (ops.BY_MEAN, False, "both"),
    ],
)
def test_terms(reduction, rates, left_out):
    sums, geometry, counts, center, distances, _, numbers = random_case()
    center = [] if left_out in ("center", "both") else center
    distances = [] if left_out in ("distances", "both") else distances
    assert_terms((sums, geometry, counts, center, distances, [], numbers), reduction, rates)


def test_terms_of_given_values():
    sums, geometry, counts, center, distances, values, numbers = random_case(1)
    # As with a criterion that is not fused: nothing flows into the sums but the masses.
    numbers[ops.INSTANCE_RATIO : ops.MISSING] = [0.0] * 7 + [1.0]
    assert_terms((sums, geometry, counts, center, distances, values, numbers), ops.BY_INSTANCE, False)


@pytest.mark.usefixtures("gpu_blocks")
def test_terms_at_gpu_block_sizes(monkeypatch):
    monkeypatch.setattr(terms, "ROWS_BLOCK", 2)  # several steps for each side
    sums, geometry, counts, center, distances, _, numbers = random_case(2)
    assert_terms((sums, geometry, counts, center, distances, [], numbers), ops.BY_INSTANCE, True)


def test_broken_outputs_break_all_terms():
    sums, geometry, counts, center, distances, _, numbers = random_case(3)
    nan = torch.tensor(torch.nan, dtype=torch.float64, device=DEVICE)
    ours, *slopes = terms.launch_terms(*sums, nan, *geometry, *counts, center, distances, [], numbers, 0, False)
    assert ours.isnan().all()
    grads = terms.launch_terms_backward(torch.ones(7, dtype=torch.float64, device=DEVICE), *slopes, *counts, True, True)
    assert grads[3].isnan().all()


def test_terms_drawn():
    # One output of 4 voxels on a label of 2, one of 3 beside; one label of 5 that nothing touches.
    out_sums = torch.tensor([[[4, 2, 4, 2, 2], [3, 0, 3, 0, 0]]], dtype=torch.float64, device=DEVICE)
    lab_sums = torch.tensor([[[2, 2, 4, 2, 2], [0, 0, 0, 0, 0]]], dtype=torch.float64, device=DEVICE)
    sample_sums = torch.full((1, 3), torch.nan, dtype=torch.float64, device=DEVICE)
    pixel_sums = torch.tensor([[2, 7, 7]], dtype=torch.float64, device=DEVICE)
    sizes = torch.tensor([[4, 3], [2, 5]], device=DEVICE)
    geometry = [size[None, :, None].repeat(1, 1, ops.GEOMETRY_COLUMNS) for size in sizes]
    two = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    health = torch.ones((), dtype=torch.float64, device=DEVICE)
    distances = [torch.tensor([near], dtype=torch.float64, device=DEVICE) for near in ([1, 3], [1, 4])]
    numbers = [*DICE, *DICE, 0.0, *DICE, 0.0, 0.0, 0.0, 0.0, 0.0]
    case = (out_sums, lab_sums, sample_sums, pixel_sums, health, *geometry, two, two, two, [], distances, [])
    values, *slopes = terms.launch_terms(*case, numbers, ops.BY_INSTANCE, False)
    touching, beside, missed = 1 - 5 / 7, 1 - 1 / 4, 1 - 1 / 6
    labels, outputs = touching + 4 * missed, touching + 3 * beside
    expected = [1 - 5 / 15, (touching + missed) / 2, (touching + beside) / 2, 0, 1, 1, (labels - outputs) ** 2]
    assert values.tolist() == pytest.approx(expected, rel=1e-14)

    only = torch.zeros(7, dtype=torch.float64, device=DEVICE)
    only[ops.FALSE_INSTANCES] = only[ops.MISSED_INSTANCES] = 1
    grad_out, grad_lab, grad_sample, grad_pixel = terms.launch_terms_backward(only, *slopes, *(two,) * 3, True, True)
    assert grad_out.tolist() == [[[0, 0, 0], [pytest.approx(1 / 3), 0, 0]]]
    assert grad_lab.tolist() == [[[0, 0, 0], [pytest.approx(-1 / 5), 0, 0]]]
    assert (grad_sample.tolist(), grad_pixel.tolist()) == ([[0, 0]], [[0, 0]])


@pytest.mark.parametrize(("masses", "values"), [(False, True), (False, False)])
def test_gradients_that_do_not_flow(masses, values):
    sums, geometry, counts, center, distances, _, numbers = random_case(4)
    health = torch.ones((), dtype=torch.float64, device=DEVICE)
    _, *slopes = terms.launch_terms(*sums, health, *geometry, *counts, center, distances, [], numbers, 0, False)
    grad = torch.ones(7, dtype=torch.float64, device=DEVICE)
    whole = terms.launch_terms_backward(grad, *slopes, *counts, True, True)
    part = terms.launch_terms_backward(grad, *slopes, *counts, masses, values)
    for side in range(2):
        here = torch.arange(ROWS[side], device=DEVICE) < counts[side][:, None]
        assert (part[side][here][:, ops.MASS] == 0).all()
        rest = [table[side][here][:, 1:] for table in (part, whole)]
        assert_same([rest[0]], [rest[1] if values else torch.zeros_like(rest[1])])
    assert_same([part[2]], [whole[2] if values else torch.zeros_like(whole[2])])
    assert_same([part[3]], [whole[3]])
