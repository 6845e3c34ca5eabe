"""Labelling and numbering kernels against drawn truths, and against a plain statement of what they compute."""

import numpy as np
import pytest
import torch
from kernel_cases import (
    DEVICE,
    SHAPES,
    assert_same,
    assert_same_instances,
    draw,
    plain_ids,
    plain_instances,
    plain_pooling,
    random_mask,
    spiral,
)

pytest.importorskip("triton")

from triton_instance_loss.kernels import components, nodes, numbering

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def small_blocks(gpu_blocks, monkeypatch):
    """So few voxels a program that a small sample takes many of them; one for each thread, as few as are allowed."""
    monkeypatch.setattr(numbering, "REDUCE_BLOCK", 32)


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
    assert_same_instances(numbering.number(ids.clone(), 1, 30), 30, plain_instances(ids, 1, 30))
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
@pytest.mark.usefixtures("interleaved")
def test_components_at_once(name):
    mask = torch.from_numpy(patterns()[name])[None].to(DEVICE)
    ids = components.launch_components(mask, 0)
    assert_same([ids], [plain_ids(mask)])
    assert_same([components.launch_components(mask, 3)], [plain_pooling(mask, 3)])
    assert_same_instances(numbering.number(ids.clone(), 2, 9), 9, plain_instances(ids, 2, 9))


def test_components_without_voxels():
    for shape in [(0, 3, 3, 3), (2, 3, 0, 3)]:
        for rounds in (0, 2):
            mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
            assert components.launch_components(mask, rounds).shape == shape
            rows, counts, geometry = components.launch_find_instances(mask, rounds, 0, 2)
            assert rows.shape == shape
            assert counts.tolist() == [0] * shape[0]
            assert geometry.shape == (shape[0], 2, 10)


# --- instances -------------------------------------------------------------------------------------------------------


def test_find_instances_drawn():
    mask = draw("##.. ...# #..#")
    rows, counts, geometry = components.launch_find_instances(mask, 0, 1, 3)
    assert rows.flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2]  # the single voxel is too small
    assert counts.tolist() == [2]
    assert geometry[0, :2].tolist() == [[2, 0, 0, 1, 0, 0, 0, 0, 0, 1], [2, 0, 3, 6, 0, 1, 3, 0, 2, 3]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "min_size", "rounds"), [(0.15, 0, 0), (0.2, 2, 0), (0.3, 1, 1), (0, 0, 0)])
def test_find_instances_random(shape, density, min_size, rounds):
    mask = random_mask(shape, density)
    capacity = int(np.prod(shape[1:]))
    expected = plain_instances(plain_pooling(mask, rounds) if rounds else plain_ids(mask), min_size, capacity)
    assert_same_instances(components.launch_find_instances(mask, rounds, min_size, capacity), capacity, expected)


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
    expected = plain_instances(ids, min_size, 12)
    assert_same_instances(components.launch_number_instances(ids, min_size, 12), 12, expected)


def test_components_are_numbered_in_place():
    parents = torch.tensor([[0, 2, 0, 4, 0, 0], [0, 2, 0, 4, 0, 6], [0] * 6], dtype=torch.int32, device=DEVICE)
    parents = parents.view(3, 1, 1, 6)
    of_bytes = torch.tensor([[3, 2, 0], [2, 2, 2], [0, 0, 0]], dtype=torch.uint8, device=DEVICE)
    roots = torch.tensor([[2], [3], [0]], dtype=torch.int32, device=DEVICE)
    rows, counts, geometry = numbering.number_components(nodes.Cells(of_bytes, parents), roots, 3)
    assert rows.flatten(1).tolist() == [[1, 1, 0, 2, 0, 0], [0, 1, 0, 2, 0, 3], [0] * 6]
    assert rows.data_ptr() == parents.data_ptr()
    assert counts.tolist() == [2, 3, 0]
    assert geometry[0, :2].tolist() == [[2, 0, 0, 1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 3, 0, 0, 3, 0, 0, 3]]
    assert geometry[1].tolist() == [[1, 0, 0, x, 0, 0, x, 0, 0, x] for x in (1, 3, 5)]


