"""Outputs that no label claims, by the kernels: against a plain statement, in full tables, many programs at once."""

import pytest
import torch
from kernel_cases import DEVICE, SHAPES, assert_same

pytest.importorskip("triton")

from triton_instance_loss.kernels import claims

from triton_instance_loss import ops

pytestmark = pytest.mark.usefixtures("poison")


def plain_unclaimed(out, lab, rows):
    """One label after the other; (B, rows) bool, and how many pairs touch."""
    unclaimed, most = torch.zeros((len(out), rows), dtype=torch.bool, device=out.device), 0
    for of_sample, out_rows, lab_rows in zip(unclaimed, out, lab, strict=True):
        of_sample[: int(out_rows.max().clamp(min=0))] = True
        pairs = 0
        for label in range(1, int(lab_rows.max()) + 1):
            inside = lab_rows == label
            touching = [int(row) for row in out_rows[inside].unique() if row > 0]
            pairs += len(touching)
            masks = [out_rows == row for row in touching]
            dice = [2 * (mask & inside).sum() / (mask.sum() + inside.sum()) for mask in masks]
            if touching:
                of_sample[touching[dice.index(max(dice))] - 1] = False
        most = max(most, pairs)
    return unclaimed, most


def assert_unclaimed(out, lab, rows, room=1):
    """The kernels on row maps of both sides, with so many times the slots that are needed."""
    truth, pairs = plain_unclaimed(out, lab, rows)
    counts = torch.stack([side.flatten(1).amax(1).clamp(min=0).int() for side in (out, out, lab)])
    geometry = torch.full((2 * len(out), rows, ops.GEOMETRY_COLUMNS), -1, device=DEVICE)
    names = torch.arange(1, rows + 1, device=DEVICE)
    geometry[..., ops.SIZE] = (torch.cat((out, lab)).flatten(1)[:, None] == names[:, None]).sum(2)
    sites = [torch.cat((out, lab)), torch.empty((len(out), 0), dtype=torch.int32, device=DEVICE)]
    ours = claims.launch_unclaimed(out.float(), sites, counts, geometry, max(pairs, 1) * room)
    assert_same([ours], [truth])


def row_maps(shape, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(-1, rows + 1, (2, *shape), generator=generator, dtype=torch.int32)
    maps[torch.rand(maps.shape, generator=generator) < 0.3] = 0
    return maps.to(DEVICE)


def test_drawn():
    """A label claims the output that fits it best, and not the larger one; of equals the first; others are false."""
    out = torch.tensor([1, 1, 1, 1, 0, 2, 3, 0, 4, 0, 5], dtype=torch.int32, device=DEVICE).view(1, 1, 1, -1)
    lab = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 0, 3, 0], dtype=torch.int32, device=DEVICE).view(1, 1, 1, -1)
    geometry = torch.zeros((2, 6, ops.GEOMETRY_COLUMNS), dtype=torch.int64, device=DEVICE)
    geometry[:, :, ops.SIZE] = torch.tensor([[4, 1, 1, 1, 1, 9], [3, 3, 1, 9, 9, 9]])
    counts = torch.tensor([[5], [5], [3]], dtype=torch.int32, device=DEVICE)
    sites = [torch.cat((out, lab)), torch.empty((1, 0), dtype=torch.int32, device=DEVICE)]
    ours = claims.launch_unclaimed(out.float(), sites, counts, geometry, 8)
    assert ours.tolist() == [[False, False, True, True, True, False]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("room", [1, 4])
def test_random(shape, rows, room):
    assert_unclaimed(*row_maps(shape, rows, rows), rows, room)


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("seed", range(3))
def test_at_once(seed):
    assert_unclaimed(*row_maps((2, 4, 9, 11), 12, seed), 12)


def test_nothing():
    """No sample, no room for a row, no voxel."""
    for batch, rows, shape in ((0, 3, (2, 3, 4)), (2, 0, (2, 3, 4)), (2, 3, (2, 0, 4))):
        geometry = torch.zeros((2 * batch, rows, ops.GEOMETRY_COLUMNS), dtype=torch.int64, device=DEVICE)
        counts = torch.zeros((3, batch), dtype=torch.int32, device=DEVICE)
        sites = [torch.zeros((2 * batch, *shape), dtype=torch.int32, device=DEVICE)]
        x = torch.zeros((batch, *shape), device=DEVICE)
        assert claims.launch_unclaimed(x, sites, counts, geometry, 4).shape == (batch, rows)
