"""The kernels of cells and of losses on regions against drawn truths, and against plain statements of the formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, GRADIENT_ERRORS, SHAPES, assert_same

pytest.importorskip("triton")

from triton_instance_loss.kernels import blocks, cells, regions

from triton_instance_loss.ops import BLOB, CELLS, FALSE, NONE, SIGMOID, TVERSKY

pytestmark = pytest.mark.usefixtures("poison")

KINDS = {
    "blob": (BLOB, [1.0, 1.0, 1e-5, 0.0]),
    "blob, dice": (BLOB, [1.0, 0.0, 1e-5, 1.0]),
    "blob, logits": (BLOB, [1.0, 1.0, 0.5, 1.0]),
    "blob, ce": (BLOB, [0.0, 1.0, 0.0, 0.0]),
    "cells": (CELLS, [1.0, 1.0, 0.0, 0.4]),
    "cells, dice": (CELLS, [1.0, 0.0, 0.7, 0.4]),
    "cells, ce": (CELLS, [0.0, 1.0, 0.0, 0.4]),
    "tversky": (TVERSKY, [0.3, 0.7, 1.0, 5.0, 0.1, 1e-5]),
    "tversky, odd": (TVERSKY, [0.6, 0.2, 0.5, 0.0, 0.7, 0.3]),
    "false": (FALSE, []),
}
SPACINGS = [[1.0, 1.0, 1.0], [2.5, 2.5, 2.5], [3.0, 0.7, 1.3], [1e3, 1e-3, 0.5]]


def draw_rows(shape, density=0.06, highest=7, seed=0):
    """A row map of scattered voxels, some below 0; the second sample has none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, highest + 1, shape, generator=generator, dtype=torch.int32)
    rows[torch.rand(shape, generator=generator) > density] = 0
    rows[1:2] = rows[1:2].clamp(max=0)
    return rows.to(DEVICE)


def plain_cells(rows, spacing):
    """Every voxel against every voxel of an instance, one axis after the other as the kernels add them."""
    answers = np.zeros(rows.shape, np.int32)
    alike = len({step for step, length in zip(spacing, rows.shape[1:], strict=True) if length > 1}) <= 1
    spacing = [1.0] * 3 if alike else spacing
    for volume, answer in zip(rows.cpu().numpy(), answers, strict=True):
        places = np.argwhere(volume > 0)
        for voxel in np.ndindex(volume.shape):
            if len(places):
                apart = (places - voxel) * np.array(spacing)
                squares = apart * apart
                distances = squares[:, 2] + squares[:, 1] + squares[:, 0]
                nearest = places[distances == distances.min()]
                answer[voxel] = volume[tuple(nearest.T)].max()
    return torch.from_numpy(answers).to(rows.device)


def test_cells_drawn():
    rows = torch.zeros((1, 1, 3, 7), dtype=torch.int32, device=DEVICE)
    rows[0, 0, 0, 0], rows[0, 0, 0, 4], rows[0, 0, 2, 6] = 3, 2, 1
    # of equally near ones the larger: (0, 2), (1, 2), (2, 2) and (2, 4), (0, 6)
    expected = [[3, 3, 3, 2, 2, 2, 2], [3, 3, 3, 2, 2, 2, 1], [3, 3, 3, 2, 2, 1, 1]]
    assert cells.launch_cells(rows, [1.0] * 3)[0, 0].tolist() == expected
    # along W a step is a third, and a line 3 apart: what lies in the same line is nearest
    expected = [[3, 3, 3, 2, 2, 2, 2], [3, 3, 3, 2, 2, 2, 1], [1, 1, 1, 1, 1, 1, 1]]
    assert cells.launch_cells(rows, [1.0, 3.0, 0.33])[0, 0].tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cells(shape, spacing):
    for seed, density in enumerate((0.02, 0.1, 0.5)):
        rows = draw_rows(shape, density, seed=seed)
        assert_same([cells.launch_cells(rows, spacing)], [plain_cells(rows, spacing)])


def test_cells_of_squares_that_need_64_bits(monkeypatch):
    monkeypatch.setattr(cells, "LARGEST_INT32", 10)
    rows = draw_rows((2, 3, 5, 7))
    assert_same([cells.launch_cells(rows, [1.0] * 3)], [plain_cells(rows, [1.0] * 3)])


