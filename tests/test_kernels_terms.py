"""The kernels of the terms against a drawn truth, and against a plain statement that autograd differentiates."""

import pytest
import torch
from kernel_cases import DEVICE, FAR, assert_same, used

pytest.importorskip("triton")

from triton_instance_loss.kernels import terms, terms_backward

from triton_instance_loss import ops

pytestmark = pytest.mark.usefixtures("poison")

DICE = [-2.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # 1 - (2 I + 1) / (P + L + 1)
ROWS = 7


def ratio(numbers, sums):
    """A ratio of two linear functions of three sums."""
    above, below = (
        sum(n * s for n, s in zip(part, sums, strict=False)) + part[3] for part in (numbers[:4], numbers[4:8])
    )
    return above / below


def plain_terms(
    sums, geometry, counts, owned, distances, values, totals, numbers, classes, reduction, rates, health, beyond
):
    """The terms, one sample and one row after the other, differentiable in the sums and in values that are given.

    And in `beyond`, in each sample the mean of a over an output beyond the tables that touches no label.
    """
    table, sample_sums, pixel_sums = sums
    out_sums, lab_sums = table.chunk(2)
    geometry = geometry.chunk(2)
    batch = len(out_sums)
    results = [torch.zeros((), dtype=torch.float64, device=DEVICE) for _ in range(7)]
    averages = [[], []]
    for b in range(batch):
        num_outputs, kept, num_labels = counts[:, b].tolist()
        results[ops.PIXEL] += ratio(numbers[ops.PIXEL_RATIO :], pixel_sums[b])
        sides = []
        for side, (table, count) in enumerate(((out_sums[b], kept), (lab_sums[b], num_labels))):
            of_rows = []
            for row in range(count):
                label = table[row, ops.LABEL] if side == 0 else geometry[1][b, row, ops.SIZE].double()
                cost = table[row, ops.COST] + numbers[ops.MISSING] * (label - table[row, ops.OVERLAP])
                of_rows.append(ratio(numbers[ops.INSTANCE_RATIO :], (table[row, ops.INTERSECTION], cost, label)))
            of_rows = of_rows or [ratio(numbers[ops.INSTANCE_RATIO :], sample_sums[b])]
            if values is not None:
                of_rows = [values.chunk(2)[side][b, row] for row in range(max(count, 1))]
            sides.append(torch.stack(of_rows))
            averages[side].append(sides[-1])
        if distances is not None:
            weighted = [(near[b, : len(of)] * of).sum() for near, of in zip(distances.chunk(2), sides, strict=True)]
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
            + (beyond[b] - beyond[b].detach())
        )
        missed = (
            num_labels
            - detected
            - sum(change(lab_sums, 1, row) for row in range(num_labels) if lab_sums[b, row, ops.TOUCHED] == 0)
        )
        results[ops.FALSE_INSTANCES] += shares[0] * false / batch
        results[ops.MISSED_INSTANCES] += shares[1] * missed / batch

        if owned is not None:
            of_outputs, of_labels = (side.double() for side in owned.chunk(2))
            outside, inside = of_outputs[b, :kept].unbind(1)
            alone = of_labels[b, :num_labels, 0].sum()
            grown = [change(out_sums, 0, row) for row in range(kept)]
            lines, slopes = numbers[ops.CENTER_RATIO : ops.CENTER_SLOPES], numbers[ops.CENTER_SLOPES : ops.SMOOTHER]
            parts = []
            for line, slope in ((lines[:4], slopes[:2]), (lines[4:], slopes[2:])):
                part = line[0] * inside.sum() + line[1] * outside.sum() + line[2] * alone + line[3]
                part = part + sum((slope[0] * inside[r] + slope[1] * outside[r]) * grown[r] for r in range(kept))
                parts.append(part)
            results[ops.CENTER] += parts[0] / parts[1] / batch
    for term, of_samples in ((ops.INSTANCE_OUTPUT, averages[0]), (ops.INSTANCE_LABEL, averages[1])):
        if reduction == ops.BY_INSTANCE:
            of_classes = [torch.cat(of_samples[number::classes]) for number in range(classes)]
            rows = [len(of) for of in of_classes]
            if totals is not None:
                rows = totals[0 if term == ops.INSTANCE_OUTPUT else 1].tolist()
            results[term] = sum(of.sum() / n for of, n in zip(of_classes, rows, strict=True)) / classes
        else:
            results[term] = sum(s.mean() if reduction == ops.BY_MEAN else s.sum() for s in of_samples) / batch
    return health.prod() * torch.stack(results)


