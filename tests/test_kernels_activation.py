"""The kernel that activates against drawn truths, and against a plain statement of what it computes."""

import importlib
import math

import pytest
import torch
from kernel_cases import DEVICE, SHAPES, activate, assert_same

pytest.importorskip("triton")

from triton_instance_loss import ops
from triton_instance_loss.ops import GIVEN, HARD, NONE, NOT_FUSED, PROBABILITY, RAW, SIGMOID

pytestmark = pytest.mark.usefixtures("poison")

NAN, INF = math.nan, math.inf
# Of a sum, relative to the sum of magnitudes: a few roundings a voxel in the precision of x, and in float64 one for
# each of some ten levels of addition.
ERRORS = {torch.float32: 5e-7, torch.float64: 2e-15}


def line(values, dtype=torch.float32):
    """A volume that is one line of voxels."""
    return torch.tensor(values, dtype=dtype, device=DEVICE).view(1, 1, 1, -1)


def masks(x, labels, code, threshold):
    """Foreground and y of one line, as lists."""
    foreground, y, sums, _ = activate(x, labels, code, threshold, NOT_FUSED, 4)
    assert_same([sums], [torch.zeros((1, 3), dtype=torch.float64, device=DEVICE)])
    return foreground.flatten().tolist(), y.flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("code", "threshold", "expected"),
    [
        # x is           -inf -1  0  .3 .5 .7 1  1.5 inf nan
        (NONE, 0.5, "   0   0  0  0  1  1  1  1   1   0"),
        (NONE, 0.3, "   0   0  0  1  1  1  1  1   1   0"),
        (NONE, 1.0, "   0   0  0  0  0  0  1  1   1   0"),
        (NONE, 1.25, "  0   0  0  0  0  0  0  1   1   0"),
        (NONE, 0.0, "   0   0  0  0  0  0  1  0   0   0"),
        (NONE, -1.0, "  0   0  0  0  0  0  1  0   0   0"),
        (GIVEN, 0.5, "  0   0  0  0  1  1  1  1   1   0"),
        (GIVEN, 0.0, "  0   0  1  1  1  1  1  1   1   0"),
        (GIVEN, -1.0, " 0   1  1  1  1  1  1  1   1   0"),
        (SIGMOID, 0.5, "0   0  1  1  1  1  1  1   1   0"),
        (SIGMOID, 0.7, "0   0  0  0  0  0  1  1   1   0"),
        (SIGMOID, 0.0, "1   1  1  1  1  1  1  1   1   0"),
        (SIGMOID, -1.0, "1  1  1  1  1  1  1  1   1   0"),
        (SIGMOID, 1.0, "0   0  0  0  0  0  0  0   1   0"),
        (SIGMOID, 1.5, "0   0  0  0  0  0  0  0   0   0"),
    ],
)
def test_foreground_drawn(code, threshold, expected, dtype):
    x = line([-INF, -1.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.5, INF, NAN], dtype)
    assert masks(x, x, code, threshold)[0] == [value == "1" for value in expected.split()]


def test_the_threshold_is_rounded_to_the_dtype_of_x():
    # the float32 nearest to 0.7 is less than 0.7
    nearest = line([0.7])
    for x, expected in ((nearest, True), (nearest.double(), False), (line([0.7], torch.float64), True)):
        assert masks(x, line([0]), GIVEN, 0.7)[0] == [expected]
    # too small for float32: there it is 0, and so asks for x == 1
    assert masks(line([0.5, 1.0]), line([0, 0]), NONE, 1e-60)[0] == [False, True]
    assert masks(line([0.5, 1.0], torch.float64), line([0, 0]), NONE, 1e-60)[0] == [True, True]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([False, True], torch.bool),
        ([0, 1, 2, 255, 254], torch.uint8),
        ([0, 1, -1, 127], torch.int8),
        ([0, 1, -1, 257], torch.int16),
        ([0, 1, -1, 2**16 + 1], torch.int32),
        ([0, 1, -1, 2**32 + 1], torch.int64),
        ([0.0, 1.0, -1.0, 1 + 2**-23, 0.5, INF, NAN], torch.float32),
        ([0.0, 1.0, -1.0, 1 + 2**-52, 0.5, INF, NAN], torch.float64),
    ],
)
def test_labels_are_where_they_are_above_a_half(values, dtype):
    labels = line(values, dtype)
    assert masks(torch.zeros_like(labels, dtype=torch.float32), labels, SIGMOID, 0.5)[1] == [v > 0.5 for v in values]


