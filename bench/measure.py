"""Measuring side by side: time in turns, peak memory, and what a row says about the machine and the code."""

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "monai", "numpy", "scipy", "connected-components-3d", "cucim", "bkeccl")
LEAST_ROUNDS, MOST_ROUNDS = 5, 300
WARM_UP = 2
# Zeroed before each call on CUDA, so that no provider finds its inputs in the cache: more than the L2 of any device.
FLUSHED_BYTES = 2**28

Row = dict[str, Any]


def use_threads(threads: int | None = None) -> None:
    """Let torch use so many threads, by default one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or cores)


def keep_memory() -> None:
    """Let the C library keep freed memory, as after a step of any larger network, and not ask for new pages each time.

    glibc takes blocks no larger than the largest ever freed, up to 32 MiB, from memory it keeps. Before that, how
    long the same call takes depends on what was allocated earlier, and by whom.
    """
    freed = torch.empty(2**25 - 2**16, dtype=torch.uint8)
    del freed


class Clock:
    """Milliseconds of one call: by events on CUDA, where the device is idle before, else by the process's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any]) -> float:
        """Call `function` once."""
        if not self.cuda:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        self.flushed.zero_()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def in_turns(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each call: one of each function a round, the first one changing, so that drift hits all alike.

    At least `LEAST_ROUNDS` rounds, then until `seconds` a function are over.
    """
    clock = Clock(device)
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(WARM_UP):
        for name in names:
            functions[name]()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(names)
        for turn in range(MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                times[name].append(clock(functions[name]))
    finally:
        gc.enable()
    return times


def summary(times: dict[str, list[float]], yardstick: str | None) -> dict[str, Row]:
    """Median, 20th and 80th percentile, and the same of the ratio to the yardstick's call in the same round."""
    rows: dict[str, Row] = {}
    for name, values in times.items():
        low, middle, high = np.percentile(values, (20, 50, 80))
        row: Row = {"rounds": len(values), "median_ms": middle, "p20_ms": low, "p80_ms": high}
        if yardstick is not None:
            ratios = np.percentile(np.array(values) / np.array(times[yardstick]), (20, 80))
            row |= {"ratio_to": yardstick, "ratio": middle / np.median(times[yardstick])}
            row |= {"ratio_p20": ratios[0], "ratio_p80": ratios[1]}
        rows[name] = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    return rows


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs at once, beyond what was there before; None where that cannot be told.

    On CUDA by torch's allocator. On Linux by the resident set, which also sees NumPy: freed memory goes back first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        function()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, KeyError):
        return None


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The commit of the code, with "+" if a file of it was changed since; stored rows and new files do not count.

    A copy without its history takes it from the environment variable BENCH_COMMIT.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("BENCH_COMMIT")
    return commit + ("+" if _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results") else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return models[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def surroundings(device: torch.device) -> Row:
    """What every row of a run says: device, versions, commit, date, and how busy the machine was."""
    return {
        "device": device.type,
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
