"""What a step does on a GPU, counted without one: `python -m bench.counters`; --help says the rest.

The machine of `tests/ptx` carries out the code that Triton makes for a GPU, instruction by instruction, and counts for
each kernel the instructions of its warps, the sectors of 32 bytes that they touch, atomic operations, and the
instructions of the longest warp. What that would take on an H100 is estimated in plot.py. The machine needs gcc.

The step is forward and backward of the defaults on two samples: lesions, most of which the outputs have found, and the
noise of an untrained network. Its gradient has to be that of the CPU backend.
"""

import argparse
import importlib
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import numpy as np
import torch

from triton_instance_loss import InstanceLoss, dispatch

from . import measure, plot, run
from .absent_gpu import define_kernels
from .measure import Row
from .plot import COUNTED

SIDE, ARCH = 48, 90


def _machine() -> Any:
    """The machine, with our kernels compiled for it; in a process that has not imported them before."""
    sys.path.append(str(measure.ROOT / "tests/ptx"))
    machine = importlib.import_module("machine")
    if machine.COMPILER is None:
        raise SystemExit("bench.counters needs gcc, which compiles the machine that counts; it is not installed.")
    machine.install()
    define_kernels()
    return machine.MACHINE


def cases(side: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and labels by name, (2, 1, side, side, side)."""
    draw, index = np.random.default_rng(0), np.indices((side,) * 3)
    labels = np.zeros((2, 1, side, side, side), np.float32)
    for volume in labels[:, 0]:
        for _ in range(10):
            center, radius = draw.integers(0, side, 3), draw.uniform(1, 5)
            volume[((index - center[:, None, None, None]) ** 2).sum(0) <= radius**2] = 1
    truth = torch.from_numpy(labels).clone()  # NumPy's memory may begin within a sector
    noise = [torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return {"lesions": (truth.roll(1, 2) * 6 - 3 + 0.3 * noise[0], truth), "noise": (noise[1], truth)}


def gradient(outputs: torch.Tensor, labels: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of one step."""
    os.environ[dispatch.BACKEND_VARIABLE] = backend
    x = outputs.clone().requires_grad_()
    terms = InstanceLoss()(x, labels)
    sum(terms[1:], terms[0]).backward()
    assert x.grad is not None
    return x.grad


def table(side: int = SIDE, arch: int = ARCH) -> list[Row]:
    """One row for each kernel of each case."""
    machine, rows = _machine(), []
    for name, (outputs, labels) in cases(side).items():
        machine.use(arch=arch)
        ours, truth = (gradient(outputs, labels, backend) for backend in ("triton", "cpu"))
        torch.testing.assert_close(ours, truth, rtol=0, atol=8e-6 * float(truth.abs().max()))
        kernels: dict[str, Row] = defaultdict(lambda: dict.fromkeys(("launches", *COUNTED, "longest_warp"), 0))
        for kernel, counts in machine.log:
            row = kernels[kernel]
            row["launches"] += 1
            for count in COUNTED:
                row[count] += counts[count]
            row["longest_warp"] = max(row["longest_warp"], counts["longest_warp"])
        common = {"entry": "counters", "case": f"{name}, 2 x {side}^3", "arch": f"sm_{arch}", "voxels": outputs.numel()}
        rows += [{**common, "kernel": kernel, **row} for kernel, row in kernels.items()]
    return rows


def main(given: list[str] | None = None) -> None:
    """Print, store."""
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=SIDE, help="of the volumes, in voxels")
    parser.add_argument("--arch", type=int, default=ARCH, choices=(80, 90, 100), help="90 is sm_90, an H100's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows are appended to it")
    options = parser.parse_args(given)
    surroundings = measure.surroundings(torch.device("cpu"))
    rows = table(options.side, options.arch)
    print(plot.counters(rows))
    if options.out is not None:
        run.store([{**row, **surroundings} for row in rows], options.out)


if __name__ == "__main__":
    main()