@pytest.mark.parametrize(
    ("value", "dtype", "broken"),
    [
        (True, torch.bool, False),
        (2, torch.uint8, True),
        (-1, torch.int8, True),
        (2**32 + 1, torch.int64, True),
        (1.5, torch.float32, False),
        (-0.5, torch.float32, False),
        (1.5 + 2**-22, torch.float32, True),
        (-0.5 - 2**-52, torch.float64, True),
        (INF, torch.float32, True),
        (NAN, torch.float64, True),
    ],
)
def test_health_sees_labels_that_are_no_mask(value, dtype, broken):
    for shape in SHAPES:
        labels = torch.zeros(shape, dtype=dtype, device=DEVICE)
        labels.view(-1)[-1] = value
        health = activate(torch.zeros(shape, device=DEVICE), labels, NONE, 0.5, RAW, 0)[3]
        assert health.isnan().tolist() == [False] * (len(health) - 1) + [broken]


@pytest.mark.parametrize(
    ("code", "pixel", "quantity", "expected"),
    [
        # x = 0, 0.5, 2 and labels 1, 0, 3: y = 1, 0, 1; without activation at 0.5 the foreground is 0, 1, 1
        (NONE, RAW, 0, [6.0, 2.5, 4.0]),
        (NONE, RAW, 1, [6.0, 4.25, 10.0]),
        (NONE, RAW, 2, [6.0, 1.0 + 0.5 + 1.0, 4.0]),
        (NONE, RAW, 3, [6.0, 1.0 + 0.25 + 1.0, 4.0]),
        (GIVEN, HARD, 0, [3.0, 2.0, 4.0]),
        (GIVEN, HARD, 1, [3.0, 2.0, 10.0]),
        (GIVEN, HARD, 2, [3.0, 1.0 + 1.0 + 2.0, 4.0]),
        (NONE, HARD, 3, [3.0, 1.0 + 1.0 + 4.0, 4.0]),
        (GIVEN, PROBABILITY, 1, [2.0, 4.25, 2.0]),
        (NONE, PROBABILITY, 3, [2.0, 1.0 + 0.25 + 1.0, 2.0]),
        (NONE, NOT_FUSED, 3, [0.0, 0.0, 0.0]),
    ],
)
def test_sums_drawn(code, pixel, quantity, expected):
    for dtype in (torch.int32, torch.float64):
        labels = line([1, 0, 3], dtype)
        sums = activate(line([0.0, 0.5, 2.0]), labels, code, 0.5, pixel, quantity)[2]
        assert sums.tolist() == [expected]


def test_sums_of_a_sigmoid_drawn():
    # sigmoid(0) = 1/2, and sigmoid(log 3) = 3/4
    x = line([0.0, math.log(3), -math.log(3)], torch.float64)
    labels = line([1, 1, 2], torch.uint8)
    expected = {PROBABILITY: [1.5, 0.25 + 0.0625 + 0.5625, 3.0], HARD: [2.0, 0.0 + 0.0 + 4.0, 4.0]}
    for pixel, sums in expected.items():
        ours = activate(x, labels, SIGMOID, 0.5, pixel, 3)[2]
        assert ours.tolist() == [pytest.approx(sums, rel=1e-15)]