def test_find_instances_drawn_without_smallest_size():
    rows, counts, geometry = components.launch_find_instances(draw("##.. ...# #..#"), 0, 0, 4)
    assert rows.flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 3, 2, 0, 0, 3]
    assert counts.tolist() == [3]
    assert geometry[0, 1:3].tolist() == [[1, 0, 2, 0, 0, 2, 0, 0, 2, 0], [2, 0, 3, 6, 0, 1, 3, 0, 2, 3]]


def test_rounds_of_pooling_leave_no_roots():
    rows, counts, geometry = components.launch_find_instances(draw("######"), 1, 0, 6)
    assert rows.flatten().tolist() == [1, 2, 3, 4, 5, 5]  # of the ids 2, 3, 4, 5, 6, 6, one by one in the next's place
    assert counts.tolist() == [5]
    assert geometry[0, :5, 0].tolist() == [1, 1, 1, 1, 2]


@pytest.mark.usefixtures("small_blocks", "interleaved")
def test_root_far_from_its_voxels():
    mask = torch.zeros(2, 1, 8, 31, dtype=torch.bool, device=DEVICE)
    mask[1, 0, 0] = mask[1, 0, :, 30] = True  # most are in the first block, the root is the last voxel of all
    mask[1, 0, 3, 10:13] = True
    rows, counts, geometry = components.launch_find_instances(mask, 0, 0, 3)
    expected = 2 * mask.int()
    expected[1, 0, 3, 10:13] = 1
    assert torch.equal(rows, expected)
    assert counts.tolist() == [0, 2]
    assert geometry[1, :2].tolist() == [[3, 0, 9, 33, 0, 3, 10, 0, 3, 12], [38, 0, 28, 675, 0, 0, 0, 0, 7, 30]]


NUMBERINGS = [(0, 0), (0, 2), (2, 0), (2, 1)]  # rounds and smallest size


def assert_numbered(shape, rounds, min_size):
    """Components, and given ids, of a random mask are what the plain statement says."""
    mask, capacity = random_mask(shape, 0.15), int(np.prod(shape[1:]))
    ids = plain_pooling(mask, rounds) if rounds else plain_ids(mask)
    expected = plain_instances(ids, min_size, capacity)
    assert_same_instances(components.launch_find_instances(mask, rounds, min_size, capacity), capacity, expected)
    given = ids.long() * 2**31
    assert_same_instances(components.launch_number_instances(given, min_size, capacity), capacity, expected)


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (3, 1, 13, 11)])
@pytest.mark.parametrize(("rounds", "min_size"), NUMBERINGS)
@pytest.mark.usefixtures("small_blocks")
def test_numbering_in_many_blocks(shape, rounds, min_size):
    assert_numbered(shape, rounds, min_size)


@pytest.mark.parametrize(("rounds", "min_size"), NUMBERINGS)
@pytest.mark.usefixtures("small_blocks", "interleaved")
def test_numbering_at_once(rounds, min_size):
    assert_numbered((2, 3, 7, 9), rounds, min_size)


@pytest.mark.parametrize("rounds", [0, 1])
def test_tables_that_are_too_small_stay_in_range(rounds, monkeypatch):
    mask = torch.from_numpy(patterns()["separate"])[None].repeat(2, 1, 1, 1).to(DEVICE)
    whole = components.launch_find_instances(mask, rounds, 0, 36)
    empty, surroundings = torch.empty, []

    def surrounded(size, **options):
        """A table has other memory on both sides, enough for all the lines that are not its own."""
        if options["dtype"] != torch.int64:
            return empty(size, **options)
        lines = torch.full((36 + size[0] * size[1] + 36, size[2]), 77, **options)
        surroundings.extend((lines[:36], lines[-36:]))
        return lines[36:-36].view(size)

    monkeypatch.setattr(torch, "empty", surrounded)
    rows, counts, geometry = components.launch_find_instances(mask, rounds, 0, 5)
    assert_same([rows, counts, geometry], [whole[0], whole[1], whole[2][:, :5]])
    assert counts.tolist() == [36, 36]
    assert len(surroundings) == 2
    assert all((lines == 77).all() for lines in surroundings)


def test_more_instances_than_promised_stay_in_range():
    mask = torch.from_numpy(patterns()["separate"])[None].to(DEVICE)
    whole = components.launch_find_instances(mask, 0, 0, 36)
    rows, counts, geometry = components.launch_find_instances(mask, 0, 0, 5)
    assert_same([rows, counts, geometry], [whole[0], whole[1], whole[2][:, :5]])
