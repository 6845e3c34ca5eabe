"""What a training step costs the host of a GPU, counted without one: `python -m bench.host`; --help says the rest.

Triton compiles and prepares every launch as it does for an H100, for a driver whose launches do nothing. So the time of
a step is that of Python, dispatch, autograd, allocation and preparing launches: on a GPU the time of an eager step
wherever launches are the limit and not bytes. MONAI's Dice is timed beside it, in turns in one process. Tensors lie on
the CPU and are small, so operations of torch cost what tiny ones cost there, about as much as calling them on CUDA;
looking at labels and outputs, which is done on the CPU alone, counts too. Not counted: the driver's own call, 2 to 4 us
a launch. It needs Triton 3.4 or later.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from monai.losses import DiceLoss
from triton.runtime import driver

import triton_instance_loss
from triton_instance_loss import (
    BlobLoss,
    CCLoss,
    ComponentTverskyLoss,
    FalseComponentLoss,
    InstanceLoss,
    WeightedSum,
    connected_components,
)
from triton_instance_loss.metrics import instance_metrics

from . import measure, run
from .absent_gpu import AbsentGpu, define_kernels
from .entry import SEED
from .measure import Row

SIDE = 8
YARDSTICK = "MONAI DiceLoss"
SECONDS = 0.5  # a provider; or as many rounds as there are at most

launched: list[str] = []


class _Launcher:
    """Takes the place of the driver's launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *_: Any) -> None:
        launched.append(self.name)


def pretend() -> None:
    """From here on, kernels go to a GPU that is not there; what they would write stays as it was."""
    driver.set_active(AbsentGpu(_Launcher))
    define_kernels()
    # What nobody has written cannot be looked at.
    triton_instance_loss.checks.room_for_labels = lambda most, room: None


def providers(side: int) -> dict[str, Callable[[], Any]]:
    """What is timed, the yardstick first."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((2, 1, side, side, side), generator=generator).requires_grad_()
    y = (torch.rand(x.shape, generator=generator) > 0.9).float()

    def step(loss: Callable[..., Any]) -> Callable[[], None]:
        def once() -> None:
            x.grad = None
            terms = loss(x, y)
            (terms if isinstance(terms, torch.Tensor) else sum(terms[1:], terms[0])).backward()

        return once

    dice = DiceLoss()
    weighted = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=0.1)
    return {
        YARDSTICK: step(dice),
        "InstanceLoss, defaults": step(InstanceLoss()),
        "InstanceLoss, MONAI criteria": step(InstanceLoss(dice, dice, dice)),
        "WeightedSum": step(weighted),
        "BlobLoss": step(BlobLoss()),
        "CCLoss": step(CCLoss()),
        "CCLoss(alpha=0.5), BiCC": step(CCLoss(alpha=0.5)),
        "ComponentTverskyLoss": step(ComponentTverskyLoss()),
        "FalseComponentLoss": step(FalseComponentLoss()),
        "instance_metrics": lambda: instance_metrics(x.detach(), y),
        "connected_components": lambda: connected_components(y),
    }


def table(side: int = SIDE, seconds: float = SECONDS) -> list[Row]:
    """One row a provider; call `pretend` first, in a process that has not imported our kernels before."""
    calls, launches = providers(side), {}
    for name, call in calls.items():
        call()  # compiles
        launched.clear()
        call()
        launches[name] = len(launched)
    timed = measure.summary(measure.in_turns(calls, torch.device("cpu"), seconds), YARDSTICK)
    common = {"entry": "host", "case": f"2 x {side}^3"}
    return [{**common, "provider": name, "launches": launches[name], **row} for name, row in timed.items()]


def main(given: list[str] | None = None) -> None:
    """Print, store."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=SIDE, help="of the volumes, in voxels")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each of what is timed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows are appended to it")
    options = parser.parse_args(given)
    measure.use_threads(1)
    surroundings = measure.surroundings(torch.device("cpu"))
    pretend()
    rows = table(options.side, options.seconds)
    for row in rows:
        print(
            f"{row['provider']:30} {row['median_ms'] * 1e3:7.0f} us  x {row['ratio']:.2f} "
            f"[{row['ratio_p20']:.2f} .. {row['ratio_p80']:.2f}]  {row['launches']:3} launches"
        )
    if options.out is not None:
        run.store([{**row, **surroundings} for row in rows], options.out)


if __name__ == "__main__":
    main()
