"""The machine itself: what goes wrong on a GPU goes wrong on it."""

import pytest
import torch
import triton
import triton.language as tl
from machine import MACHINE
from ptx import Program, PtxError

from triton_instance_loss import checks, ops

PROGRAMS = 40


@triton.jit
def _count_kernel(counters_ptr, ATOMIC: tl.constexpr):
    lane = tl.arange(0, 32)
    if ATOMIC:
        tl.atomic_add(counters_ptr + lane, 1, sem="relaxed")
    else:
        tl.store(counters_ptr + lane, tl.load(counters_ptr + lane) + 1)


@triton.jit
def _hinted_kernel(x_ptr):
    x_ptr = tl.max_contiguous(tl.multiple_of(x_ptr + tl.arange(0, 128), 16), 16)
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def _wait_kernel(flag_ptr):
    while tl.atomic_add(flag_ptr, 0, sem="relaxed") == 0:
        pass


@triton.jit
def _math_kernel(x_ptr, y_ptr, sums_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    tl.store(y_ptr + lane, tl.exp(-x) / (1 + x * x) + tl.log(tl.abs(x)) - (lane * 7 % 5).to(tl.float32))
    tl.store(sums_ptr + lane, tl.cumsum(lane * 3 - 100, axis=0))


def counted(atomic, mode, seed):
    MACHINE.use(mode, seed)
    counters = torch.zeros(32, dtype=torch.int32)
    _count_kernel[PROGRAMS,](counters, atomic, num_warps=1)
    return counters


@pytest.mark.parametrize("mode", ["random", "weak"])
def test_what_is_not_atomic_loses(mode):
    assert (counted(True, mode, 0) == PROGRAMS).all()
    assert (counted(False, "order", 0) == PROGRAMS).all()
    assert any((counted(False, mode, seed) < PROGRAMS).all() for seed in range(5))


def test_a_seed_gives_the_same_run_again():
    first, again, other = (counted(False, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loads_are_stale_and_stores_late_in_weak_mode():
    for mode, expected in (("random", False), ("weak", True)):
        stale = late = 0
        for seed in range(5):
            counted(False, mode, seed)
            ((_, counts),) = MACHINE.log
            stale, late = stale + counts["stale"], late + counts["late"]
        assert (stale > 0, late > 0) == (expected, expected)


@triton.jit
def _copy_kernel(x_ptr, step, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    tl.store(x_ptr + lane * step, tl.load(x_ptr + lane * step) + 1)


@pytest.mark.parametrize(("step", "sectors"), [(1, 4), (4, 16), (8, 32), (16, 32)])
def test_what_launches_do_is_counted(step, sectors):
    """Sectors of 32 bytes that 32 numbers of 4 bytes lie in, read and written."""
    x = torch.zeros(512, dtype=torch.int32)
    x = x[-x.data_ptr() % 32 // 4 :]  # from the start of one
    for programs in (1, 3):
        MACHINE.use()
        _copy_kernel[programs,](x, step, 32, num_warps=1)
        ((name, counts),) = MACHINE.log
        assert (name, counts["sectors"], counts["atomics"]) == ("_copy_kernel", 2 * programs * sectors, 0)
        assert counts["instructions"] == programs * counts["longest_warp"] > 0
    MACHINE.use()
    _count_kernel[2,](x, True, num_warps=1)
    ((_, counts),) = MACHINE.log
    assert (counts["atomics"], counts["sectors"]) == (64, 8)


def test_accesses_outside_of_arguments_are_errors():
    with pytest.raises(PtxError, match=r"_count_kernel.*nearest is one of 80 bytes, from whose start it is 80"):
        _count_kernel[1,](torch.zeros(20, dtype=torch.int32), False, num_warps=1)


def test_misaligned_accesses_are_errors():
    with pytest.raises(PtxError, match="not aligned"):
        _hinted_kernel[1,](torch.zeros(133)[1:], num_warps=1)


def test_endless_loops_are_errors():
    with pytest.raises(PtxError, match="no end after"):
        _wait_kernel[1,](torch.zeros(1, dtype=torch.int32), num_warps=1)


@pytest.mark.parametrize("mode", ["order", "weak"])
def test_arithmetic(mode):
    MACHINE.use(mode, 3)
    x = torch.linspace(-9, 11, 256)
    y, sums, lane = torch.empty(256), torch.empty(256, dtype=torch.int32), torch.arange(256)
    _math_kernel[1,](x, y, sums, 256)
    torch.testing.assert_close(y, (-x).exp() / (1 + x * x) + x.abs().log() - lane * 7 % 5, rtol=4e-6, atol=4e-6)
    assert torch.equal(sums.long(), (lane * 3 - 100).cumsum(0))


def test_what_is_unknown_is_an_error():
    ptx = ".visible .entry k(\n.param .u64 k_param_0\n)\n{\nsin.approx.f32 %f1, %f2;\nret;\n}"
    with pytest.raises(PtxError, match=r"line 5: not known: sin\.approx\.f32"):
        Program(ptx, MACHINE.operations)


def test_labels_beyond_their_tables_end_the_use_of_the_device(monkeypatch):
    monkeypatch.setattr(checks, "room_for_labels", lambda *_: None)  # asked on the host, of CPU tensors
    labels = torch.zeros((1, 9, 9, 9))
    labels[:, ::2, ::2, ::2] = 1  # 125 instances
    for capacity in (125, 124):
        case = torch.zeros_like(labels), labels, None, ops.SIGMOID, 0.9, ops.PROBABILITY, 0, 0, 0, 50, 50.0, capacity, 0
        if capacity == 125:
            ops.find(*case)
        else:
            with pytest.raises(PtxError, match="device_assert: labels have too many instances"):
                ops.find(*case)
