"""Launches through kernels that are kept: `launch(kernel, grid, *args)` does what `kernel[grid](*args)` does, sooner.

Triton finds out anew at each launch what its arguments mean for the compiled code, and whether anything that the kernel
names has changed: 20 to 115 us of the host, which is more than most of our kernels take on a GPU. So the first launch
is Triton's own; the compiled kernel it returns is kept under everything that it may depend on, and the next launch of
the same key is the driver's call and nothing else (2 to 4 us). The key holds

- the device,
- of a tensor its dtype and whether it begins at a multiple of 16 bytes,
- of any other argument and option its value: constants, and sizes, of which Triton looks at some.

Streams are asked for at each launch, so one kept kernel serves all of them, and CUDA graphs. Triton's own way is taken
at every launch in the interpreter, of tensors that are more than plain ones (fake ones, say), while a profiler watches
launches, on devices other than CUDA's, and by versions of Triton whose launcher we do not know.
"""

import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# What a compiled kernel's `run` takes is the same in these, but that 3.2 leaves out the constants.
_IS_KNOWN = (3, 2) <= _VERSION <= (3, 9) and torch.version.hip is None
_TAKES_CONSTANTS = _VERSION >= (3, 3)
# Where a profiler puts its hooks.
_hooks = triton.knobs.runtime if _VERSION >= (3, 4) else triton.compiler.CompiledKernel
# Each size of an image has keys of its own. Whoever sees that many begins anew.
MOST_KEPT = 8192

_PLAIN = {int, float, bool, type(None)}

_kept: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, values: tuple[int, ...] = (), **options: Any) -> None:
    """Launch `kernel`, a Triton kernel, with positional arguments, on the current device and stream.

    `values` are numbers in front of the others, at which compilation does not look: `do_not_specialize`, of one type.
    A float64 comes as its bits, `bits_of`, since Triton takes none by value.
    """
    if not _IS_KNOWN or type(kernel) is not triton.JITFunction or _is_watched():
        kernel[grid](*values, *args, **options)
        return
    key = [kernel.fn, *options.values()]
    for arg in args:
        if type(arg) is Tensor:
            key += arg.dtype, arg.data_ptr() % 16 == 0
        elif type(arg) in _PLAIN:
            key.append(arg)
        else:
            kernel[grid](*values, *args, **options)
            return
    device = driver.active.get_current_device()
    found = (device, *key)
    kept = _kept.get(found)
    if kept is None:
        _keep(found, kernel[grid](*values, *args, **options))
        return
    run, function, metadata = kept
    if not _TAKES_CONSTANTS:
        constants = sum(parameter.is_constexpr for parameter in kernel.params)  # they are the last
        args = args[: len(args) - constants]
    stream = driver.active.get_current_stream(device)
    rows, samples = grid if len(grid) == 2 else (*grid, 1)
    run(rows, samples, 1, stream, function, metadata, None, None, None, *values, *args)


@functools.cache
def bits_of(numbers: tuple[float, ...]) -> tuple[int, ...]:
    """The bits of some float64 as whole numbers."""
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


@triton.jit
def of_bits(number):
    """The float64 of such a number."""
    return number.to(tl.int64).to(tl.float64, bitcast=True)


def _is_watched() -> bool:
    """Whether somebody wants to hear of launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    # (each is a list of hooks from Triton 3.5 on; before, one hook or none)
    return bool(enter is not None and getattr(enter, "calls", True)) or bool(
        leave is not None and getattr(leave, "calls", True)
    )


def _keep(key: tuple[Any, ...], compiled: Any) -> None:
    """Keep what the first launch of a key returned, if that is what we think."""
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = compiled.run, compiled.function, compiled.packed_metadata
