"""Plans with a driver that launches nothing: what `test_plans.py` runs, in a process that does not interpret.

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


def launch_add(x, y, size, block, weights):
    """A launcher."""
    launches.launch(_add_kernel, (2,), x, y, size, block, values=launches.bits_of(weights))


def add(x, y, size=64, weight=5.0, block=32):
    """Carry it out: how many launches Triton prepared, and what arrived at the driver."""
    prepared.clear()
    launched.clear()
    launches.planned(launch_add, x, y, size, block, [weight])
    ((places, stream, code, arguments),) = launched
    return len(prepared), places, stream, code, addresses(arguments)


def addresses(arguments):
    """Tensors as where they begin."""
    return tuple(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments)


X, Y = torch.zeros(64), torch.zeros(64)


def the_second_call_is_planned():
    first, second = add(X, Y), add(X, Y)
    assert first[0] == 1
    assert second[0] == 0
    assert first[1:] == second[1:] == ((2, 1, 1), 0, first[3], (*launches.bits_of([5.0]), *addresses((X, Y)), 64, 32))


def weights_may_change():
    add(X, Y, weight=5.0)
    again = add(X, Y, weight=-0.25)
    assert again[0] == 0
    assert again[4][:1] == launches.bits_of([-0.25])


def views_that_are_not_aligned_have_their_own_code():
    aligned = add(X, Y)
    for x, y in ((X[1:], Y), (X, Y[1:]), (X[1:], Y[1:])):
        first, second = add(x, y), add(x, y)
        assert first[0] == 1
        assert second[0] == 0
        assert first[3] == second[3] != aligned[3]
    x = X[:60]
    first = add(x, Y)
    again = add(X[4:], Y)  # 16 bytes on
    assert again[0] == 0
    assert again[3] == first[3]
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


def devices_have_plans_of_their_own():
    add(X, Y)
    GPU.device = 1
    assert add(X, Y)[0] == 1
    assert add(X, Y)[0] == 0
    GPU.device = 0


def deterministic_algorithms_have_plans_of_their_own():
    add(X, Y)
    torch.use_deterministic_algorithms(True)
    assert add(X, Y)[0] == 1
    torch.use_deterministic_algorithms(False)
    assert add(X, Y)[0] == 0


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


def some_tensors_have_no_plan():
    class Subclass(torch.Tensor):
        pass

    launches._plans.clear()
    for _ in range(2):
        assert add(X, X)[0] == 1  # whose address is whose?
        assert add(X[::2], Y)[0] == 1
        assert add(X.as_subclass(Subclass), Y)[0] == 1
    assert add(X[:0], Y[:0])[0] == 1
    assert add(X[:0], Y[:0])[0] == 0


def launch_several(x, sizes):
    """A launcher that does more: buffers, views, operations of torch that make something new or change it."""
    size = len(x)
    wide, small, large = (torch.empty(count, dtype=x.dtype) for count in (2 * size, size, 2**20))
    low, high = wide.chunk(2)
    result = torch.empty_like(x)
    launches.launch(_add_kernel, (2,), x, high, size, 32, values=(1,))
    ends = high.cumsum(0)
    ends += 1
    launches.launch(_add_kernel, (2,), ends, small, size, 32, values=(2,))
    launches.launch(_add_kernel, (2,), small, large[size:], size, 32, values=(3,))
    launches.launch(_add_kernel, (2,), large, result[1:], size - 1, 32, values=(4,))
    return [result, torch.where(x > 0, ends, x)], low, sizes


def a_plan_does_what_the_launcher_does():
    x = torch.arange(64.0)
    first = launches.planned(launch_several, x, [1, 2])
    x = x + 1
    prepared.clear()
    launched.clear()
    [result, chosen], low, sizes = launches.planned(launch_several, x, [1, 2])
    assert not prepared
    assert [arguments[0] for *_, arguments in launched] == [1, 2, 3, 4]
    (_, read, high, *_), (_, ends, small, *_), (_, small_again, large, *_), (_, whole, written, *_) = (
        arguments for *_, arguments in launched
    )
    assert read == x.data_ptr()
    assert high == low.data_ptr() + 4 * 64
    assert small == small_again
    assert large == whole + 4 * 64
    assert written == result.data_ptr() + 4
    assert len({read, high, ends, small, large, written}) == 6
    assert all(address % 16 == 0 for address in (read, high, ends, small, large))
    assert sizes == [1, 2]
    assert chosen.shape == first[0][1].shape
    assert low.untyped_storage().nbytes() == 4 * 128


def launch_looks(x):
    """A launcher that looks at data."""
    launches.launch(_add_kernel, (2,), x, torch.empty_like(x), int(x.sum() > 0) + 16, 32, values=(1,))
    return x + 1


def what_looks_at_data_has_no_plan():
    for x in (X, X + 1, X, X + 1):
        prepared.clear()
        launched.clear()
        launches.planned(launch_looks, x)
        assert len(prepared) == 1
        assert launched[0][3][3] == int(x.sum() > 0) + 16


def what_is_kept_ends():
    launches._plans.clear()
    launches.MOST_PLANS = 3
    for size in (2, 3, 5, 6, 7):
        add(X, Y, size)
        assert len(launches._plans) <= 3
    assert add(X, Y, 7)[0] == 0


CASES = [
    the_second_call_is_planned,
    weights_may_change,
    views_that_are_not_aligned_have_their_own_code,
    types_and_constants_have_their_own_code,
    sizes_are_seen_as_triton_sees_them,
    streams_are_asked_for_each_time,
    devices_have_plans_of_their_own,
    deterministic_algorithms_have_plans_of_their_own,
    profilers_hear_of_launches,
    an_unknown_triton_launches_by_itself,
    some_tensors_have_no_plan,
    a_plan_does_what_the_launcher_does,
    what_looks_at_data_has_no_plan,
    what_is_kept_ends,
]

if __name__ == "__main__":
    for case in CASES:
        case()
        print(case.__name__, "ok")
