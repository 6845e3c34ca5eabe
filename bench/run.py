"""Measure and store: `python -m bench.run --entry step`; --help says the rest.

Every provider of an entry answers once first. A wrong answer, a missing package or a failure makes a row that says so
and has no time. The others are timed in turns in this one process: ratios within a run count, and those alone.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import measure, references
from .entry import SEED, Answer, Case, Entry, Function, Setup, Truth, difference
from .measure import Row
from .registry import ENTRIES

# Cases beyond this run on the CPU only if --case names them.
MOST_VOXELS_CPU = 2**23


def prepare(entry: Entry, case: Case, setup: Setup) -> tuple[dict[str, Function], dict[str, Row]]:
    """The functions whose answer is right, and a row with status and detail for every provider."""
    inputs = case.draw(case.shape, SEED).to(setup.device)
    truths: dict[Truth, Answer] = {}
    functions: dict[str, Function] = {}
    rows: dict[str, Row] = {}
    for provider in entry.providers:
        status, detail = provider.reason_to_skip(case, setup)
        if not status:
            try:
                function = provider.build(inputs, setup)
                answer = entry.read(function())
                if provider.truth is not None:
                    if provider.truth not in truths:
                        truths[provider.truth] = provider.truth(inputs, setup)
                    detail = difference(answer, truths[provider.truth])
                del answer
                status = "differs" if detail else "timed"
            except Exception as error:
                status, detail = "failed", f"{type(error).__name__}: {error}".split("\n")[0][:300]
        if status == "timed":
            functions[provider.name] = function
        rows[provider.name] = {
            "entry": entry.name,
            "case": case.name,
            "shape": list(case.shape),
            "provider": provider.name,
            "status": status,
            "detail": detail,
        }
    return functions, rows


def measure_case(entry: Entry, case: Case, setup: Setup, seconds: float | None = None) -> list[Row]:
    """One row a provider, without the surroundings."""
    functions, rows = prepare(entry, case, setup)
    if functions:
        times = measure.in_turns(functions, setup.device, entry.seconds if seconds is None else seconds)
        yardstick = next((name for name in entry.yardsticks if name in times), None)
        for name, row in measure.summary(times, yardstick).items():
            rows[name] |= row
    for provider in entry.providers:
        if provider.name in functions:
            moved = entry.bytes_per_voxel * case.voxels
            countable = provider.torch_memory or setup.device.type == "cpu"
            rows[provider.name] |= {
                "bytes": moved,
                "gb_per_s": round(moved / rows[provider.name]["median_ms"] / 1e6, 4),
                "peak_bytes": measure.peak_bytes(functions[provider.name], setup.device) if countable else None,
            }
    return list(rows.values())


def chosen_cases(entry: Entry, pattern: str | None, device: torch.device, tiny: bool) -> Iterable[Case]:
    """The cases to measure."""
    for case in entry.cases:
        if pattern is not None and not fnmatch.fnmatch(case.name, f"*{pattern}*"):
            continue
        if tiny:
            yield case.shrunk()
        elif pattern is not None or device.type != "cpu" or case.voxels <= MOST_VOXELS_CPU:
            yield case
        else:
            print(f"{entry.name}, {case.name}: large for a CPU, left out; --case names it", file=sys.stderr)


def line(row: Row) -> str:
    """A row for people."""
    head = f"  {row['provider']:34}"
    if row["status"] != "timed":
        return f"{head} {row['status']}: {row['detail']}"
    text = (
        f"{head} {row['median_ms']:10.3f} ms [{row['p20_ms']:.3f} .. {row['p80_ms']:.3f}] {row['gb_per_s']:9.2f} GB/s"
    )
    if row["peak_bytes"] is not None:
        text += f" {row['peak_bytes'] / 2**20:8.1f} MiB"
    if "ratio" in row:
        text += f"   x {row['ratio']:.2f} [{row['ratio_p20']:.2f} .. {row['ratio_p80']:.2f}] of {row['ratio_to']}"
    return text


def store(rows: list[Row], path: Path) -> None:
    """Append the rows to a file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    parser.add_argument("--entry", action="append", choices=list(ENTRIES), help="what to measure; all by default")
    parser.add_argument("--case", metavar="PATTERN", help="only cases with this in their name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--reference",
        metavar="NAME=CHECKOUT",
        action="append",
        default=[],
        help=f"time authors' code, from a checkout of it, too; NAME is one of {', '.join(references.KNOWN)}",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--threads", type=int, help="of torch; one for each core by default")
    parser.add_argument("--seconds", type=float, help="for one provider on one case")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny inputs: whether everything works, no times that count"
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, print, store."""
    options = arguments(given)
    entries = [ENTRIES[name] for name in options.entry or ENTRIES]
    if options.list:
        for entry in entries:
            print(f"{entry.name}: {entry.about}\n  " + "\n  ".join(case.name for case in entry.cases))
        return
    device = torch.device(options.device)
    measure.use_threads(options.threads)
    measure.keep_memory()
    setup = Setup(device, references.load(options.reference))
    surroundings = measure.surroundings(device)
    out = options.out or (None if options.tiny else measure.ROOT / "bench" / "results" / f"{device.type}.jsonl")
    for entry in entries:
        for case in chosen_cases(entry, options.case, device, options.tiny):
            print(f"{entry.name}, {case.name}", flush=True)
            rows = [{**row, **surroundings} for row in measure_case(entry, case, setup, options.seconds)]
            print("\n".join(map(line, rows)), flush=True)
            if out is not None:
                store(rows, out)


if __name__ == "__main__":
    main()
