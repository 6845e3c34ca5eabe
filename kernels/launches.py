"""Operators as plans: what one does to tensors of one kind is written down once, and carried out ever after.

Triton finds out anew at each launch what its arguments mean for the compiled code, and whether anything that the kernel
names has changed: 20 to 115 us of the host, which is more than most of our kernels take on a GPU. PyTorch takes another
1 to 3 us for each buffer and view. None of it hangs on what the tensors hold. So `planned(launcher, *args)` calls the
launcher of an operator once, notes its launches, allocations and operations of torch, and keeps them as a `Plan` under
all that they may depend on:

- the launcher, the device, and whether PyTorch is asked to be deterministic,
- of a tensor its dtype, shape, whether it begins at a multiple of 16 bytes, and whether it is contiguous,
- of any other argument its value; but not those of `weights`, which change between steps.

To carry a plan out is to allocate, to fill in addresses, and to call the driver. Small buffers that nobody but kernels
sees are cut from one allocation. Streams are asked for each time, so a plan serves all of them, and CUDA graphs.

A launcher is called each time in the interpreter, with tensors that are more than plain ones (fake ones, say) or not
contiguous, while a profiler watches launches, on devices other than CUDA's, and by versions of Triton whose launcher we
do not know; and where it looks at data, or two of its tensors share memory.
"""

import contextlib
import functools
import inspect
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .blocks import INTERPRETED, deterministic
from .plans import Launch, Notes, Plan

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# What a compiled kernel's `run` takes is the same in these, but that 3.2 leaves out the constants.
_IS_KNOWN = (3, 2) <= _VERSION <= (3, 9) and torch.version.hip is None and not INTERPRETED
_TAKES_CONSTANTS = _VERSION >= (3, 3)
# Where a profiler puts its hooks.
_hooks = triton.knobs.runtime if _VERSION >= (3, 4) else triton.compiler.CompiledKernel
# Each size of an image has plans of its own. Whoever sees that many begins anew.
MOST_PLANS = 2048

_plans: dict[tuple[Any, ...], Plan | None] = {}
_thread = threading.local()  # .notes: what is being written down


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, values: tuple[int, ...] = (), **options: Any) -> None:
    """Launch `kernel`, a Triton kernel, with positional arguments, on the current device and stream.

    `values` are numbers in front of the others, at which compilation does not look: `do_not_specialize`, of one type.
    A float64 comes as its bits, `bits_of`, since Triton takes none by value.
    """
    compiled = kernel[grid](*values, *args, **options)
    notes = _notes()
    if notes is not None:
        if not _TAKES_CONSTANTS:
            constants = sum(parameter.is_constexpr for parameter in kernel.params)  # they are the last
            args = args[: len(args) - constants]
        notes.taken.append(Launch(compiled, grid, values, args))


def bits_of(numbers: Sequence[float]) -> tuple[int, ...]:
    """The bits of some float64 as whole numbers."""
    return _bits_of(tuple(numbers))


@functools.lru_cache(maxsize=64)
def _bits_of(numbers: tuple[float, ...]) -> tuple[int, ...]:
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


@triton.jit
def of_bits(number):
    """The float64 of these bits."""
    return number.to(tl.int64).to(tl.float64, bitcast=True)


def planned(launcher: Callable[..., Any], *args: Any) -> Any:
    """`launcher(*args)`, through its plan if there is one."""
    if not _IS_KNOWN or _is_watched():
        return launcher(*args)
    key: list[Any] = [launcher, driver.active.get_current_device(), deterministic()]
    tensors: list[Tensor] = []
    values: tuple[int, ...] = ()
    for place, arg in enumerate(args):
        if type(arg) is Tensor:
            key += arg.dtype, arg.shape, arg.data_ptr() % 16 == 0, arg.is_contiguous()
            tensors.append(arg)
        elif type(arg) is not list and type(arg) is not tuple:
            key.append(arg)
        elif place == _place_of_weights(launcher):
            values = bits_of(arg)
            key.append(bool(arg))
        elif arg and isinstance(arg[0], Tensor):
            for each in arg:
                key += each.dtype, each.shape, each.data_ptr() % 16 == 0, each.is_contiguous()
            tensors += arg
        else:
            key.append(tuple(arg))
    found = tuple(key)
    plan = _plans.get(found)
    if plan is not None:
        return plan(tensors, values)
    if found in _plans:
        return launcher(*args)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    return _note(found, launcher, args, tensors)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is made here is made for good, and belongs to no plan."""
    notes = _notes()
    if notes is None:
        yield
        return
    notes.are_taken = False
    try:
        yield
    finally:
        notes.are_taken = True


def _notes() -> Notes | None:
    notes: Notes | None = getattr(_thread, "notes", None)
    return notes


@functools.cache
def _place_of_weights(launcher: Callable[..., Any]) -> int | None:
    names = list(inspect.signature(launcher).parameters)
    return names.index("weights") if "weights" in names else None


def _is_watched() -> bool:
    """Whether somebody wants to hear of launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    # (each is a list of hooks from Triton 3.5 on; before, one hook or none)
    return bool(enter is not None and getattr(enter, "calls", True)) or bool(
        leave is not None and getattr(leave, "calls", True)
    )


def _note(key: tuple[Any, ...], launcher: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    """Call the launcher, and keep what it does under `key`."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel() > 0]
    # Where two share memory, nobody can tell whose address a launch was given.
    is_simple = len(set(storages)) == len(storages) and all(tensor.is_contiguous() for tensor in tensors)
    if not is_simple or any(isinstance(arg, Tensor) and type(arg) is not Tensor for arg in (*args, *tensors)):
        return launcher(*args)
    with Notes() as notes:
        _thread.notes = notes
        try:
            results = launcher(*args)
        finally:
            _thread.notes = None
    _plans[key] = notes.plan(tensors, results)
    return results
