"""What a training step is made of: `python -m bench.stages` prints one line a stage; --help says the rest.

Stages: find (activate, sums of the pixel term, label, number and measure instances), sums (over instances), terms
(everything on tables, centre boxes, distances) and backward. For each of them

- launches: kernels of ours, and operations of torch that are no views, each counted once, inside our operators too.
  Without a GPU they are those of the Triton backend in the interpreter on small volumes; the size does not change them.
- bytes a voxel: the sizes of all tensors that each of these takes and gives, once. Tables count in full, though most of
  their rows are not touched.
- time: of the backend that the device uses, and its share.

And of the step as a whole the most memory that it holds at once, beyond its inputs; the gradient counts.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from triton_instance_loss import InstanceLoss, checks, dispatch
from triton_instance_loss.cpu import evaluate as cpu_evaluate

from . import measure, run
from .cases import Inputs, lesions
from .entry import SEED
from .measure import Row

STAGES = ("find", "sums", "terms", "backward")
# Operations that launch nothing: they only make a tensor.
SILENT = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)
COUNTED_SIDE = 32
# Large enough that tables have as few rows a voxel as those of a patch.
HELD_SIDE = 64
ROUNDS = 20

Begin = Callable[[str], None]


@contextlib.contextmanager
def _watched(begin: Begin) -> Iterator[None]:
    """While it lasts, `begin` hears the name of each stage of the forward as it starts."""

    def announce(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin(name)
            result = function(*args, **kwargs)
            begin("terms")
            return result

        return call

    with contextlib.ExitStack() as stack:
        # (stages inside of the operator that evaluates the terms, in either backend)
        inside = [(cpu_evaluate, "find", "find"), (cpu_evaluate, "sum_instances", "sums")]
        if dispatch._TRITON_IS_INSTALLED:
            evaluate = importlib.import_module("triton_instance_loss.kernels.evaluate")
            inside += [(evaluate, "launch_find", "find"), (evaluate, "sum_instances", "sums")]
        for owner, attribute, name in inside:
            stack.enter_context(mock.patch.object(owner, attribute, announce(name, getattr(owner, attribute))))
        yield


def step(inputs: Inputs, begin: Begin) -> None:
    """One training step with default options, its stages announced."""
    outputs = inputs.outputs.detach().requires_grad_()
    with _watched(begin):
        terms = InstanceLoss(spatial_dims=outputs.ndim - 2)(outputs, inputs.labels)
    total = sum(terms[1:], terms[0])
    begin("backward")
    total.backward()


@dataclass
class Counts:
    """What one stage does."""

    torch_operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


class Counting(TorchDispatchMode):
    """Counts operations of torch, looking into our operators, and launches of Triton kernels, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = {name: Counts() for name in STAGES}
        self.now = self.stages["terms"]

    def begin(self, name: str) -> None:
        """What comes now belongs to this stage."""
        self.now = self.stages[name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "triton_instance_loss":
            with self:
                return dispatch.answer(func._schema.name.split("::")[1], *args)
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        views = any(given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns)
        if not views and name not in SILENT:
            self.now.torch_operations[name] += 1
            self._move(args, kwargs, result)
        return result

    def _move(self, *trees: Any) -> None:
        tensors = {id(leaf): leaf for leaf in _pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)}
        self.now.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @contextlib.contextmanager
    def launches(self) -> Iterator[None]:
        """While it lasts, launches of Triton kernels are counted, compiled or interpreted."""
        import triton
        from triton.runtime.interpreter import GridExecutor

        counting, run_compiled, run_interpreted = self, triton.JITFunction.run, GridExecutor.__call__

        def compiled(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup"):
                counting._launch(kernel.fn.__name__, args)
            with _disable_current_modes():
                return run_compiled(kernel, *args, **kwargs)

        def interpreted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            counting._launch(executor.fn.__name__, args)
            with _disable_current_modes():
                return run_interpreted(executor, *args, **kwargs)

        with (
            mock.patch.object(triton.JITFunction, "run", compiled),
            mock.patch.object(GridExecutor, "__call__", interpreted),
        ):
            yield

    def _launch(self, name: str, args: Any) -> None:
        self.now.kernels[name] += 1
        self._move(args)


def count(inputs: Inputs) -> dict[str, Counts]:
    """Launches and bytes of each stage, on the Triton backend."""
    counting = Counting()
    # As on CUDA, where values are not looked at without the debug switch.
    unlooked = mock.patch.object(checks, "debugging", return_value=False)
    with mock.patch.dict(os.environ, {dispatch.BACKEND_VARIABLE: "triton"}), unlooked:
        if inputs.outputs.device.type == "cuda":
            step(inputs, lambda name: None)  # compiles, and torch sets itself up
        with counting.launches(), counting:
            step(inputs, counting.begin)
    return counting.stages


def _tidy_interpreter() -> Any:
    """While it lasts, the interpreter holds no tensors after a launch: it leaves some behind for the collector."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(executor, *args, **kwargs)
        gc.collect()
        return result

    return mock.patch.object(GridExecutor, "__call__", call)


def held(inputs: Inputs) -> float:
    """The most bytes a voxel that torch's tensors in a step of the Triton backend take at once, beyond the inputs."""

    def run() -> None:
        step(inputs, lambda name: None)

    with mock.patch.dict(os.environ, {dispatch.BACKEND_VARIABLE: "triton"}):
        run()  # torch and the kernels set themselves up
        if inputs.outputs.device.type == "cuda":
            return (measure.peak_bytes(run, inputs.outputs.device) or 0) / inputs.outputs.numel()
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _tidy_interpreter(), torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
            run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes)) / inputs.outputs.numel()