def test_cells_full_and_empty():
    full = torch.full((1, 2, 3, 5), 4, dtype=torch.int32, device=DEVICE)
    assert_same([cells.launch_cells(full, [1.0] * 3)], [full])
    for empty in (0 * full, 0 * full - 1):
        assert_same([cells.launch_cells(empty, [1.0, 2.0, 3.0])], [0 * full])
    for shape in ((0, 2, 3, 5), (2, 0, 3, 5)):
        rows = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
        assert cells.launch_cells(rows, [1.0] * 3).shape == shape


@pytest.mark.usefixtures("gpu_blocks")
@pytest.mark.parametrize("spacing", SPACINGS[::2], ids=str)
def test_cells_at_gpu_block_sizes(monkeypatch, spacing):
    for block in (8, 64):
        monkeypatch.setattr(cells, "CELLS_BLOCK", block)
        rows = draw_rows((2, 3, 5, 11), 0.03)
        assert_same([cells.launch_cells(rows, spacing)], [plain_cells(rows, spacing)])


@pytest.mark.usefixtures("interleaved")
def test_cells_of_programs_at_once(monkeypatch):
    monkeypatch.setattr(cells, "CELLS_BLOCK", 32)
    rows = draw_rows((2, 3, 5, 7))
    assert_same([cells.launch_cells(rows, [1.0] * 3)], [plain_cells(rows, [1.0] * 3)])


