"""Each launcher of `kernels/` against drawn truths, and against a plain statement of what it computes."""

import importlib
import os

import numpy as np
import pytest
import torch
from scipy import ndimage

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from triton_instance_loss.kernels import blocks, centers, components, numbering, proximity, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**31 - 1
# Of a gradient, relative to its largest: ours is rounded once, the plain one adds ten terms in the precision of a.
GRADIENT_ERRORS = {torch.float32: 2e-6, torch.float64: 1e-14}
# 3D, 2D as D = 1, a line and a single voxel: odd, so co-prime with cells and blocks.
SHAPES = [(2, 5, 7, 9), (1, 1, 13, 11), (3, 1, 1, 1), (1, 1, 1, 17), (1, 11, 1, 3)]


@pytest.fixture(autouse=True)
def _poison():
    """Fill what `torch.empty` returns with NaN and the largest integers, so that no test passes by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu_blocks(monkeypatch):
    """Programs as small as on a GPU, so that instances cross them."""
    monkeypatch.setattr(blocks, "INTERPRETED", False)
    monkeypatch.setattr(blocks, "TABLE_PROGRAMS", 3)


@pytest.fixture(params=[0, 1])
def any_order(request, monkeypatch, gpu_blocks):
    """Programs as on a GPU, run in a random order: first or last, none of them may count on another one."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has its own order")
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    set_grid_idx, random = builder.set_grid_idx, np.random.default_rng(request.param)
    orders = {}

    def shuffled(x, y, z):
        grid = tuple(builder.grid_dim)
        if (x, y, z) == (0, 0, 0):
            orders[grid] = random.permutation(int(np.prod(grid)))
        index = orders[grid][np.ravel_multi_index((x, y, z), grid)]
        set_grid_idx(*map(int, np.unravel_index(index, grid)))

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)


def draw(*layers):
    """A mask (1, D, H, W) from drawings, one string a layer: '#' is foreground."""
    rows = [[[c == "#" for c in row] for row in layer.split()] for layer in layers]
    return torch.tensor(rows, device=DEVICE)[None]


def random_mask(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < density).to(DEVICE)


def spiral(n):
    """A path of one voxel that winds inwards, its windings one voxel apart."""
    mask = np.zeros((n, n), bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0] = True
    turns = 0
    while turns < 2:
        ahead = y + 2 * dy, x + 2 * dx
        blocked = not (0 <= y + dy < n and 0 <= x + dx < n)
        blocked |= 0 <= ahead[0] < n and 0 <= ahead[1] < n and mask[ahead]
        if blocked:
            dy, dx, turns = dx, -dy, turns + 1
            continue
        y, x, turns = y + dy, x + dx, 0
        mask[y, x] = True
    return mask


def plain_ids(mask):
    """Largest linear index + 1 of each component, by scipy."""
    ids = np.zeros(mask.shape, np.int32)
    for b, volume in enumerate(mask.cpu().numpy()):
        labels, n = ndimage.label(volume, np.ones((3, 3, 3)))
        index = np.arange(1, volume.size + 1).reshape(volume.shape)
        for i in range(1, n + 1):
            ids[b][labels == i] = index[labels == i].max()
    return torch.from_numpy(ids).to(mask.device)


def plain_pooling(mask, rounds):
    """Rounds of max-pooling of the ids inside the mask."""
    index = torch.arange(1, mask[0].numel() + 1, device=mask.device).view(mask.shape[1:])
    ids = (mask * index).double()
    for _ in range(rounds):
        ids = torch.nn.functional.max_pool3d(ids, 3, 1, 1) * mask
    return ids.int()


def plain_instances(ids, min_size, capacity):
    """Row map, counts and geometry of ids, one instance after the other."""
    rows = torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
    counts = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    geometry = torch.tensor([0] * 4 + [FAR] * 3 + [-1] * 3, device=ids.device).repeat(ids.shape[0], capacity, 1)
    for b, volume in enumerate(ids):
        for i in volume.unique():
            where = (volume == i).nonzero()
            if i > 0 and len(where) > min_size:
                line = [torch.tensor([len(where)], device=ids.device), where.sum(0), where.amin(0), where.amax(0)]
                geometry[b, counts[b]] = torch.cat(line)
                counts[b] += 1
                rows[b][volume == i] = counts[b]
    return rows, counts, geometry


def assert_same(result, expected):
    """Equal in value, dtype and shape, one by one."""
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# --- components ------------------------------------------------------------------------------------------------------


def test_components_drawn():
    mask = draw("##.. ...# ...#", ".... .... #...")
    expected = torch.tensor([[[2, 2, 0, 0], [0, 0, 0, 12], [0, 0, 0, 12]], [[0] * 4, [0] * 4, [21, 0, 0, 0]]])
    assert torch.equal(components.launch_components(mask, 0).cpu(), expected[None].int())


