"""Pictures from stored rows: `python -m bench.plot bench/results/*.jsonl --out docs`; of each case the latest run.

speed.png: time a voxel against the size, by provider. stages.png: cost of each stage of a step. memory.png: peak memory
a voxel. What there are no rows for is not drawn.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .measure import Row

# What is counted of kernels, besides the longest warp, of which there is no sum.
COUNTED = ("instructions", "sectors", "atomics")
# What the estimate assumes of an H100: multiprocessors with four schedulers each, of which each issues an instruction a
# cycle at best; the bytes a second of its memory at best; the share of both that kernels like these get; the cycles
# that an instruction of a warp takes where nothing is beside it; and what a launch costs the device.
MULTIPROCESSORS, SCHEDULERS, CLOCK, BANDWIDTH = 132, 4, 1.7e9, 3.35e12
SHARE, LATENCY, LAUNCH = 0.3, 12, 2.5e-6

SPEED = ("step", "step_cpu", "scaling", "labelling", "instance_terms", "reference")


def load(paths: Iterable[Path]) -> list[Row]:
    """The rows of the files; of several runs of a case on a kind of device, those of the latest."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]
    latest: dict[tuple[str, ...], str] = {}
    for row in rows:
        key = (row["entry"], row["case"], row["device"])
        latest[key] = max(latest.get(key, ""), row["date"])
    return [row for row in rows if row["date"] == latest[row["entry"], row["case"], row["device"]]]


def _caption(figure: Any, rows: list[Row]) -> None:
    devices = sorted({row["device_name"] for row in rows})
    commits = sorted({(row["commit"] or "unknown commit")[:9] for row in rows})
    figure.text(0.01, 0.005, f"{', '.join(devices)}; {', '.join(commits)}", fontsize=7, color="gray")