def random_case(seed=0):
    """Tables of four samples: an ordinary one, one without outputs, one without labels, one with too many outputs."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([[5, 0, 7, 6], [3, 0, 7, 0], [4, 6, 0, 1]], dtype=torch.int32, device=DEVICE)
    present, valued = counts[[0, 2]].view(-1), counts[1:].reshape(-1).clamp(min=1)

    def table(columns, rows_of_sides):
        values = 1 + torch.rand((8, ROWS, columns), generator=generator, dtype=torch.float64)
        hidden = torch.rand((8, ROWS, columns), generator=generator) < 0.4
        values[..., 3:] = torch.where(hidden, 0, values)[..., 3:]  # overlaps of some rows are 0
        here = torch.arange(ROWS, device=DEVICE) < rows_of_sides[:, None]
        return torch.where(here[..., None], values.to(DEVICE), torch.nan)  # what is not used, nothing reads

    def whole(*shape):
        return torch.randint(1, 50, shape, generator=generator).to(DEVICE)

    sums = table(ops.SUMS_COLUMNS, present), table(3, present)[:4, 0].nan_to_num(1.5), 1.0 / whole(4, 3)
    sums = [part.double() for part in sums]
    here = torch.arange(ROWS, device=DEVICE) < present[:, None]
    geometry = torch.where(here[..., None], whole(8, ROWS, ops.GEOMETRY_COLUMNS), -FAR)
    distances, values = table(1, valued)[..., 0], table(1, valued)[..., 0].nan_to_num(0.0)
    numbers = (0.1 + torch.rand(ops.NUMBERS, generator=generator, dtype=torch.float64)).tolist()
    return sums, counts, geometry, whole(8, ROWS, 2), distances, values, numbers


def launch_terms(*case):
    """The terms and both slopes, without a total."""
    finished = torch.zeros((), dtype=torch.int32, device=DEVICE)
    ours, _, *slopes = terms.launch_terms(*case, (), torch.float64, finished)
    return ours, *slopes


def launch_terms_backward(grad, slopes, of_samples, counts, *flags):
    """Gradients of the sums of instances, of samples and of the pixel term's, from that of the terms alone.

    That of the excess of outputs follows from the pairs that touch: here, the first label touches all of them.
    """
    batch = counts.shape[1]
    outputs = torch.arange(1, slopes.shape[1] + 1, device=DEVICE)
    pairs = ((outputs << 32) | 1).repeat(batch, 1)  # no slot is free, so each is found wherever it is
    tables = slopes, of_samples, pairs, counts
    each, of_rows, of_excess, *grads = terms_backward.launch_terms_backward(grad, None, (), *tables, *flags)
    assert torch.equal(each, grad)
    touch = (outputs <= counts[ops.KEPT, :, None]) & (counts[ops.LABELS, :, None] > 0)
    brought = torch.where(touch, of_rows[batch:, :1, ops.COST], 0.0)
    assert_same([used(of_excess, counts[ops.OUTPUTS])], [used(brought, counts[ops.OUTPUTS])])
    return [of_rows, *grads]


def with_mistakes(grad, slopes, grads):
    """Gradients of the sums with those of false and missed instances, which the operator leaves to the next one."""
    table, *rest = grads
    of_mistakes = grad[[ops.FALSE_INSTANCES, ops.MISSED_INSTANCES]].repeat_interleave(len(table) // 2)
    table[..., ops.MASS] += of_mistakes[:, None] * slopes[..., ops.BY_FALSE]
    return [table, *rest]


def assert_terms(case, reduction, rates, classes=1, totals=None):
    """Terms and gradients against the plain statement."""
    sums, counts, geometry, owned, distances, values, numbers = case
    health = torch.ones(counts.shape[1], dtype=torch.float64, device=DEVICE)
    rest = owned, distances, values, totals, numbers, classes, reduction, rates
    ours, *slopes = launch_terms(*sums, health, counts, geometry, *rest)
    *leaves, beyond = [table.clone().requires_grad_() for table in (*sums, torch.zeros_like(sums[1][:, 0]))]
    expected = plain_terms(leaves, geometry, counts, *rest, health, beyond)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-13, atol=1e-13)

    grad = torch.linspace(0.5, 2.0, 7, dtype=torch.float64, device=DEVICE)
    *plain, by_rest = torch.autograd.grad(expected, [*leaves, beyond], grad, materialize_grads=True)
    plain[1] = torch.cat((plain[1][:, : ops.SAMPLE_GRADIENT_COLUMNS], by_rest[:, None]), 1)
    grads = with_mistakes(grad, slopes[0], launch_terms_backward(grad, *slopes, counts, True, True))
    present = counts[[0, 2]]
    grads[0], plain[0] = used(grads[0], present), used(plain[0], present)
    for result, table in zip(grads, plain, strict=True):
        torch.testing.assert_close(result, table[..., : result.shape[-1]], rtol=1e-12, atol=1e-13)


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
    *tables, owned, distances, _, numbers = random_case()
    owned = None if left_out in ("center", "both") else owned
    distances = None if left_out in ("distances", "both") else distances
    assert_terms((*tables, owned, distances, None, numbers), reduction, rates)


@pytest.mark.parametrize("reduction", [ops.BY_INSTANCE, ops.BY_MEAN, ops.BY_SUM])
def test_terms_of_two_classes(reduction):
    *tables, _, numbers = random_case(5)
    assert_terms((*tables, None, numbers), reduction, True, classes=2)


@pytest.mark.parametrize("classes", [1, 2])
def test_terms_averaged_over_instances_elsewhere(classes):
    *tables, _, numbers = random_case(6)
    totals = torch.tensor([[9, 5.5], [12, 3]], dtype=torch.float64, device=DEVICE)[:, :classes].contiguous()
    assert_terms((*tables, None, numbers), ops.BY_INSTANCE, False, classes, totals)


def test_terms_of_given_values():
    *tables, numbers = random_case(1)
    # As with a criterion that is not fused: nothing flows into the sums but the masses.
    numbers[ops.INSTANCE_RATIO : ops.MISSING] = [0.0] * 7 + [1.0]
    assert_terms((*tables, numbers), ops.BY_INSTANCE, False)


@pytest.mark.usefixtures("gpu_blocks")
def test_terms_at_gpu_block_sizes(monkeypatch):
    for room in (terms, terms_backward):
        monkeypatch.setattr(room, "ROWS_BLOCK", 2)  # several steps for each side
    *tables, _, numbers = random_case(2)
    assert_terms((*tables, None, numbers), ops.BY_INSTANCE, True)


@pytest.mark.usefixtures("interleaved")
def test_terms_at_once():
    """The program that is done last adds up what all have written."""
    *tables, _, numbers = random_case(7)
    assert_terms((*tables, None, numbers), ops.BY_INSTANCE, True)


def test_broken_outputs_break_all_terms():
    sums, counts, geometry, owned, distances, _, numbers = random_case(3)
    broken = torch.tensor([1, torch.nan, 1, 1], dtype=torch.float64, device=DEVICE)
    ours, *slopes = launch_terms(*sums, broken, counts, geometry, owned, distances, None, None, numbers, 1, 0, False)
    assert ours.isnan().all()
    grads = launch_terms_backward(torch.ones(7, dtype=torch.float64, device=DEVICE), *slopes, counts, True, True)
    assert grads[2].isnan().all()


def test_terms_drawn():
    # One output of 4 voxels on a label of 2, one of 3 beside; one label of 5 that nothing touches.
    sums = [[[4, 2, 4, 2, 2], [3, 0, 3, 0, 0]], [[2, 2, 4, 2, 2], [0, 0, 0, 0, 0]]]
    sums = torch.tensor(sums, dtype=torch.float64, device=DEVICE)
    sample_sums = torch.full((1, 3), torch.nan, dtype=torch.float64, device=DEVICE)
    pixel_sums = torch.tensor([[2, 7, 7]], dtype=torch.float64, device=DEVICE)
    sizes = torch.tensor([[4, 3], [2, 5]], device=DEVICE)
    geometry = sizes[..., None].repeat(1, 1, ops.GEOMETRY_COLUMNS)
    counts = torch.full((3, 1), 2, dtype=torch.int32, device=DEVICE)
    health = torch.ones(counts.shape[1], dtype=torch.float64, device=DEVICE)
    distances = torch.tensor([[1, 3], [1, 4]], dtype=torch.float64, device=DEVICE)
    numbers = [*DICE, *DICE, 0.0, *DICE, 0.0, 0.0, 0.0, 0.0, 0.0]
    case = (sums, sample_sums, pixel_sums, health, counts, geometry, None, distances, None, None)
    values, *slopes = launch_terms(*case, numbers, 1, ops.BY_INSTANCE, False)
    touching, beside, missed = 1 - 5 / 7, 1 - 1 / 4, 1 - 1 / 6
    labels, outputs = touching + 4 * missed, touching + 3 * beside
    expected = [1 - 5 / 15, (touching + missed) / 2, (touching + beside) / 2, 0, 1, 1, (labels - outputs) ** 2]
    assert values.tolist() == pytest.approx(expected, rel=1e-14)

    only = torch.zeros(7, dtype=torch.float64, device=DEVICE)
    only[ops.FALSE_INSTANCES] = only[ops.MISSED_INSTANCES] = 1
    grads = launch_terms_backward(only, *slopes, counts, True, True)
    assert not grads[0].any()
    grads, grad_sample, grad_pixel = with_mistakes(only, slopes[0], grads)
    assert grads[0].tolist() == [[0, 0, 0], [pytest.approx(1 / 3), 0, 0]]
    assert grads[1].tolist() == [[0, 0, 0], [pytest.approx(-1 / 5), 0, 0]]
    assert (grad_sample.tolist(), grad_pixel.tolist()) == ([[0, 0, 1]], [[0, 0]])


@pytest.mark.parametrize("values", [True, False])
def test_gradients_that_do_not_flow(values):
    sums, counts, geometry, owned, distances, _, numbers = random_case(4)
    health = torch.ones(counts.shape[1], dtype=torch.float64, device=DEVICE)
    _, *slopes = launch_terms(*sums, health, counts, geometry, owned, distances, None, None, numbers, 1, 0, False)
    grad = torch.ones(7, dtype=torch.float64, device=DEVICE)
    whole = launch_terms_backward(grad, *slopes, counts, True, True)
    part = launch_terms_backward(grad, *slopes, counts, False, values)
    of_rows, of_all = (used(table, counts[[0, 2]]) for table in (part[0], whole[0]))
    assert (of_rows[..., ops.MASS] == 0).all()
    assert (part[1][:, ops.BY_REST] == 0).all()
    flowing = [of_all[..., 1:], whole[1][:, : ops.BY_REST]]
    flowing = flowing if values else [torch.zeros_like(table) for table in flowing]
    assert_same([of_rows[..., 1:], part[1][:, : ops.BY_REST], part[2]], [*flowing, whole[2]])
