"""connected_components: drawn truths first, then equality with the reference on shapes that fit no block."""

import pytest
import torch
from reference import reference_components

from triton_instance_loss import connected_components
from triton_instance_loss.components import capacity_bound


def draw(text):
    return torch.tensor([[[[c == "#" for c in row] for row in text.split()]]])


DRAWN = [
    ("... ... ...", [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ("#.. ... ...", [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),  # a component that is only voxel 0 counts
    ("#.# .#. ...", [[5, 0, 5], [0, 5, 0], [0, 0, 0]]),  # corners touch
    ("#.# ... #.#", [[1, 0, 3], [0, 0, 0], [7, 0, 9]]),
    ("### ### ###", [[9, 9, 9], [9, 9, 9], [9, 9, 9]]),
]


@pytest.mark.parametrize(("text", "ids"), DRAWN)
def test_drawn(backend, text, ids):
    mask = draw(text).to(backend)
    assert connected_components(mask)[0, 0].tolist() == ids
    assert connected_components(mask[..., None])[0, 0, ..., 0].tolist() == ids
    assert connected_components(mask).dtype == torch.int32


def test_corners_touch_in_3d(backend):
    mask = torch.zeros(1, 1, 2, 2, 2, device=backend)
    mask[0, 0, 0, 0, 0] = mask[0, 0, 1, 1, 1] = 1
    assert connected_components(mask).unique().tolist() == [0, 8]


def test_rounds_of_pooling(backend):
    line = torch.ones(1, 1, 1, 6, device=backend)
    assert connected_components(line, 1)[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 6]
    assert connected_components(line, 2)[0, 0, 0].tolist() == [3, 4, 5, 6, 6, 6]
    assert connected_components(line, 5)[0, 0, 0].tolist() == [6] * 6


def test_relabel(backend):
    mask = torch.cat((draw("#.# ... #.#"), draw("... ..# #.."), torch.zeros(1, 1, 3, 3))).to(backend)
    numbers, counts = connected_components(mask, relabel=True)
    assert numbers[:, 0].tolist() == [
        [[1, 0, 2], [0, 0, 0], [3, 0, 4]],
        [[0, 0, 0], [0, 0, 1], [2, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]
    assert counts.tolist() == [4, 2, 0]
    assert numbers.dtype == counts.dtype == torch.int32


def spiral(size):
    """One component as long as a plane allows."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    start = 0
    while top <= bottom and left <= right:
        mask[top, start : right + 1] = True
        mask[top : bottom + 1, right] = True
        mask[bottom, left : right + 1] = True
        mask[top + 2 : bottom + 1, left] = True
        start = left
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
        if top <= bottom:
            mask[top, left - 1] = True
    return mask


SHAPES = [(3, 1, 11, 7), (2, 1, 5, 4, 7), (1, 1, 1, 1), (1, 1, 1, 9, 1), (2, 1, 13, 1, 3), (1, 1, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.04, 0.3, 1.0])
def test_random(backend, shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) <= density
    assert torch.equal(connected_components(mask.to(backend)).cpu().long(), reference_components(mask).long())
    for rounds in (1, 3):
        expected = reference_components(mask, rounds).long()
        assert torch.equal(connected_components(mask.to(backend), rounds).cpu().long(), expected)
    numbers, counts = connected_components(mask.to(backend), relabel=True)
    for sample, (ids, count) in enumerate(zip(reference_components(mask), counts.tolist(), strict=True)):
        kinds = ids[ids > 0].unique()
        assert len(kinds) == count <= capacity_bound(mask[:, 0].shape if mask.ndim == 5 else mask.shape, None)
        order = torch.searchsorted(kinds, ids) + 1
        assert torch.equal(numbers[sample].cpu().long(), torch.where(ids > 0, order, 0))


def test_spiral(backend):
    mask = spiral(17)[None, None]
    ids = connected_components(mask.to(backend)).cpu()
    assert torch.equal(ids.long(), reference_components(mask).long())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_any_dtype_is_a_mask(dtype):
    mask = torch.tensor([[[[0, 1, 0, 1]]]]).to(dtype)
    assert connected_components(mask).tolist() == [[[[0, 2, 0, 4]]]]
    if dtype != torch.bool:
        with pytest.raises(ValueError, match=r"mask must be 0 or 1 .*, got 3(.0)? among them. .* give mask > 0"):
            connected_components(mask * 3)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 1, 9, 14, 11), (2, 1, 37, 29), (2, 1, 1, 1, 50), (2, 1, 50, 1, 1)])
def test_noise(density, shape):
    """Few runs and many, that meet at once or late: each line and each plane begins anew."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    assert torch.equal(connected_components(mask).long(), reference_components(mask).long())