def test_components_touch_through_corners():
    mask = draw("#.. ... ...", "... .#. ...", "... ... ..#")
    assert torch.equal(components.launch_components(mask, 0), mask * torch.tensor(27, dtype=torch.int32))


def test_components_of_voxel_zero():
    mask = draw("#.. ... ..#")
    assert components.launch_components(mask, 0).flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 9]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0, 0.12, 0.3, 1])
def test_components_random(shape, density):
    mask = random_mask(shape, density)
    assert_same([components.launch_components(mask, 0)], [plain_ids(mask)])


@pytest.mark.parametrize("shape", [(2, 3, 6, 9), (1, 1, 15, 17)])
@pytest.mark.parametrize("density", [0.15, 0.35])
@pytest.mark.usefixtures("gpu_blocks")
def test_components_at_gpu_block_sizes(shape, density):
    mask = random_mask(shape, density)
    ids = components.launch_components(mask, 0)
    assert_same([ids], [plain_ids(mask)])
    assert_same(numbering.number(ids, 1, 30), plain_instances(ids, 1, 30))
    assert_same([components.launch_components(mask, 2)], [plain_pooling(mask, 2)])


def patterns():
    """Masks that are hard on a labeller: long paths, many joins, nothing but diagonals."""
    z, y, x = np.indices((5, 6, 7))
    comb = (y == 0) | (x % 2 == 0)
    return {
        "checkerboard": (z + y + x) % 2 == 0,
        "separate": (z % 2 == 0) & (y % 2 == 0) & (x % 2 == 0),
        "comb": comb,
        "comb_upside_down": comb[:, ::-1].copy(),
        "spiral": spiral(17)[None],
        "spiral_from_inside": spiral(17)[None, ::-1, ::-1].copy(),
        "standing_spiral": spiral(11)[:, :, None],
    }


@pytest.mark.parametrize("name", patterns())
def test_components_patterns(name):
    mask = torch.from_numpy(patterns()[name])[None].to(DEVICE)
    assert_same([components.launch_components(mask, 0)], [plain_ids(mask)])


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 1, 13, 11)])
def test_bounded_components(shape, rounds):
    mask = random_mask(shape, 0.3)
    assert_same([components.launch_components(mask, rounds)], [plain_pooling(mask, rounds)])


def test_bounded_components_end_early():
    mask = torch.from_numpy(spiral(7))[None, None].to(DEVICE)
    for rounds in (24, 25, 10**9):  # both buffers hold the result, whichever the last round writes
        expected = plain_pooling(mask, min(rounds, 100))
        assert_same([components.launch_components(mask, rounds)], [expected])
    assert_same([expected], [plain_ids(mask)])


@pytest.mark.parametrize("name", ["comb", "spiral"])
@pytest.mark.usefixtures("any_order")
def test_components_in_any_order(name):
    mask = torch.from_numpy(patterns()[name])[None].to(DEVICE)
    ids = components.launch_components(mask, 0)
    assert_same([ids], [plain_ids(mask)])
    assert_same([components.launch_components(mask, 3)], [plain_pooling(mask, 3)])
    assert_same(numbering.number(ids, 2, 9), plain_instances(ids, 2, 9))


def test_components_without_voxels():
    for shape in [(0, 3, 3, 3), (2, 3, 0, 3)]:
        for rounds in (0, 2):
            mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
            assert components.launch_components(mask, rounds).shape == shape
            rows, counts, geometry = components.launch_find_instances(mask, rounds, 0, 2)
            assert rows.shape == shape
            assert counts.tolist() == [0] * shape[0]
            assert geometry.tolist() == [[[0] * 4 + [FAR] * 3 + [-1] * 3] * 2] * shape[0]


# --- instances -------------------------------------------------------------------------------------------------------


def test_find_instances_drawn():
    mask = draw("##.. ...# #..#")
    rows, counts, geometry = components.launch_find_instances(mask, 0, 1, 3)
    assert rows.flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2]  # the single voxel is too small
    assert counts.tolist() == [2]
    assert geometry[0].tolist() == [
        [2, 0, 0, 1, 0, 0, 0, 0, 0, 1],
        [2, 0, 3, 6, 0, 1, 3, 0, 2, 3],
        [0, 0, 0, 0, FAR, FAR, FAR, -1, -1, -1],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "min_size", "rounds"), [(0.15, 0, 0), (0.2, 2, 0), (0.3, 1, 1), (0, 0, 0)])
