"""Scores of segmented images, and the tables of `train.py`."""

import datetime
import itertools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from triton_instance_loss.metrics import InstanceMetrics, instance_metrics

OVERALL = {
    "dice": "Dice",
    "f1": "lesion F1",
    "recall": "recall",
    "false": "false an image",
    "strict_f1": "F1, IoU > 0.5",
    "pq": "PQ",
}
# Below these, outputs may run together into one.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)

Results = dict[str, Any]


def score(probabilities: Tensor, instances: Tensor, sizes: tuple[int, ...]) -> Results:
    """How well the outputs (n, 1, *spatial) find the instances of the labels, over all images, at a threshold of 0.5.

    dice is that of all pixels, mean over the images with an instance. recall, false outputs an image and lesion F1 go
    by what touches; strict_f1 and panoptic quality by pairs with an IoU above 0.5, and are those of all images at once.
    """
    labels = (instances > 0).float()
    touched = _metrics(probabilities, instances, 0.5, sizes=sizes)
    paired = _metrics(probabilities, instances, 0.5, matching="iou")
    outputs = (probabilities >= 0.5).float()
    both, parts = ((each.flatten(1)).sum(1) for each in (outputs * labels, outputs + labels))
    shown = labels.flatten(1).any(1)
    pairs = float(paired.matched.sum())
    quality = float((paired.segmentation_quality * paired.matched).sum())
    all_instances = float((paired.num_outputs + paired.num_labels).sum())
    return {
        "dice": round(float((2 * both / parts.clamp(min=1))[shown].mean()), 4),
        **_found(touched, len(labels)),
        "strict_f1": round(2 * pairs / max(all_instances, 1), 4),
        "pq": round(2 * quality / max(all_instances, 1), 4),
        "labels_by_size": touched.num_labels.sum(0).int().tolist(),
        "found_by_size": touched.matched.sum(0).int().tolist(),
        "false_by_size": touched.false.sum(0).int().tolist(),
    }


def curve(probabilities: Tensor, instances: Tensor) -> list[Results]:
    """Recall, lesion F1 and false outputs an image at each of `THRESHOLDS`."""
    return [
        {"threshold": threshold} | _found(_metrics(probabilities, instances, threshold), len(instances))
        for threshold in THRESHOLDS
    ]


def _metrics(probabilities: Tensor, instances: Tensor, threshold: float, **options: Any) -> InstanceMetrics:
    options |= {"activation": "none", "spatial_dims": instances.ndim - 2, "segmentation_threshold": threshold}
    return instance_metrics(probabilities, (instances > 0).float(), instances, **options)


def _found(touched: InstanceMetrics, images: int) -> Results:
    """Lesion F1, recall and false outputs an image, over all images."""
    number, total, found, false = (
        int(each.sum()) for each in (touched.num_outputs, touched.num_labels, touched.matched, touched.false)
    )
    recall, precision = found / max(total, 1), (number - false) / max(number, 1)
    return {
        "f1": round(2 * recall * precision / max(recall + precision, 1e-9), 4),
        "recall": round(recall, 4),
        "false": round(false / images, 4),
    }


def recall_at(points: list[Results], false: float) -> float:
    """Recall where a run has so many false outputs an image, between thresholds in a straight line."""
    places = sorted((point["false"], point["recall"]) for point in points)
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


def classes(results: Results) -> list[str]:
    """Names of the classes of size, in voxels."""
    sizes = results["setting"]["sizes"]
    between = [f"{low}-{high - 1}" for low, high in itertools.pairwise(sizes)]
    return [f"< {sizes[0]}", *between, f">= {sizes[-1]}"]


def recalls(runs: list[Results]) -> list[float]:
    """The share of labels found, by size, over all runs of an arm."""
    labels, found = (np.sum([run[name] for run in runs], axis=0) for name in ("labels_by_size", "found_by_size"))
    return list(found / np.maximum(labels, 1))


def false_outputs(runs: list[Results], images: int) -> list[float]:
    """False outputs an image, by size, over all runs of an arm."""
    return list(np.sum([run["false_by_size"] for run in runs], axis=0) / (images * len(runs)))


def tables(results: Results) -> list[list[list[str]]]:
    """Two tables, each a list of rows of which the first is the head: overall, and by size."""
    at, costs = results["setting"]["at"], results["cost"]
    names = dict(zip(results["setting"]["arms"], by_arm(results), strict=False))
    of_arm = {title: costs[arm] for arm, title in names.items()}
    overall = [["trained with", *OVERALL.values(), f"recall at {at} false", "a step"]]
    by_size = [["by size", *(f"{what} {name}" for what in ("recall", "false") for name in classes(results))]]
    for arm, runs in by_arm(results).items():
        columns = [[run[name] for run in runs] for name in OVERALL]
        columns.append([recall_at(run["curve"], at) for run in runs])
        # (a run that has more false outputs at every threshold has no recall at so few)
        cells = [
            "-" if np.isnan(values).any() else f"{mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"
            for values in columns
        ]
        overall.append([arm, *cells, f"x {of_arm[arm]:.2f}" if arm in of_arm else ""])
        sizes = [f"{value:.2f}" for value in recalls(runs) + false_outputs(runs, results["images"]["test"])]
        by_size.append([arm, *sizes])
    return [overall, by_size]


def footer(results: Results) -> str:
    """Where the numbers come from."""
    setting, versions, images = results["setting"], results["versions"], results["images"]
    empty = "" if setting["empty"] is None else f"{100 * setting['empty']:g} % of the patches empty, "
    return (
        f"{setting['set']}, {setting['dims']}D, {setting['seeds']} seeds, {setting['steps']} steps, {empty}"
        f"{images['train']} images train, {images['test']} test; {results['device']}, {results['threads']} threads, "
        f"torch {versions['torch']}, MONAI {versions['monai']}, commit {results['commit']}, {results['date'][:10]}; "
        f"{results['seconds']:.0f} s."
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
    console.print("Mean and lowest..highest of the seeds. By size in voxels: recall, and false outputs an image.")
    console.print(footer(results), markup=False, highlight=False)
