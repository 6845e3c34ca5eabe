"""The map of cells: drawn ones, brute force on random maps, ties, planes, and what is not there."""

import pytest
import torch
from component_reference import reference_cells

from triton_instance_loss import ops


def drawn(text):
    """Rows drawn as digits, a dot for background, as a volume of one plane."""
    rows = [[0 if mark == "." else int(mark) for mark in line.split()] for line in text.strip().splitlines()]
    return torch.tensor(rows, dtype=torch.int32)[None, None]


def cells(rows, device, spacing=(1.0, 1.0, 1.0)):
    return ops.cells(rows.to(device), list(spacing)).cpu()


def test_drawn(backend):
    rows = drawn("""
        1 . . . . . 2
        . . . . . . .
        . . . . . . .
        . . . 3 . . .
    """)
    expected = drawn("""
        1 1 1 3 2 2 2
        1 1 3 3 3 2 2
        1 3 3 3 3 3 2
        3 3 3 3 3 3 3
    """)  # 3 has the larger row where all are equally near, as in the middle of the first line
    assert torch.equal(cells(rows, backend), expected)


def test_spacing_decides(backend):
    rows = drawn("""
        1 . . .
        . . . .
        . . . 2
    """)
    alike = drawn("""
        1 1 1 2
        1 1 2 2
        1 2 2 2
    """)
    flat = drawn("""
        1 1 2 2
        1 1 2 2
        1 1 2 2
    """)
    tall = drawn("""
        1 1 1 1
        1 1 2 2
        2 2 2 2
    """)
    assert torch.equal(cells(rows, backend), alike)
    assert torch.equal(cells(rows, backend, (7.0, 0.1, 1.0)), flat)
    assert torch.equal(cells(rows, backend, (7.0, 1.0, 0.1)), tall)


def test_ties_go_to_the_larger_row(backend):
    assert cells(drawn("2 . 1"), backend).flatten().tolist() == [2, 2, 1]
    assert cells(drawn("1 . 2"), backend).flatten().tolist() == [1, 2, 2]
    corners = drawn("""
        4 . 1
        . . .
        2 . 3
    """)
    assert cells(corners, backend)[0, 0, 1].tolist() == [4, 4, 3]
    assert cells(corners.view(1, 3, 3, 1), backend).flatten().tolist()[3:6] == [4, 4, 3]


def test_nothing_and_everything(backend):
    rows = torch.zeros(3, 2, 3, 4, dtype=torch.int32)
    rows[1] = 5
    rows[2, 1, 2, 3] = 7
    found = cells(rows, backend)
    assert not found[0].any()
    assert (found[1] == 5).all()
    assert (found[2] == 7).all()


def test_below_zero_is_nothing(backend):
    rows = drawn("1 . -1 . 2".replace("-1", "9"))
    rows[rows == 9] = -1
    assert cells(rows, backend).flatten().tolist() == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9), (9, 1, 5), (5, 6, 1), (5, 7, 6), (17, 3, 2)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 2.5, 2.5), (3.0, 1.0, 0.5), (0.7, 1.37, 0.83)])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_brute_force(backend, shape, spacing, share, poison):
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randint(1, 6, (2, *shape), generator=generator, dtype=torch.int32)
    rows *= torch.rand(rows.shape, generator=generator) < share
    # (where steps are no binary fractions, equally near is a matter of rounding: no two instances then)
    if spacing == (0.7, 1.37, 0.83):
        rows.clamp_(max=1)
    expected = torch.stack([reference_cells(each, spacing) for each in rows])
    assert torch.equal(cells(rows, backend, spacing), expected)


def test_large_volumes_take_exact_distances(backend):
    """Beyond 2^24 squared voxels float32 no longer counts; nearly equally near is not equally near."""
    rows = torch.zeros(1, 1, 2, 6001, dtype=torch.int32)
    rows[0, 0, 0, 0], rows[0, 0, 1, 6000] = 1, 2
    found = cells(rows, backend)[0, 0]
    assert found[0, 2998:3003].tolist() == [1, 1, 1, 2, 2]
    assert found[1, 2998:3003].tolist() == [1, 1, 2, 2, 2]