def test_find_instances_random(shape, density, min_size, rounds):
    mask = random_mask(shape, density)
    capacity = int(np.prod(shape[1:]))
    expected = plain_instances(plain_pooling(mask, rounds) if rounds else plain_ids(mask), min_size, capacity)
    assert_same(components.launch_find_instances(mask, rounds, min_size, capacity), expected)


def test_number_instances_drawn():
    ids = torch.tensor([[[[7, 0, 7], [2**63 - 1, 3, 3]]], [[[0, 1, 0], [0, 0, 2**40]]]], device=DEVICE)
    rows, counts, geometry = components.launch_number_instances(ids, 0, 3)
    assert rows.flatten(1).tolist() == [[2, 0, 2, 3, 1, 1], [0, 1, 0, 0, 0, 2]]
    assert counts.tolist() == [3, 2]
    assert geometry[0, 1].tolist() == [2, 0, 0, 2, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_size", [0, 2])
def test_number_instances_random(shape, min_size):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30, shape, generator=generator).to(DEVICE)
    ids = torch.where(ids < 20, 0, ids * (2**63 // 31))
    assert_same(components.launch_number_instances(ids, min_size, 12), plain_instances(ids, min_size, 12))


def test_more_instances_than_promised_stay_in_range():
    mask = torch.from_numpy(patterns()["separate"])[None].to(DEVICE)
    whole = components.launch_find_instances(mask, 0, 0, 36)
    rows, counts, geometry = components.launch_find_instances(mask, 0, 0, 5)
    assert_same([rows, counts, geometry], [whole[0], whole[1], whole[2][:, :5]])


# --- sums ------------------------------------------------------------------------------------------------------------


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


# --- centres and proximity -------------------------------------------------------------------------------------------


def random_geometry(shape, counts, capacity, seed=0):
    """Geometry of boxes filled with voxels at random, `counts` rows of it used."""
    rng = np.random.default_rng(seed)
    geometry = torch.tensor([0] * 4 + [FAR] * 3 + [-1] * 3).repeat(len(counts), capacity, 1)
    for b, count in enumerate(counts):
        for row in range(count):
            voxels = np.stack([rng.integers(low := rng.integers(d), min(low + 4, d), 5) for d in shape], 1)
            line = [[5], voxels.sum(0), voxels.min(0), voxels.max(0)]
            geometry[b, row] = torch.from_numpy(np.concatenate(line))
    return geometry.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE)


def plain_owner(geometry, counts, shape, offsets):
    """Largest row whose centre box covers a voxel, drawn box by box."""
    owner = torch.zeros((len(counts), *shape), dtype=torch.int32, device=geometry.device)
    for b, count in enumerate(counts.tolist()):
        for row in range(count):
            size, *sums = geometry[b, row, :4].tolist()
            centers = [-(-s // size) for s in sums]
            box = [slice(max(c - o - 1, 0), max(c + o, 0)) for c, o in zip(centers, offsets, strict=True)]
            owner[b][tuple(box)] = row + 1
    return owner


GEOMETRIES = [
    ((5, 9, 11), (1, 2, 2), [4, 0], [3, 2]),
    ((1, 13, 9), (1, 3, 3), [5], [0]),
    ((7, 6, 5), (9, 9, 9), [0, 7, 2], [2, 9, 0]),
    ((4, 7, 6), (0, 0, 0), [6], [6]),
]


@pytest.mark.parametrize(("shape", "offsets", "kept", "num_labels"), GEOMETRIES)
@pytest.mark.parametrize("small", [False, True], ids=["one_block", "gpu_blocks"])
def test_centers(shape, offsets, kept, num_labels, small, request):
    if small:
        request.getfixturevalue("gpu_blocks")
    out_geometry, kept = random_geometry(shape, kept, 7, seed=1)
    lab_geometry, num_labels = random_geometry(shape, num_labels, 9, seed=2)
    out_owner = plain_owner(out_geometry, kept, shape, offsets)
    covered = plain_owner(lab_geometry, num_labels, shape, offsets) > 0
    sides = (out_geometry, lab_geometry, kept, num_labels, list(shape), list(offsets))
    assert_same(centers.launch_center_volumes(*sides), [out_owner, covered])
    rows = torch.arange(1, 8, device=DEVICE).view(-1, 1, 1, 1, 1)
    owned = torch.stack([((out_owner == rows) & (covered == side)).sum((2, 3, 4)).T for side in (False, True)], -1)
    assert_same(centers.launch_center_overlaps(*sides), [owned, (covered & (out_owner == 0)).sum((1, 2, 3))])


def test_centers_drawn():
    # voxels at x = 1, 2 and 4: the mean 7/3 is rounded up to 3, and with offset 1 the box is [1, 4)
    geometry = torch.tensor([[[3, 0, 0, 7, 0, 0, 1, 0, 0, 4]]], device=DEVICE)
    one, none = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (1, 0))
    owner, covered = centers.launch_center_volumes(geometry, geometry, one, none, [1, 1, 6], [1, 1, 1])
    assert owner.flatten().tolist() == [0, 1, 1, 1, 0, 0]
    assert not covered.any()
    owned, alone = centers.launch_center_overlaps(geometry, geometry, one, none, [1, 1, 6], [1, 1, 1])
    assert (owned.tolist(), alone.tolist()) == ([[[3, 0]]], [0])


def plain_boxes(geometry, count, shape, planar):
    """Bounds of the extended boxes, or of the one in the middle, (n, 3) each; planar leaves out the first axis."""
    lows, highs = geometry[:count, 4:7], geometry[:count, 7:10]
    dims = torch.tensor(shape, device=geometry.device)
    extent = (highs - lows).clamp(min=1)
    lows, highs = (lows - extent - 1).clamp(min=0), torch.minimum(highs + extent, dims)
    if count == 0:
        lows, highs = (dims // 2 - 1)[None], (dims // 2 + 1)[None]
    return lows[:, planar:].double(), highs[:, planar:].double()


def plain_diou(lows, highs, other_lows, other_highs):
    """DIoU of each box with each other box, (n, m)."""
    lows, highs, other_lows, other_highs = lows[:, None], highs[:, None], other_lows[None], other_highs[None]
    shared = (torch.minimum(highs, other_highs) - torch.maximum(lows, other_lows)).clamp(min=0).prod(-1)
    union = (highs - lows).prod(-1) + (other_highs - other_lows).prod(-1) - shared
    centers = lows + ((highs - lows) / 2).ceil() - other_lows - ((other_highs - other_lows) / 2).ceil()
    around = torch.maximum(highs, other_highs) - torch.minimum(lows, other_lows)
    return 1 - shared / union + (centers**2).sum(-1) / ((around**2).sum(-1) + 1e-7)


@pytest.mark.parametrize(("shape", "offsets", "kept", "num_labels"), GEOMETRIES)
@pytest.mark.parametrize("planar", [False, True])
def test_proximity(shape, offsets, kept, num_labels, planar):
    out_geometry, kept = random_geometry(shape, kept, 7, seed=1)
    lab_geometry, num_labels = random_geometry(shape, num_labels, 9, seed=2)
    ours = proximity.launch_proximity_minima(out_geometry, lab_geometry, kept, num_labels, list(shape), planar)
    expected = [torch.zeros_like(t) for t in ours]
    for b in range(len(kept)):
        diou = plain_diou(
            *plain_boxes(out_geometry[b], int(kept[b]), shape, planar),
            *plain_boxes(lab_geometry[b], int(num_labels[b]), shape, planar),
        )
        expected[0][b, : diou.shape[0]], expected[1][b, : diou.shape[1]] = diou.amin(1), diou.amin(0)
    torch.testing.assert_close(ours, tuple(expected), rtol=1e-14, atol=1e-14)


def test_proximity_drawn():
    # bounds [2, 3]: extent 1, extended to [0, 4) with centre 2; against the middle [3, 5), centre 4: IoU 1/5, 2^2 / 5^2
    geometry = torch.tensor([[[2, 0, 0, 5, 0, 0, 2, 0, 0, 3]]], device=DEVICE)
    one, none = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (1, 0))
    to_label, to_output = proximity.launch_proximity_minima(geometry, geometry, one, none, [1, 1, 8], True)
    # along the axis of length 1 the instance has [0, 1), the middle [-1, 1); their centres are 1 and 0
    expected = 1 - 1 / (4 + 4 - 1) + (4 + 1) / (25 + 4)
    assert to_label.tolist() == to_output.tolist() == [[pytest.approx(expected, abs=1e-9)]]


@pytest.mark.usefixtures("gpu_blocks")
def test_proximity_of_many():
    shape, counts = (30, 40, 50), [130]
    out_geometry, kept = random_geometry(shape, [3], 3, seed=1)
    lab_geometry, num_labels = random_geometry(shape, counts, 4000, seed=2)
    ours = proximity.launch_proximity_minima(out_geometry, lab_geometry, kept, num_labels, list(shape), False)
    diou = plain_diou(*plain_boxes(out_geometry[0], 3, shape, 0), *plain_boxes(lab_geometry[0], 130, shape, 0))
    torch.testing.assert_close(ours[0][0], diou.amin(1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours[1][0, :130], diou.amin(0), rtol=1e-14, atol=1e-14)
    assert ours[1].count_nonzero() == 130