@pytest.mark.parametrize("pixel", [NOT_FUSED, RAW])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_health_sees_one_broken_voxel(value, pixel):
    for shape in SHAPES:
        x = torch.zeros(shape, device=DEVICE)
        x.view(-1)[-1] = value
        health = activate(x, torch.zeros_like(x), NONE, 0.5, pixel, 0)[3]
        assert (health.shape, health.dtype) == (shape[:1], torch.float64)
        assert health.isnan().tolist() == [False] * (len(health) - 1) + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_health_of_the_largest_values_is_one(dtype):
    x = torch.full((2, 3, 5, 7), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    for code in (NONE, SIGMOID, GIVEN):
        assert activate(x, torch.zeros_like(x), code, 0.5, RAW, 1)[3].tolist() == [1.0, 1.0]


def test_activate_without_voxels():
    x = torch.zeros((2, 0, 3, 3), device=DEVICE)
    for pixel in (NOT_FUSED, RAW):
        foreground, y, sums, health = activate(x, x, NONE, 0.5, pixel, 0)
        assert (foreground.shape, y.shape, foreground.dtype, y.dtype) == (x.shape, x.shape, torch.bool, torch.bool)
        assert (sums.tolist(), health.tolist()) == ([[0.0] * 3] * 2, [1.0, 1.0])


def plain_phi(u, w, quantity):
    """What criteria measure at a voxel."""
    return [u, u * u, (u - w).abs(), (u - w) ** 2][quantity]


def plain_activate(x, labels, code, threshold, pixel, quantity):
    """What the operator gives, and each voxel's part of the sums, (B, 3, D, H, W) float64."""
    p = torch.sigmoid(x) if code == SIGMOID else x
    foreground = x == 1 if code == NONE and threshold <= 0 else p >= threshold
    y = labels > 0.5
    if pixel == NOT_FUSED:
        parts = torch.zeros((x.shape[0], 3, *x.shape[1:]), dtype=torch.float64, device=x.device)
    else:
        u = {RAW: x, PROBABILITY: p, HARD: foreground}[pixel].double()
        w = (y if pixel == PROBABILITY else labels).double()
        parts = torch.stack([u * w, plain_phi(u, w, quantity), w * w if quantity == 1 else w], 1)
    return foreground, y, parts


def assert_activate(x, labels, code, threshold, pixel, quantity):
    """One case against the plain statement."""
    ours = activate(x, labels, code, threshold, pixel, quantity)
    foreground, y, parts = plain_activate(x, labels, code, threshold, pixel, quantity)
    assert_same(ours[:2], (foreground, y))
    assert ours[2].is_contiguous()
    error = (ours[2] - parts.sum((2, 3, 4))).abs()
    assert bool((error <= ERRORS[x.dtype] * parts.abs().sum((2, 3, 4))).all())
    healthy = ((labels >= -0.5) & (labels <= 1.5)).flatten(1).all(1)
    assert_same(ours[3:], [torch.where(healthy, 1.0, NAN).double()])


def random_volumes(shape, dtype, label_dtype, seed=0):
    """Volumes: x around 0, some of it exactly 1, and labels of which some are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.1] = 1
    labels = torch.randint(0, 4, shape, generator=generator)
    if label_dtype == torch.bool:
        labels = labels == 1
    elif label_dtype.is_floating_point:
        labels = labels * 0.5
    return x.to(DEVICE), labels.to(label_dtype).to(DEVICE)


@pytest.mark.parametrize("code", [NONE, SIGMOID, GIVEN])
@pytest.mark.parametrize("pixel", [NOT_FUSED, RAW, PROBABILITY, HARD])
@pytest.mark.parametrize("quantity", range(4))
def test_activate_random(code, pixel, quantity):
    for dtype, label_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        assert_activate(*random_volumes((2, 3, 5, 7), dtype, label_dtype), code, 0.5, pixel, quantity)


@pytest.mark.parametrize("label_dtype", [torch.bool, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activate_types(dtype, label_dtype):
    for code, pixel in ((NONE, RAW), (SIGMOID, PROBABILITY), (GIVEN, HARD)):
        assert_activate(*random_volumes((2, 3, 5, 7), dtype, label_dtype), code, 0.3, pixel, 3)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0, 1.7])
def test_activate_thresholds(threshold):
    for code in (NONE, SIGMOID, GIVEN):
        for dtype in (torch.float32, torch.float64):
            assert_activate(*random_volumes((2, 3, 5, 7), dtype, torch.int32), code, threshold, RAW, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_activate_shapes(shape):
    for pixel in (NOT_FUSED, PROBABILITY):
        assert_activate(*random_volumes(shape, torch.float32, torch.uint8), SIGMOID, 0.5, pixel, 1)


@pytest.mark.usefixtures("gpu_blocks")
def test_activate_at_gpu_block_sizes():
    x, labels = random_volumes((2, 9, 17, 13), torch.float32, torch.float32)
    assert_activate(x, labels, SIGMOID, 0.5, RAW, 3)
    x[1, 0, 0, 0] = NAN  # in a program that is neither the first nor the last one
    assert activate(x, labels, SIGMOID, 0.5, RAW, 3)[3].isnan().tolist() == [False, True]


@pytest.mark.usefixtures("interleaved")
def test_activate_at_once_is_the_same():
    x, labels = random_volumes((2, 9, 17, 13), torch.float32, torch.float32)
    results = [activate(x, labels, SIGMOID, 0.5, PROBABILITY, 3) for _ in range(2)]
    assert_same(*results)
    assert_activate(x, labels, SIGMOID, 0.5, PROBABILITY, 3)


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("broken", [False, True])
def test_find_adds_up_what_programs_wrote(monkeypatch, broken):
    """Sums of the pixel term, health and counts of several programs a sample, in several steps."""
    activation, instances = (
        importlib.import_module(f"triton_instance_loss.kernels.{room}") for room in ("activation", "instances")
    )
    monkeypatch.setattr(activation, "ACTIVATE_TILES", 1)
    monkeypatch.setattr(instances, "PARTS_BLOCK", 4)
    x, labels = random_volumes((3, 5, 11, 13), torch.float64, torch.float64)
    if broken:
        x[1, 2, 3, 4] = INF
    finite = x.flatten(1).isfinite().all(1)  # the sums of other samples are NaN or infinite, and health says so
    for pixel in (NOT_FUSED, RAW):
        case = (x, labels, None, SIGMOID, 0.7, pixel, 3, 0, 0, 5, 2.0)
        _, sums, health, counts, _ = instances.launch_find(*case, 90, 0)
        _, expected_sums, expected_health, expected_counts, _ = ops.find(*case, 0, 0)
        torch.testing.assert_close(sums[finite], expected_sums[finite], rtol=1e-13, atol=0)
        assert_same((health, counts), (expected_health, expected_counts))
        assert health.isnan().tolist() == [False, broken, False]
