"""A GPU that is not there: carries out what Triton compiles for it on the memory of CPU tensors.

Triton gets a driver of our own, so its real launch path runs: specialisation, and compilation to PTX. Each launch is
then taken over: the PTX is decoded (ptx.py) and carried out (machine.c) on the tensors of this process. What a thread
sees is what PTX promises and no more:

- A thread has registers and a program counter of its own. A warp runs a group of its threads that are at the same
  instruction; `*.sync` waits for the threads that it names, `bar.sync` for the block.
- Every access to global memory must be aligned, and lie in the storage of a tensor that the kernel was given. Shared
  memory has bounds, and two warps that use a byte of it without a barrier in between are an error.
- `torch.empty` gives garbage, as a GPU's allocator does.

Modes: *order* runs blocks one after the other. *random* keeps many blocks resident, and after each access to memory any
warp goes on; a warp's access may fall into parts. *weak* besides lets plain loads give what the block's multiprocessor
has read before in the launch, and plain stores reach memory late and in another order, except at one address; a fence,
or an atomic that acquires and releases, ends both. Outside of order, results of approximate instructions are off by a
last bit.

It does not show what ptxas makes of the PTX (which may fuse a product and a sum), how long anything takes, nor the
operations of PyTorch between the kernels.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from ptx import Program, PtxError

from bench.absent_gpu import AbsentGpu

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/ptx"
COMPILER = shutil.which("gcc")
FLAGS = ["-O1", "-ffp-contract=off", "-fwrapv", "-march=native", "-w", "-shared", "-fPIC"]
MODES = {"order": (False, False), "random": (False, False), "weak": (True, True)}  # loads may be stale, stores late
COUNTS = ("stale", "late", "switches", "instructions", "sectors", "atomics", "longest_warp")  # as machine.c has them
BUDGET = 400_000  # instructions of a warp, after which it is said not to end


class Launch(ctypes.Structure):
    """What machine.c is told about a launch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "constants", "allocations", "counts", "text")),
        *((name, ctypes.c_uint64) for name in ("seed", "budget")),
        *((name, ctypes.c_uint32) for name in ("instructions", "num_constants", "rows", "num_allocations")),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("warps", "shared_bytes", "stale", "late", "policy", "resident")),
        *((name, ctypes.c_uint32) for name in ("split", "noise", "evict")),
    ]


class Machine:
    """How launches run from now on, and what they did."""

    def __init__(self):
        self.programs, self.spoil = {}, None  # what may change the PTX of a kernel, called with its name and its text
        self.use()

    def use(self, mode="order", seed=0, arch=90):
        """Compile for `arch` and run in a mode; the seed draws the schedule of each launch from now on."""
        draw = np.random.default_rng(seed)
        self.arch, self.mode, self.seed, self.turn = arch, mode, seed, 0
        # Who goes on: 1, 2 any warp, from 2 on of blocks in any order, 3 in bursts, 4 by priorities that seldom change.
        # How many blocks are resident; whether an access may fall into parts; how often a line leaves the L1.
        drawn = draw.integers(1, 5), draw.choice([2, 4, 12, 40]), draw.choice([0, 1]), draw.choice([0, 2, 8, 64])
        self.schedule = (0, 1, 0, 0) if mode == "order" else tuple(map(int, drawn))
        self.log = []  # of each launch the kernel, and its counts by name

    @functools.cached_property
    def library(self):
        """machine.c, compiled once."""
        texts = [(HERE / name).read_bytes() for name in ("machine.c", "instructions.h")]
        made = BUILD / f"{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}.so"
        if not made.exists():
            BUILD.mkdir(parents=True, exist_ok=True)
            mine = made.with_suffix(f".{os.getpid()}")  # processes may do this at once
            subprocess.run([COMPILER, *FLAGS, HERE / "machine.c", "-o", mine, "-lm"], check=True)
            mine.rename(made)
        return ctypes.CDLL(str(made))

    @functools.cached_property
    def operations(self):
        """Numbers of the operations by name."""
        names = (ctypes.c_char_p * 100_000).in_dll(self.library, "operations")
        return {name.decode(): number for number, name in enumerate(itertools.takewhile(bool, names))}

    def program(self, name, ptx):
        """The decoded kernel."""
        ptx = self.spoil(name, ptx) if self.spoil else ptx
        if ptx not in self.programs:
            self.programs[ptx] = Program(ptx, self.operations)
        return self.programs[ptx]

    def launch(self, name, ptx, grid, warps, shared_bytes, arguments, storages):
        """Run a kernel with arguments of 64 bits, which may use memory from the start to the end of each storage."""
        program = self.program(name, ptx)
        self.turn += 1
        constants = program.values(arguments)
        allocations = np.array(sorted(storages), np.uint64)
        counts, text = np.zeros(len(COUNTS), np.uint64), ctypes.create_string_buffer(2048)
        stale, late = MODES[self.mode]
        policy, resident, split, evict = self.schedule
        failed = self.library.launch(
            ctypes.byref(
                Launch(
                    program.code.ctypes.data, constants.ctypes.data, allocations.ctypes.data, counts.ctypes.data,
                    ctypes.addressof(text), self.seed * 1009 + self.turn, BUDGET, len(program.code) - 1, len(constants),
                    program.num_rows, len(allocations), grid, warps, shared_bytes, stale, late, policy, resident, split,
                    self.mode != "order", evict,
                )
            )
        )  # fmt: skip
        self.log.append((name, dict(zip(COUNTS, counts.tolist(), strict=True))))
        if failed:
            line, message = text.value.decode().split("\n", 1)
            raise PtxError(f"{name}, {program.place(int(line))}: {message} (mode {self.mode}, seed {self.seed})")


