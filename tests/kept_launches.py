"""Launches with a driver that launches nothing: what `test_launches.py` runs, in a process that does not interpret.

Each case prints one line, its name and "ok", or fails. Kernels are compiled for real, for a GPU that is not there.
"""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from bench.absent_gpu import AbsentGpu

launched = []  # places, stream, compiled code, arguments


class Launcher:
    """Takes the place of the driver's launcher."""

    def __init__(self, source, metadata):
        self.hash = metadata.hash

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        """Note a launch."""
        launched.append(((x, y, z), stream, self.hash, arguments))


GPU = AbsentGpu(Launcher)
driver.set_active(GPU)
from triton_instance_loss.kernels import launches  # noqa: E402

prepared = []  # launches that Triton prepared itself
run = triton.JITFunction.run


def note(self, *arguments, **options):
    """Triton's own launch, counted."""
    prepared.append(self.fn.__name__)
    return run(self, *arguments, **options)


triton.JITFunction.run = note


@triton.jit(do_not_specialize=["number"])
def _add_kernel(number: tl.int64, x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, mask=lane < size, other=0)
    tl.store(y_ptr + lane, x + number.to(x.dtype), mask=lane < size)


def add(x, y, size=64, number=5, block=32, grid=(2,)):
    """Launch it: how many launches Triton prepared, and what arrived at the driver."""
    prepared.clear()
    launched.clear()
    launches.launch(_add_kernel, grid, x, y, size, block, values=(number,))
    ((places, stream, code, arguments),) = launched
    return len(prepared), places, stream, code, arguments


X, Y = torch.zeros(64), torch.zeros(64)


def the_second_launch_is_kept():
    first, second = add(X, Y), add(X, Y)
    assert first[0] == 1
    assert second[0] == 0
    assert first[1:4] == second[1:4] == ((2, 1, 1), 0, first[3])
    assert all(a is b or a == b for a, b in zip(first[4], second[4], strict=True))


def values_in_front_may_change():
    add(X, Y, number=5)
    again = add(X, Y, number=2**62)
    assert again[0] == 0
    assert again[4][0] == 2**62


def views_that_are_not_aligned_have_their_own_code():
    aligned = add(X, Y)
    for x, y in ((X[1:], Y), (X, Y[1:]), (X[1:], Y[1:])):
        first, second = add(x, y), add(x, y)
        assert first[0] == 1
        assert second[0] == 0
        assert first[3] == second[3] != aligned[3]
    assert add(X[4:], Y)[0] == 0  # 16 bytes on
    assert add(X, Y)[3] == aligned[3]


def types_and_constants_have_their_own_code():
    codes = {add(X, Y)[3], add(X.double(), Y)[3], add(X, Y, block=64)[3]}
    assert len(codes) == 3


def sizes_are_seen_as_triton_sees_them():
    codes = {size: add(X, Y, size)[3] for size in (64, 1, 63, 2**31, 2**31 + 1)}
    assert len(set(codes.values())) == 5  # divisible by 16, a constant, neither, and these in 64 bits
    for size, code in codes.items():
        again = add(X, Y, size)
        assert again[0] == 0
        assert again[3] == code
    assert add(X, Y, 32)[3] == codes[64]


def streams_are_asked_for_each_time():
    add(X, Y)
    GPU.stream = 7
    assert add(X, Y)[:3] == (0, (2, 1, 1), 7)
    GPU.stream = 0


def devices_have_kernels_of_their_own():
    add(X, Y)
    GPU.device = 1
    assert add(X, Y)[0] == 1
    assert add(X, Y)[0] == 0
    GPU.device = 0


def profilers_hear_of_launches():
    add(X, Y)
    heard = []

    def hook(*_):
        heard.append(1)

    hooks = launches._hooks
    is_list = hasattr(hooks.launch_enter_hook, "add")
    hooks.launch_enter_hook.add(hook) if is_list else setattr(hooks, "launch_enter_hook", hook)
    assert add(X, Y)[0] == 1
    hooks.launch_enter_hook.remove(hook) if is_list else setattr(hooks, "launch_enter_hook", None)
    assert add(X, Y)[0] == 0


def an_unknown_triton_launches_by_itself():
    add(X, Y)
    launches._IS_KNOWN = False
    assert add(X, Y)[0] == 1
    launches._IS_KNOWN = True
    assert add(X, Y)[0] == 0


def what_is_kept_ends():
    launches._kept.clear()
    launches.MOST_KEPT = 3
    for size in (2, 3, 5, 6, 7):
        add(X, Y, size)
        assert len(launches._kept) <= 3
    assert add(X, Y, 7)[0] == 0


CASES = [
    the_second_launch_is_kept,
    values_in_front_may_change,
    views_that_are_not_aligned_have_their_own_code,
    types_and_constants_have_their_own_code,
    sizes_are_seen_as_triton_sees_them,
    streams_are_asked_for_each_time,
    devices_have_kernels_of_their_own,
    profilers_hear_of_launches,
    an_unknown_triton_launches_by_itself,
    what_is_kept_ends,
]

if __name__ == "__main__":
    for case in CASES:
        case()
        print(case.__name__, "ok")
