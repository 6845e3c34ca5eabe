"""The kernels of centre boxes and distances against drawn truths, and against a plain statement."""

import itertools

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, FAR, assert_same, boxes, used

pytest.importorskip("triton")

from triton_instance_loss.kernels import centers, prepare

pytestmark = pytest.mark.usefixtures("poison")


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


def two_sides(shape, kept, num_labels, capacity=9):
    """Geometry of both sides, and counts, of which those of all outputs are not asked for."""
    geometry, used = random_geometry(shape, kept + num_labels, capacity)
    return geometry, torch.cat((torch.full_like(used[: len(kept)], -1), used)).view(3, -1)


def assert_overlaps(sides, owners):
    """Counts of each row against the owners of both sides, (2 B, D, H, W)."""
    geometry, counts, *_ = sides
    rows = torch.arange(1, geometry.shape[1] + 1, device=DEVICE).view(-1, 1, 1, 1, 1)
    others = owners.roll(len(owners) // 2, 0) > 0
    owned = torch.stack([((owners == rows) & (others == side)).sum((2, 3, 4)).T for side in (False, True)], -1)
    assert_same([used(boxes(*sides)[0], counts[1:])], [owned])


@pytest.mark.parametrize(("shape", "offsets", "kept", "num_labels"), GEOMETRIES)
@pytest.mark.parametrize("small", [False, True], ids=["one_block", "gpu_blocks"])
def test_centers(shape, offsets, kept, num_labels, small, request):
    if small:
        request.getfixturevalue("gpu_blocks")
    geometry, counts = two_sides(shape, kept, num_labels)
    owners = plain_owner(geometry, counts[1:].flatten(), shape, offsets)
    out_owner, lab_owner = owners.chunk(2)
    sides = (geometry, counts, list(shape), list(offsets))
    assert_same(centers.launch_center_volumes(*sides), [out_owner, lab_owner > 0])
    assert_overlaps(sides, owners)


def test_centers_drawn():
    # voxels at x = 1, 2 and 4: the mean 7/3 is rounded up to 3, and with offset 1 the box is [1, 4)
    geometry = torch.tensor([[[3, 0, 0, 7, 0, 0, 1, 0, 0, 4]]], device=DEVICE).repeat(2, 1, 1)
    counts = torch.tensor([[5], [1], [0]], dtype=torch.int32, device=DEVICE)
    owner, covered = centers.launch_center_volumes(geometry, counts, [1, 1, 6], [1, 1, 1])
    assert owner.flatten().tolist() == [0, 1, 1, 1, 0, 0]
    assert not covered.any()
    owned = boxes(geometry, counts, [1, 1, 6], [1, 1, 1])[0]
    assert owned[0].tolist() == [[3, 0]]


def of_centers(*positions):
    """Lines of geometry of instances of one voxel."""
    return torch.tensor([[1, *position, *position, *position] for position in positions], device=DEVICE)


def test_center_overlaps_drawn():
    # x         0 1 2 3 4 5 6 7 8    with offset 1 a box is [c - 2, c + 1), and the largest row wins
    # outputs   . 1 1 3 3 3 2 2 .    [1, 4), [5, 8), [3, 6)
    # labels    . . 1 1 1 . 2 2 2    [2, 5), [6, 9)
    geometry = torch.zeros((2, 3, 10), dtype=torch.int64, device=DEVICE)
    geometry[0] = of_centers((0, 0, 3), (0, 0, 7), (0, 0, 5))
    geometry[1, :2] = of_centers((0, 0, 4), (0, 0, 8))
    counts = torch.tensor([[3], [3], [2]], dtype=torch.int32, device=DEVICE)
    owned = boxes(geometry, counts, [1, 1, 9], [1, 1, 1])[0]
    assert owned[0].tolist() == [[1, 1], [0, 2], [1, 2]]
    assert owned[1, :2].tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("offset", [0, 1, 3, 9, 2**31 - 1])
def test_centers_at_every_border(offset):
    """Boxes around all corners against one around the middle: clipped on each side, up to the whole volume."""
    shape, offsets = [4, 3, 5], [offset] * 3
    corners = of_centers(*itertools.product(*((0, dim - 1) for dim in shape)))
    geometry = torch.stack((corners, of_centers((2, 1, 2)).expand(8, -1)))
    counts = torch.tensor([[8], [8], [1]], dtype=torch.int32, device=DEVICE)
    owners = plain_owner(geometry, counts[1:].flatten(), shape, offsets)
    sides = (geometry, counts, shape, offsets)
    assert_same(centers.launch_center_volumes(*sides), [owners[:1], owners[1:] > 0])
    assert_overlaps(sides, owners)


CROWDS = [
    ((5, 9, 11), (1, 2, 1), [13, 2], [6, 9], 13),
    ((1, 17, 13), (1, 3, 2), [15, 0, 3], [4, 11, 0], 15),
    ((7, 6, 5), (3, 9, 1), [7], [10], 10),
    ((6, 8, 7), (1, 1, 1), [5, 19], [18, 3], 7),
]


def assert_many(monkeypatch, shape, offsets, kept, num_labels, capacity):
    """Overlaps against the painted volumes, in blocks that boxes and tables are larger than."""
    monkeypatch.setattr(prepare, "BOX_BLOCK", 16)
    monkeypatch.setattr(prepare, "OTHERS_BLOCK", 4)
    geometry, counts = two_sides(shape, kept, num_labels, capacity=20)
    sides = (geometry[:, :capacity].contiguous(), counts, list(shape), list(offsets))  # counts may say more rows
    swapped = (sides[0].roll(len(kept), 0), counts[[0, 2, 1]], *sides[2:])
    (out_owner, in_label), (lab_owner, in_output) = (centers.launch_center_volumes(*both) for both in (sides, swapped))
    assert_same([in_label, in_output], [lab_owner > 0, out_owner > 0])
    assert_overlaps(sides, torch.cat((out_owner, lab_owner)))


@pytest.mark.parametrize("case", CROWDS)
@pytest.mark.usefixtures("gpu_blocks")
def test_centers_of_many(case, monkeypatch):
    assert_many(monkeypatch, *case)


@pytest.mark.usefixtures("interleaved")
def test_centers_of_many_at_once(monkeypatch):
    assert_many(monkeypatch, *CROWDS[0])


def test_centers_of_nothing():
    """No sample, no room for a row, no voxel."""
    for batch, capacity, shape in ((0, 3, [2, 3, 4]), (2, 0, [2, 3, 4]), (2, 3, [2, 0, 4])):
        geometry = torch.zeros((2 * batch, capacity, 10), dtype=torch.int64, device=DEVICE)
        sides = (geometry, torch.zeros((3, batch), dtype=torch.int32, device=DEVICE), shape, [1, 1, 1])
        assert boxes(*sides)[0].shape == (2 * batch, capacity, 2)
        owner, covered = centers.launch_center_volumes(*sides)
        assert owner.shape == covered.shape == (batch, *shape)
        assert not owner.any()


def plain_boxes(geometry, count, shape, planar):
    """Bounds of the extended boxes, or of the one in the middle, (n, 3) each; planar leaves out the first axis."""
    lows, highs = geometry[:count, 4:7], geometry[:count, 7:10]
    dims = torch.tensor(shape, device=geometry.device)
    extent = (highs - lows).clamp(min=1)
    lows, highs = (lows - extent - 1).clamp(min=0), torch.minimum(highs + extent, dims)
    if count == 0:
        lows, highs = (dims // 2 - 1)[None], (dims // 2 + 1)[None]
    return lows[:, planar:].double(), highs[:, planar:].double()


def plain_diou(lows, highs, other_lows, other_highs, steps):
    """DIoU of each box with each other box, (n, m)."""
    lows, highs, other_lows, other_highs = lows[:, None], highs[:, None], other_lows[None], other_highs[None]
    shared = (torch.minimum(highs, other_highs) - torch.maximum(lows, other_lows)).clamp(min=0).prod(-1)
    union = (highs - lows).prod(-1) + (other_highs - other_lows).prod(-1) - shared
    centers = lows + ((highs - lows) / 2).ceil() - other_lows - ((other_highs - other_lows) / 2).ceil()
    around = (torch.maximum(highs, other_highs) - torch.minimum(lows, other_lows)) * steps
    centers = centers * steps
    return 1 - shared / union + (centers**2).sum(-1) / ((around**2).sum(-1) + 1e-7)


def assert_minima(geometry, counts, shape, planar, spacing=(1.0, 1.0, 1.0)):
    """Distances to the nearest of the other side against the plain statement."""
    ours = boxes(geometry, counts, list(shape), None, planar, list(spacing))[1]
    batch = counts.shape[1]
    for b, (kept, num_labels) in enumerate(counts[1:].T.tolist()):
        sides = ((geometry[b], kept), (geometry[batch + b], num_labels))
        out, lab = (plain_boxes(*side, shape, planar) for side in sides)
        diou = plain_diou(*out, *lab, torch.tensor(spacing[planar:], dtype=torch.float64, device=DEVICE))
        torch.testing.assert_close(ours[b, : len(diou)], diou.amin(1), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(ours[batch + b, : diou.shape[1]], diou.amin(0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("shape", "offsets", "kept", "num_labels"), GEOMETRIES)
@pytest.mark.parametrize("planar", [False, True])
def test_proximity(shape, offsets, kept, num_labels, planar):
    assert_minima(*two_sides(shape, kept, num_labels), shape, planar)
    assert_minima(*two_sides(shape, kept, num_labels), shape, planar, (0.7, 3.0, 0.5))


def test_proximity_drawn():
    # bounds [2, 3]: extent 1, extended to [0, 4) with centre 2; against the middle [3, 5), centre 4: IoU 1/5, 2^2 / 5^2
    geometry = torch.tensor([[[2, 0, 0, 5, 0, 0, 2, 0, 0, 3]]], device=DEVICE).repeat(2, 1, 1)
    counts = torch.tensor([[5], [1], [0]], dtype=torch.int32, device=DEVICE)
    ours = boxes(geometry, counts, [1, 1, 8], None, True, [1.0, 1.0, 1.0])[1]
    # along the axis of length 1 the instance has [0, 1), the middle [-1, 1); their centres are 1 and 0
    expected = 1 - 1 / (4 + 4 - 1) + (4 + 1) / (25 + 4)
    assert ours.tolist() == [[pytest.approx(expected, abs=1e-9)]] * 2


@pytest.mark.usefixtures("gpu_blocks")
def test_proximity_of_many():
    shape = (30, 40, 50)
    assert_minima(*two_sides(shape, [3], [130], capacity=4000), shape, False)