def _lines(axes: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """One line a provider (and kind of input) over the voxels of the case."""
    series = defaultdict(list)
    for row in rows:
        kind = "" if row["case"].startswith("lesions") else f", {row['case'].split(', ')[0]}"
        series[row["provider"] + kind].append((math.prod(row["shape"]), value(row)))
    for name, points in sorted(series.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="voxels")
    axes.legend(fontsize=5, ncols=2)


def _panels(rows: list[Row], names: Iterable[str], label: str, value: Callable[[Row], float]) -> Any:
    """A panel for each entry and device, or None without rows."""
    from matplotlib.figure import Figure

    groups = defaultdict(list)
    for row in rows:
        if row["entry"] in names:
            groups[row["entry"], row["device"]].append(row)
    if not groups:
        return None
    figure = Figure(figsize=(5.5 * len(groups), 4.5), dpi=130, layout="constrained")
    for axes, ((entry, device), members) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        _lines(axes, members, value)
        axes.set(title=f"{entry} ({device})", ylabel=label)
    _caption(figure, [row for members in groups.values() for row in members])
    return figure


def speed(rows: list[Row]) -> Any:
    """Nanoseconds a voxel."""
    timed = [row for row in rows if row.get("status") == "timed"]
    return _panels(timed, SPEED, "ns a voxel", lambda row: row["median_ms"] * 1e6 / math.prod(row["shape"]))


def memory(rows: list[Row]) -> Any:
    """Peak bytes a voxel."""
    known = [row for row in rows if row.get("peak_bytes")]
    return _panels(
        known, ("memory", "step", "step_cpu"), "peak bytes a voxel", lambda r: r["peak_bytes"] / math.prod(r["shape"])
    )


def stages(rows: list[Row]) -> Any:
    """Milliseconds, launches and bytes of each stage, or None without rows."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["entry"] == "stages"]
    if not rows:
        return None
    figure = Figure(figsize=(11, 3.5), dpi=130, layout="constrained")
    values = ("median_ms", "launches", "bytes_per_voxel")
    cases = sorted({(row["case"], row["device"]) for row in rows})
    for axes, value, label in zip(figure.subplots(1, 3), values, ("ms", "launches", "bytes a voxel"), strict=True):
        for place, (case, device) in enumerate(cases):
            members = [row for row in rows if (row["case"], row["device"]) == (case, device)]
            width = 0.8 / len(cases)
            positions = [index + place * width for index in range(len(members))]
            axes.bar(positions, [row[value] for row in members], width, label=f"{case} ({device})")
            axes.set_xticks(range(len(members)), [row["stage"] for row in members], fontsize=7, rotation=30)
        axes.set(ylabel=label)
    axes.legend(fontsize=6)
    _caption(figure, rows)
    return figure


def table(rows: list[Row], entry: str) -> str:
    """The timed rows of an entry as a Markdown table: medians with p20 and p80, and the ratio to the yardstick."""
    rows = [row for row in rows if row["entry"] == entry and row["status"] == "timed"]
    lines = ["| case | provider | ms, median [p20 .. p80] | ratio in the same run [p20 .. p80] |", "|---|---|---|---|"]
    for row in rows:
        time = f"{row['median_ms']:.1f} [{row['p20_ms']:.1f} .. {row['p80_ms']:.1f}]"
        ratio = f"{row['ratio']:.1f} [{row['ratio_p20']:.1f} .. {row['ratio_p80']:.1f}]"
        lines.append(f"| {row['case']} | {row['provider']} | {time} | {ratio} |")
    lines.append("")
    for name, threads, torch, commit in sorted(
        {(row["device_name"], row["threads"], row["versions"]["torch"], row["commit"][:9]) for row in rows}
    ):
        lines.append(f"{name}, {threads} threads, torch {torch}, commit {commit}.")
    return "\n".join(lines)


def estimate(rows: Iterable[Row], voxels: int) -> float:
    """Seconds on an H100 of a step of which kernels were counted, with so many voxels instead: estimated, not measured.

    A launch takes as long as the slowest of its instructions, its bytes and its longest warp. Instructions and bytes
    grow with the voxels, and the longest warp does not.
    """
    seconds = 0.0
    for row in rows:
        growth = voxels / row["voxels"]
        issue = row["instructions"] * growth / (MULTIPROCESSORS * SCHEDULERS * CLOCK * SHARE)
        move = 32 * row["sectors"] * growth / (BANDWIDTH * SHARE)
        seconds += row["launches"] * LAUNCH + max(issue, move, row["longest_warp"] * LATENCY / CLOCK)
    return seconds


def counters(rows: list[Row]) -> str:
    """The counted kernels of each case as Markdown tables, with the estimates."""
    rows, lines = [row for row in rows if row["entry"] == "counters"], []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        lines += [
            f"| {case} | launches | 1000 warp instructions | 1000 sectors | atomics | longest warp |",
            "|---|---|---|---|---|---|",
        ]
        total: Row = {"kernel": "all", "longest_warp": max(row["longest_warp"] for row in of_case)}
        total |= {name: sum(row[name] for row in of_case) for name in ("launches", *COUNTED)}
        for row in (*sorted(of_case, key=lambda row: -row["instructions"]), total):
            lines.append(
                f"| `{row['kernel']}` | {row['launches']} | {row['instructions'] / 1e3:.0f} | "
                f"{row['sectors'] / 1e3:.0f} | {row['atomics']} | {row['longest_warp']} |"
            )
        times = [1e6 * estimate(of_case, voxels) for voxels in (of_case[0]["voxels"], 2 * 128**3)]
        lines += ["", "Estimated for an H100: {:.0f} us, and {:.0f} us at 2 x 128^3.".format(*times), ""]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    """Draw what there are rows for."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="stored rows")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--table", metavar="ENTRY", help="print this entry as a Markdown table instead")
    options = parser.parse_args(given)
    rows = load(options.files)
    if options.table:
        print(counters(rows) if options.table == "counters" else table(rows, options.table))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("speed", speed), ("stages", stages), ("memory", memory)):
        figure = draw(rows)
        if figure is None:
            print(f"{name}: no rows")
        else:
            figure.savefig(options.out / f"{name}.png")
            print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
