"""Scores of segmented lesions, and the tables and pictures of `train_synthetic.py`."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import ndimage

RADII = (1.5, 2.5, 4.0)  # between the classes of size; the radius is that of a ball with as many voxels
CLASSES = ("< 1.5", "1.5-2.5", "2.5-4", "> 4")
OVERALL = {
    "dice": "Dice",
    "f1": "lesion F1",
    "strict_f1": "F1, IoU > 0.5",
    "recall": "recall",
    "false_per_image": "false an image",
}
AT = 0.2  # false outputs an image at which runs are compared, whatever the threshold
# Below these, outputs may run together into one.
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#999999")

Results = dict[str, Any]


def size_classes(voxels: NDArray[np.int64], dims: int) -> NDArray[np.int64]:
    """The class of size of each instance."""
    radius = np.sqrt(voxels / np.pi) if dims == 2 else np.cbrt(voxels * 0.75 / np.pi)
    return np.digitize(radius, RADII)


def score(outputs: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Results:
    """How well `outputs` (images, *spatial) find the lesions of `truth`.

    dice is the mean over images. A lesion is found if any output touches it, an output false if it touches no lesion;
    f1, recall and false_per_image follow from that over all images. strict_f1 asks for pairs with IoU above 0.5.
    """
    dims = truth.ndim - 1
    neighbours = np.ones((3,) * dims)
    dice, pairs = [], 0
    counts = {name: np.zeros(len(CLASSES), dtype=int) for name in ("labels", "found", "outputs", "false")}
    for output, label in zip(outputs, truth, strict=True):
        out, number_out = ndimage.label(output, neighbours)
        lab, number_lab = ndimage.label(label, neighbours)
        table = (number_lab + 1, number_out + 1)
        both = np.ravel_multi_index((lab.ravel(), out.ravel()), table)
        overlaps = np.bincount(both, minlength=table[0] * table[1]).reshape(table)
        size_lab, size_out = overlaps.sum(1)[1:], overlaps.sum(0)[1:]
        overlaps = overlaps[1:, 1:]
        dice.append(2 * overlaps.sum() / max(size_lab.sum() + size_out.sum(), 1))
        pairs += int((overlaps > (size_lab[:, None] + size_out - overlaps) * 0.5).sum())
        for name, sizes in (
            ("labels", size_lab),
            ("found", size_lab[overlaps.any(1)]),
            ("outputs", size_out),
            ("false", size_out[~overlaps.any(0)]),
        ):
            counts[name] += np.bincount(size_classes(sizes, dims), minlength=len(CLASSES))
    labels, found, number, false = (int(counts[name].sum()) for name in ("labels", "found", "outputs", "false"))
    recall, precision = found / max(labels, 1), (number - false) / max(number, 1)
    return {
        "dice": round(float(np.mean(dice)), 4),
        "f1": round(2 * recall * precision / max(recall + precision, 1e-9), 4),
        "strict_f1": round(2 * pairs / max(labels + number, 1), 4),
        "recall": round(recall, 4),
        "false_per_image": round(false / len(truth), 4),
        **{f"{name}_by_size": count.tolist() for name, count in counts.items()},
    }


def curve(probabilities: NDArray[np.float32], truth: NDArray[np.bool_]) -> list[Results]:
    """Recall and false outputs an image at each of `THRESHOLDS`."""
    points = []
    for threshold in THRESHOLDS:
        scores = score(probabilities >= threshold, truth)
        points.append({"threshold": threshold} | {name: scores[name] for name in ("recall", "false_per_image")})
    return points


def recall_at(points: list[Results], false: float) -> float:
    """Recall where a run has so many false outputs an image, between thresholds in a straight line."""
    places = sorted((point["false_per_image"], point["recall"]) for point in points)
    return float(np.interp(false, *zip(*places, strict=True), left=np.nan))


def surroundings() -> Results:
    """Device, versions, commit and date."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "monai", "numpy", "scipy", "triton_instance_loss"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def bars() -> Progress:
    """Progress bars on stderr, only if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def by_arm(results: Results) -> dict[str, list[Results]]:
    """The runs of each arm."""
    arms: dict[str, list[Results]] = {}
    for run in results["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def recalls(runs: list[Results]) -> list[float]:
    """The share of lesions found, by size, over all runs of an arm."""
    labels, found = (np.sum([run[name] for run in runs], axis=0) for name in ("labels_by_size", "found_by_size"))
    return list(found / np.maximum(labels, 1))


def false_outputs(runs: list[Results], images: int) -> list[float]:
    """False outputs an image, by size, over all runs of an arm."""
    return list(np.sum([run["false_by_size"] for run in runs], axis=0) / (images * len(runs)))


def tables(results: Results) -> list[list[list[str]]]:
    """Two tables, each a list of rows of which the first is the head: overall, and by size."""
    overall = [["trained with", *OVERALL.values(), f"recall at {AT} false"]]
    head = [f"{what} {name}" for what in ("recall", "false") for name in CLASSES]
    by_size = [["by radius", *head]]
    for arm, runs in by_arm(results).items():
        cells = []
        columns = [[run[name] for run in runs] for name in OVERALL]
        columns.append([recall_at(run["curve"], AT) for run in runs])
        for values in columns:
            cells.append(f"{mean(values):.3f} ({min(values):.3f}..{max(values):.3f})")
        overall.append([arm, *cells])
        sizes = [f"{value:.2f}" for value in recalls(runs) + false_outputs(runs, results["setting"]["test_images"])]
        by_size.append([arm, *sizes])
    return [overall, by_size]


def footer(results: Results) -> str:
    """Where the numbers come from."""
    setting, versions = results["setting"], results["versions"]
    share = setting.get("empty", 0)  # runs of before there was a choice do not have it
    empty = f"{100 * share:g} % of the training images empty, " if share else ""
    return (
        f"{setting['dims']}D, {setting['seeds']} seeds, {setting['steps']} steps, "
        f"{empty}{setting['test_images']} test images; "
        f"{results['device']}, {results['threads']} threads, torch {versions['torch']}, MONAI {versions['monai']}, "
        f"commit {results['commit']}, {results['date'][:10]}; {results['seconds']:.0f} s, "
        f"{results['processor_seconds']:.0f} s of processor time."
    )


def markdown(results: Results) -> str:
    """The tables in Markdown."""
    lines = []
    for head, *rows in tables(results):
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]
    return "\n".join([*lines, footer(results)])


def print_tables(console: Console, results: Results) -> None:
    """The tables on the terminal."""
    for head, *rows in tables(results):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(head[0], no_wrap=True)
        for title in head[1:]:
            table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for name, *cells in rows:
            table.add_row(name, *(cell.replace(" (", "\n").rstrip(")") for cell in cells))
        console.print(table)
    console.print(
        "Mean and lowest..highest of the seeds. By radius: recall, and false outputs an image, over all seeds."
    )
    console.print(footer(results), markup=False, highlight=False)


def draw_scores(path: Path, results: Results) -> None:
    """Scores of every run, recall against false outputs as the threshold moves, and both by size."""
    arms = by_arm(results)
    figure = Figure(figsize=(11, 7.6), dpi=100, layout="constrained")
    scores, trade, recall, false = figure.subplots(2, 2).ravel()
    names = ("dice", "f1", "strict_f1", "recall")
    places = range(len(CLASSES))
    width, furthest = 0.8 / len(arms), 0.01
    for number, (arm, runs) in enumerate(arms.items()):
        style: dict[str, Any] = {"color": COLOURS[number], "markersize": 4, "linewidth": 1.2}
        shift = (number - len(arms) / 2 + 0.5) * width
        for column, name in enumerate(names):
            values = [run[name] for run in runs]
            scores.plot([column + shift] * len(values), values, "o", label=None if column else arm, **style)
        x, y = (np.mean([[p[name] for p in run["curve"]] for run in runs], 0) for name in ("false_per_image", "recall"))
        trade.plot(x, y, "-", **style)
        half = THRESHOLDS.index(0.5)
        trade.plot(x[half], y[half], "o", **style)
        furthest = max(furthest, 1.3 * x[half])
        recall.plot(places, recalls(runs), "o-", **style)
        at = [place + shift for place in places]
        false.bar(at, false_outputs(runs, results["setting"]["test_images"]), width, color=COLOURS[number])
    scores.set_xticks(range(len(names)), [OVERALL[name] for name in names], fontsize=9)
    scores.set_title("every seed a dot", fontsize=11)
    trade.set(xlabel="false outputs an image", ylabel="recall", xlim=(0, furthest))
    trade.set_title("moving the threshold; dots at 0.5", fontsize=11)
    for axes, title in (
        (recall, "recall, by radius of the lesion"),
        (false, "false outputs an image, by their radius"),
    ):
        axes.set_xticks(places, CLASSES, fontsize=9)
        axes.set_title(title, fontsize=11)
    for axes in (scores, trade, recall, false):
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def draw_example(
    path: Path, images: NDArray[np.float32], truth: NDArray[np.bool_], outputs: dict[str, NDArray[np.bool_]]
) -> None:
    """The two test images with the most lesions, and what every arm of the first seed makes of them.

    Of a volume, the slice with the most lesions. Outlines are lesions: blue if found, red if not; areas are outputs.
    """
    neighbours = np.ones((3,) * (truth.ndim - 1))
    lesions = [ndimage.label(label, neighbours) for label in truth]
    most = np.argsort([-number for _, number in lesions], kind="stable")[:2]
    panels = Figure(figsize=(2.2 * (len(outputs) + 1), 2.3 * len(most)), dpi=110, layout="constrained")
    grid = panels.subplots(len(most), len(outputs) + 1, squeeze=False)
    for axes_row, index in zip(grid, most, strict=True):
        lab = lesions[index][0]
        shown: Any = ...
        if truth.ndim == 4:
            shown = (..., int(np.argmax([len(np.unique(lab[..., z])) for z in range(lab.shape[-1])])))
        for axes, (arm, found) in zip(axes_row, ({"image": None} | outputs).items(), strict=True):
            axes.imshow(images[index][shown], cmap="gray")
            axes.set(xticks=[], yticks=[])
            axes.set_title(arm.replace(", ", ",\n").replace(" and", "\nand"), fontsize=7)
            if found is None:
                continue
            out, _ = ndimage.label(found[index], neighbours)
            correct, detected = np.unique(out[lab > 0]), np.unique(lab[out > 0])
            for mask, colour in (
                ((out > 0) & np.isin(out, correct), "#56B4E9"),
                ((out > 0) & ~np.isin(out, correct), "#E69F00"),
            ):
                if mask[shown].any():
                    axes.contourf(mask[shown], levels=[0.5, 1.5], colors=[colour], alpha=0.6)
            for mask, colour in (
                ((lab > 0) & np.isin(lab, detected), "#0072B2"),
                ((lab > 0) & ~np.isin(lab, detected), "#D55E00"),
            ):
                if mask[shown].any():
                    axes.contour(mask[shown], levels=[0.5], colors=[colour], linewidths=1.2)
    panels.savefig(path, metadata={"Software": None})