def clock(inputs: Inputs, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """20th, 50th and 80th percentile of the milliseconds of each stage."""
    cuda = inputs.outputs.device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    for turn in range(rounds + measure.WARM_UP):
        marks: list[tuple[str, Any]] = []

        def begin(name: str, marks: list[tuple[str, Any]] = marks) -> None:
            mark: Any = time.perf_counter()
            if cuda:
                mark = torch.cuda.Event(enable_timing=True)
                mark.record()
            marks.append((name, mark))

        if cuda:
            torch.cuda.synchronize()
        step(inputs, begin)
        begin("end")
        if cuda:
            torch.cuda.synchronize()
        if turn < measure.WARM_UP:
            continue
        spent = Counter[str]()
        for (name, start), (_, end) in itertools.pairwise(marks):
            spent[name] += start.elapsed_time(end) if cuda else (end - start) * 1e3
        for name in STAGES:
            times[name].append(spent[name])
    return {name: np.percentile(values, (20, 50, 80)).round(4).tolist() for name, values in times.items()}


def table(
    device: torch.device,
    side: int,
    batch: int,
    rounds: int = ROUNDS,
    counted_side: int = COUNTED_SIDE,
    held_side: int = HELD_SIDE,
) -> list[Row]:
    """One row a stage."""
    shape = (batch, 1, side, side, side)
    inputs = lesions(shape, SEED).to(device)
    counted = inputs if device.type == "cuda" else lesions((batch, 1, *(counted_side,) * 3), SEED)
    voxels = counted.outputs.numel()
    counts, times = count(counted), clock(inputs, rounds)
    most = held(inputs if device.type == "cuda" else lesions((batch, 1, *(held_side,) * 3), SEED))
    whole = sum(middle for _, middle, _ in times.values())
    return [
        {
            "entry": "stages",
            "case": f"lesions {batch} x {side}^3",
            "stage": name,
            "kernels": dict(counts[name].kernels),
            "torch_operations": dict(counts[name].torch_operations),
            "launches": counts[name].kernels.total() + counts[name].torch_operations.total(),
            "bytes_per_voxel": round(counts[name].bytes / voxels, 1),
            "held_bytes_per_voxel": round(most, 1),
            "median_ms": times[name][1],
            "p20_ms": times[name][0],
            "p80_ms": times[name][2],
            "share": round(times[name][1] / whole, 4),
        }
        for name in STAGES
    ]


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"{'stage':10} {'our kernels':>11} {'torch':>6} {'bytes/voxel':>12} {'ms':>9} {'share':>6}  spread")
    for row in rows:
        ours, launches = sum(row["kernels"].values()), row["launches"]
        print(
            f"{row['stage']:10} {ours:11} {launches - ours:6} {row['bytes_per_voxel']:12.1f} "
            f"{row['median_ms']:9.3f} {row['share']:6.1%}  [{row['p20_ms']:.3f} .. {row['p80_ms']:.3f}]"
        )
    launches, ours = sum(row["launches"] for row in rows), sum(sum(row["kernels"].values()) for row in rows)
    moved, spent = sum(row["bytes_per_voxel"] for row in rows), sum(row["median_ms"] for row in rows)
    print(f"{'together':10} {ours:11} {launches - ours:6} {moved:12.1f} {spent:9.3f}")
    print(f"most memory held at once: {rows[0]['held_bytes_per_voxel']} bytes a voxel, gradient included, inputs not")


def profile(inputs: Inputs) -> str:
    """Torch's table of device time by kernel, over ten steps on CUDA."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            step(inputs, lambda name: None)
        torch.cuda.synchronize()
    return str(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=50, max_name_column_width=60))


def main(given: list[str] | None = None) -> None:
    """Print, store."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=128, help="of the volume, in voxels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="on CUDA: device time of each kernel goes there")
    options = parser.parse_args(given)
    if options.profile is not None and options.device != "cuda":
        sys.exit("--profile needs --device cuda.")
    device = torch.device(options.device)
    measure.use_threads()
    measure.keep_memory()
    surroundings = measure.surroundings(device)
    rows = table(device, options.side, options.batch)
    show(rows)
    if options.out is not None:
        run.store([{**row, **surroundings} for row in rows], options.out)
    if options.profile is not None:
        shape = (options.batch, 1, *(options.side,) * 3)
        options.profile.write_text(profile(lesions(shape, SEED).to(device)) + "\n")


if __name__ == "__main__":
    main()