def draw_case(shape, dtype=torch.float64, activation=SIGMOID, kind=BLOB, label_dtype=torch.float32, seed=0):
    """x, labels, a row map with ignored voxels, counts (a third sample has none), and which regions are chosen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    x = (x if activation == SIGMOID else x.sigmoid()).to(dtype)
    most = torch.tensor([6, 1, 0, 3])[: shape[0]].view(-1, 1, 1, 1).int()
    rows = torch.minimum(torch.randint(0, 7, shape, generator=generator, dtype=torch.int32), most)
    if kind != CELLS:
        rows[torch.rand(shape, generator=generator) < 0.4] = 0
        labels = (rows > 0) | (torch.rand(shape, generator=generator) < 0.1)  # some are in no instance
    else:
        rows = torch.where(most > 0, rows.clamp(min=1), 0)
        labels = (torch.rand(shape, generator=generator) < 0.5) & (rows % 3 != 1)  # some cells without truth
    rows[torch.rand(shape, generator=generator) < 0.1] = -1
    for volume in rows:  # numbers that are there, without gaps
        for number, row in enumerate(volume[volume > 0].unique()):
            volume[volume == row] = number + 1
    counts = rows.flatten(1).amax(1).clamp(min=0)
    chosen = torch.rand((shape[0], 8), generator=generator) < 0.5
    return [t.to(DEVICE) for t in (x, labels.to(label_dtype), rows, counts, chosen)]


def of_sample(p, x, y, rows, count, chosen, activation, kind, numbers):
    """The value of one sample, and its share, as SPEC says it; differentiable."""
    if activation == SIGMOID:
        cost = torch.where(y, torch.nn.functional.softplus(-x), torch.nn.functional.softplus(x))
    else:
        cost = torch.where(y, -p.log().clamp(min=-100), -torch.log1p(-p).clamp(min=-100))
    background = rows == 0 if kind == CELLS else (rows == 0) & ~y
    instances = [rows == row for row in range(1, count + 1)]
    total = 0 * p[rows >= 0].sum()
    if kind == BLOB:
        dice, ce, s, by_logits = numbers
        for mask in instances:
            others = by_logits * sum(int(other.sum()) for other in instances if other is not mask)
            mass, size = p[mask].sum(), int(mask.sum())
            below = mass + p[background].sum() + size + others / 2 + s
            entropy = cost[mask].sum() + cost[background].sum() + others * math.log(2)
            part = dice * (1 - (2 * mass + s) / below) if dice else 0
            part += ce * entropy / (size + int(background.sum()) + others) if ce else 0
            total = total + part / count
        return total, int(count > 0)
    if kind == CELLS:
        dice, ce, s, _ = numbers
        for mask in instances or [background]:
            mass, truth, size = p[mask].sum(), int(y[mask].sum()), max(1, int(mask.sum()))
            if truth or not instances:
                part = 1 - (2 * p[mask & y].sum() + s) / (mass + truth + s).clamp(min=1e-8)
            else:
                part = (p * p.detach())[mask].sum() / mass.detach().clamp(min=1e-8)
            part = dice * part + (ce * cost[mask].sum() / size if ce else 0)
            total = total + part / max(1, count)
        return total, 1
    if kind == TVERSKY:
        alpha, beta, gamma, epsilon, background_weight, s = numbers
        hit, missed = total, total
        for mask in instances:
            weight = (int(mask.sum()) + epsilon) ** -gamma
            hit, missed = hit + weight * p[mask].sum(), missed + weight * (1 - p)[mask].sum()
        false = background_weight * p[background].sum()
        return 1 - (hit + s) / (hit + alpha * false + beta * missed + s), 1
    meant = [mask for mask, is_meant in zip(instances, chosen, strict=False) if is_meant]
    return total + sum(p[mask].sum() / max(1, int(mask.sum())) for mask in meant), len(meant)


def plain_loss(x, labels, rows, counts, chosen, activation, kind, numbers, classes):
    """The mean over classes of the mean over samples, or over chosen regions."""
    p, y, used = (torch.sigmoid(x) if activation == SIGMOID else x), labels > 0.5, counts.tolist()
    total = 0 * x.sum()
    for number in range(classes):
        turns = range(number, len(x), classes)
        parts = [of_sample(p[b], x[b], y[b], rows[b], used[b], chosen[b], activation, kind, numbers) for b in turns]
        if kind == TVERSKY and not any(used[b] for b in turns):
            continue
        share = sum(part[1] for part in parts)
        total = total + sum(part[0] for part in parts if part[1]) / max(1, share) / classes
    return total


def assert_loss(case, activation, kind, numbers, classes=1, capacity=8):
    """Value and gradient against the plain statement in float64."""
    x, labels, rows, counts, chosen = case
    given = chosen[:, :capacity].contiguous() if kind == FALSE else None
    how = activation, kind, numbers, classes, capacity
    value, slopes, factors = regions.launch_region_loss(x, labels, rows, counts, given, *how)
    assert (value.dtype, value.shape, slopes.shape) == (x.dtype, (), (len(x), capacity + 1, 4))
    leaf = x.double().requires_grad_()
    plain = plain_loss(leaf, labels, rows, counts, chosen, activation, kind, numbers, classes)
    error = 4e-7 if x.dtype == torch.float32 else 1e-14
    torch.testing.assert_close(value.double(), plain.detach(), rtol=error, atol=error)

    grad = torch.tensor(1.7, dtype=x.dtype, device=DEVICE)
    (expected,) = torch.autograd.grad(plain, leaf, grad.double())
    ours = regions.launch_region_loss_backward(grad, x, labels, rows, slopes, factors, activation, kind)
    assert ours.dtype == x.dtype
    largest = float(expected.abs().max()) if x.numel() else 0.0
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=GRADIENT_ERRORS[x.dtype] * largest)
    return value, ours


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("activation", [NONE, SIGMOID])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses(name, activation, dtype):
    kind, numbers = KINDS[name]
    for seed in range(2):
        assert_loss(draw_case((4, 3, 5, 7), dtype, activation, kind, seed=seed), activation, kind, numbers)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("classes", [2, 4])
def test_losses_of_classes(name, classes):
    kind, numbers = KINDS[name]
    assert_loss(draw_case((4, 3, 5, 7), kind=kind), SIGMOID, kind, numbers, classes)


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_shapes(shape):
    for kind, numbers in KINDS.values():
        assert_loss(draw_case(shape, kind=kind), SIGMOID, kind, numbers)


@pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64])
def test_losses_by_types(label_dtype):
    for dtype, (kind, numbers) in itertools.product(GRADIENT_ERRORS, (KINDS["blob"], KINDS["cells"])):
        assert_loss(draw_case((2, 3, 5, 7), dtype, SIGMOID, kind, label_dtype), SIGMOID, kind, numbers)


def assert_loss_of_two_sides(share, dtype=torch.float64, activation=SIGMOID, classes=1):
    """What two maps give together, by what each gives alone."""
    kind, numbers = CELLS, [1.0, 1.0, 0.3, share]
    x, labels, *first = draw_case((4, 3, 5, 7), dtype, activation, kind)
    *second, _ = draw_case((4, 3, 5, 7), dtype, activation, kind, seed=1)[2:]
    rows, counts = (torch.cat(pair) for pair in zip(first[:2], second, strict=True))
    value, *kept = regions.launch_region_loss(x, labels, rows, counts, None, activation, kind, numbers, classes, 8)
    grad = torch.tensor(1.7, dtype=dtype, device=DEVICE)
    ours = regions.launch_region_loss_backward(grad, x, labels, rows, *kept, activation, kind)
    leaf = x.double().requires_grad_()
    sides = [
        plain_loss(leaf, labels, *side, first[-1], activation, kind, numbers, classes) for side in (first[:2], second)
    ]
    plain = share * sides[0] + (1 - share) * sides[1]
    (expected,) = torch.autograd.grad(plain, leaf, grad.double())
    error = 4e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(value.double(), plain.detach(), rtol=error, atol=error)
    torch.testing.assert_close(
        ours.double(), expected, rtol=0, atol=GRADIENT_ERRORS[dtype] * float(expected.abs().max())
    )


@pytest.mark.parametrize("activation", [NONE, SIGMOID])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_two_sides(activation, dtype):
    for share, classes in ((0.5, 1), (0.3, 2)):
        assert_loss_of_two_sides(share, dtype, activation, classes)


@pytest.mark.parametrize("name", KINDS)
def test_losses_without_instances_or_voxels(name):
    kind, numbers = KINDS[name]
    x, labels, rows, counts, chosen = draw_case((2, 3, 5, 7), kind=kind)
    rows = rows.clamp(max=0)
    for truth, where in itertools.product((0 * labels, labels), (rows, 0 * rows - 1)):
        assert_loss((x, truth, where, 0 * counts, chosen), SIGMOID, kind, numbers)
    for shape in ((2, 0, 5, 7), (0, 3, 5, 7)):
        empty = (t.new_empty(shape) for t in (x, labels, rows))
        value, *kept = regions.launch_region_loss(
            *empty, counts[: shape[0]] * 0, chosen[: shape[0]] if kind == FALSE else None, SIGMOID, kind, numbers, 1, 8
        )
        assert value.isfinite()
        empty = (t.new_empty(shape) for t in (x, labels, rows))
        grad = regions.launch_region_loss_backward(value, *empty, *kept, SIGMOID, kind)
        assert grad.shape == shape


@pytest.mark.parametrize("name", KINDS)
def test_rows_beyond_the_table_are_in_no_region(name):
    kind, numbers = KINDS[name]
    x, labels, rows, counts, chosen = draw_case((2, 3, 5, 7), kind=kind)
    beyond = torch.where(rows > 2, -1, rows)
    cut = assert_loss((x, labels, beyond, counts.clamp(max=2), chosen), SIGMOID, kind, numbers, capacity=2)
    given = chosen[:, :2].contiguous() if kind == FALSE else None
    value, *kept = regions.launch_region_loss(x, labels, rows, counts, given, SIGMOID, kind, numbers, 1, 2)
    grad = regions.launch_region_loss_backward(torch.full_like(value, 1.7), x, labels, rows, *kept, SIGMOID, kind)
    torch.testing.assert_close((value, grad), cut, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("row", [-1, 0, 1])
def test_what_is_broken_breaks_the_value(name, row):
    kind, numbers = KINDS[name]
    for broken, (place, label) in itertools.product((math.nan, math.inf, -math.inf), ((0, 0.0), (2, 1.0))):
        x, labels, rows, counts, chosen = draw_case((4, 3, 5, 7), kind=kind)
        rows[place, 0, 0, 0] = min(row, int(counts[place]))
        labels[place, 0, 0, 0] = label
        outputs = x.clone()
        outputs[place, 0, 0, 0] = broken
        value, *_ = regions.launch_region_loss(outputs, labels, rows, counts, chosen, SIGMOID, kind, numbers, 1, 8)
        assert value.isnan() == (rows[place, 0, 0, 0] >= 0)
        for wrong in (255.0, -1.0, math.nan):
            labels[place, 0, 0, 0] = wrong
            value, *_ = regions.launch_region_loss(x, labels, rows, counts, chosen, SIGMOID, kind, numbers, 1, 8)
            assert value.isnan() == (rows[place, 0, 0, 0] >= 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_sure_logits(dtype):
    x = torch.tensor([[[[30.0, -30.0, 200.0, -200.0, 15.0]]]], dtype=dtype, device=DEVICE)
    labels, rows = torch.ones_like(x), torch.ones_like(x).int()
    counts = torch.ones(1, dtype=torch.int32, device=DEVICE)
    for voxels in ([0], [0, 4], [1], [3, 2]):
        part = torch.full_like(rows, -1)
        part[..., voxels] = 1
        value, *kept = regions.launch_region_loss(
            x, labels, part, counts, None, SIGMOID, CELLS, [0.0, 1.0, 0.0, 1.0], 1, 1
        )
        expected = sum(max(-v, 0) + math.log1p(math.exp(-abs(v))) for v in x[0, 0, 0, voxels].tolist()) / len(voxels)
        assert value.item() == pytest.approx(expected, rel=4e-7 if dtype == torch.float32 else 1e-14)
        grad = regions.launch_region_loss_backward(torch.ones_like(value), x, labels, part, *kept, SIGMOID, CELLS)
        expected = [-1 / (1 + math.exp(v)) / len(voxels) for v in x[0, 0, 0, voxels].tolist()]
        assert grad[0, 0, 0, voxels].tolist() == pytest.approx(expected, rel=4e-6 if dtype == torch.float32 else 1e-13)


def test_logarithms_of_probabilities_end():
    x = torch.tensor([[[[0.0, 1.0, 0.0, 1.0, 1e-20]]]], device=DEVICE)
    labels = torch.tensor([[[[1.0, 0.0, 0.0, 1.0, 0.0]]]], device=DEVICE)
    rows, counts = torch.ones_like(x).int(), torch.ones(1, dtype=torch.int32, device=DEVICE)
    value, *kept = regions.launch_region_loss(x, labels, rows, counts, None, NONE, CELLS, [0.0, 1.0, 0.0, 1.0], 1, 1)
    assert value.item() == 40
    grad = regions.launch_region_loss_backward(torch.ones_like(value), x, labels, rows, *kept, NONE, CELLS)
    assert grad.flatten().tolist() == pytest.approx([-2e11, 2e11, 0, 0, 2e-9], rel=1e-6)


@pytest.mark.usefixtures("gpu_blocks")
def test_losses_at_gpu_block_sizes(monkeypatch):
    monkeypatch.setattr(regions, "ROWS_BLOCK", 2)  # several steps over the rows,
    monkeypatch.setattr(regions, "SAMPLES_BLOCK", 2)  # over the samples of a class,
    monkeypatch.setattr(regions, "CLEAR_BLOCK", 8)
    monkeypatch.setattr(regions, "SUMS_PROGRAMS", 3)  # and over the blocks of a sample
    monkeypatch.setattr(regions, "SUMS_BLOCK", 32)
    monkeypatch.setattr(regions, "GRADIENT_BLOCK", 64)
    for kind, numbers in KINDS.values():
        assert_loss(draw_case((4, 3, 5, 11), kind=kind), SIGMOID, kind, numbers)


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("name", ["blob", "cells", "false"])
def test_losses_of_programs_at_once(monkeypatch, name):
    monkeypatch.setattr(regions, "SUMS_BLOCK", 32)
    kind, numbers = KINDS[name]
    assert_loss(draw_case((2, 3, 5, 11), kind=kind), SIGMOID, kind, numbers)


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("asked", [False, True])
def test_losses_are_deterministic_if_asked(monkeypatch, asked):
    monkeypatch.setattr(blocks, "deterministic", lambda: asked)
    monkeypatch.setattr(regions, "SUMS_BLOCK", 16)
    kind, numbers = KINDS["cells"]
    x, labels, rows, counts, _ = draw_case((1, 5, 8, 16), kind=kind)
    runs = [
        regions.launch_region_loss(x, labels, rows.clamp(max=1), counts, None, SIGMOID, kind, numbers, 1, 8)[1][0, 1]
        for _ in range(6)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs) == asked


def test_a_table_is_touched_where_it_is_used():
    x, labels, rows, counts, _ = draw_case((2, 3, 5, 7))
    _, slopes, _ = regions.launch_region_loss(x, labels, rows, counts, None, SIGMOID, *KINDS["blob"], 1, 50)
    for table, count in zip(slopes, counts.tolist(), strict=True):
        assert table[: count + 1].isfinite().all()
        assert table[count + 1 :].isnan().all()  # poison