MACHINE = Machine()


class Launcher:
    """Takes the place of Triton's launcher of one compiled kernel."""

    def __init__(self, source, metadata):
        from triton.runtime.cache import get_cache_manager

        self.name, self.metadata = source.fn.__name__, metadata
        self.types = [kind for kind in source.signature.values() if kind != "constexpr"]
        self.places = [place for place, kind in enumerate(source.signature.values()) if kind != "constexpr"]
        file = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        self.ptx = Path(file).read_text()

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        values, storages = [], set()
        for kind, argument in zip(self.types, (arguments[place] for place in self.places), strict=True):
            if kind[0] == "*":
                if isinstance(argument, int):  # from a plan (launches.py): nobody knows where its memory ends
                    storages.add((0, 2**64 - 1))
                else:
                    storage = argument.untyped_storage()
                    storages.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
                values.append(argument if isinstance(argument, int) else argument.data_ptr())
            elif kind[0] in "iu":
                values.append(int(argument) & (1 << int(kind[1:])) - 1)
            else:
                raise PtxError(f"{self.name}: an argument of type {kind}")
        if self.metadata.global_scratch_size or self.metadata.num_ctas != 1:
            raise PtxError(f"{self.name}: scratch memory, or clusters of blocks")
        values += [0, 0]  # scratch memory, of which there is none
        grid = (ctypes.c_uint32 * 3)(grid_x, grid_y, grid_z)
        MACHINE.launch(self.name, self.ptx, grid, self.metadata.num_warps, self.metadata.shared, values, storages)


class Driver(AbsentGpu):
    """A driver of the machine, which has one device for each architecture: Triton keeps what it compiled by device."""

    def get_current_device(self):
        """That of the architecture."""
        return MACHINE.arch

    def get_current_target(self):
        """What to compile for."""
        self.capability = MACHINE.arch
        return super().get_current_target()


def install():
    """Make Triton compile for the machine and launch on it. Before kernels are imported, and not in its interpreter."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    driver.set_active(Driver(Launcher))
    # PTX is all that is wanted: ptxas takes a third of the time.
    CUDABackend.make_cubin = lambda self, ptx, metadata, *rest: b"none"
    from triton_instance_loss.kernels import launches

    launches._IS_KNOWN = False  # with plans, kernels are given addresses; without, it is known where memory ends
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        mock.patch.object(owner, name, poisoned(getattr(owner, name))).start()


def poisoned(make):
    """`make`, but what it gives holds garbage, another one each time."""
    garbage = itertools.cycle((0x01, 0x5A, 0xFF, 0x7F))

    def call(*arguments, **options):
        tensor = make(*arguments, **options)
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous():
            byte = next(garbage) & (1 if tensor.dtype == torch.bool else 0xFF)
            ctypes.memset(tensor.data_ptr(), byte, tensor.numel() * tensor.element_size())
        return tensor

    return call
