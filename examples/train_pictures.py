"""The pictures of `train.py`: scores, curves, and images on which its arms differ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from train_data import ImageSet
from train_report import OVERALL, THRESHOLDS, Results, by_arm, classes, false_outputs, recalls

from triton_instance_loss import connected_components
from triton_instance_loss.metrics import instance_metrics

# Okabe and Ito's colours, which colour-blind readers tell apart, and dashes where they come again.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999")
MATCHED, MISSED, RIGHT, FALSE = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": "-" if number < len(COLOURS) else "--",
        "marker": "o" if number < len(COLOURS) else "s",
        "markersize": 4,
        "linewidth": 1.2,
    }


def draw_scores(path: Path, results: Results) -> None:
    """Scores of every run, recall against false outputs as the threshold moves, and both by size."""
    arms, names = by_arm(results), classes(results)
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    scores, trade, recall, false = figure.subplots(2, 2).ravel()
    shown = ("dice", "f1", "recall", "strict_f1", "pq")
    places, width, furthest = range(len(names)), 0.8 / len(arms), 0.01
    for number, (arm, runs) in enumerate(arms.items()):
        style = _style(number)
        shift = (number - len(arms) / 2 + 0.5) * width
        for column, name in enumerate(shown):
            values, dots = [run[name] for run in runs], style | {"linestyle": "none"}
            scores.plot([column + shift] * len(values), values, label=None if column else arm, **dots)
        x, y = (np.mean([[p[name] for p in run["curve"]] for run in runs], 0) for name in ("false", "recall"))
        trade.plot(x, y, **(style | {"marker": ""}))
        half = THRESHOLDS.index(0.5)
        trade.plot(x[half], y[half], **style)
        furthest = max(furthest, 1.5 * x[half])
        recall.plot(places, recalls(runs), **style)
        at = [place + shift for place in places]
        false.bar(at, false_outputs(runs, results["images"]["test"]), width, color=style["color"])
    scores.set_xticks(range(len(shown)), [OVERALL[name] for name in shown], fontsize=9)
    scores.set_title("every seed a mark", fontsize=11)
    trade.set(xlabel="false outputs an image", ylabel="recall", xlim=(0, furthest))
    trade.set_title("moving the threshold; marks at 0.5", fontsize=11)
    for axes, title in ((recall, "recall, by size in voxels"), (false, "false outputs an image, by size in voxels")):
        axes.set_xticks(places, names, fontsize=9)
        axes.set_title(title, fontsize=11)
    for axes in (scores, trade, recall, false):
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def draw_curves(path: Path, results: Results) -> None:
    """Scores on validation images while training, mean of the seeds."""
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    shown = ("dice", "f1", "pq", "false")
    for axes, name in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for number, (arm, runs) in enumerate(by_arm(results).items()):
            if runs[0]["checked"]:
                steps = [check["step"] for check in runs[0]["checked"]]
                values = np.mean([[check[name] for check in run["checked"]] for run in runs], 0)
                axes.plot(steps, values, label=arm if name == "dice" else None, **_style(number))
        axes.set_title(OVERALL[name], fontsize=11)
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        if name == "false":
            axes.set_yscale("symlog", linthresh=1)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def draw_examples(path: Path, images: ImageSet, found: dict[str, Tensor], rows: int = 3) -> None:
    """Test images on which the arms differ most, by the spread of their lesion F1, and what each makes of them."""
    truth = images.test.instances
    options: dict[str, Any] = {"activation": "none", "spatial_dims": images.dims, "cc_label_batch": truth}
    labels = (truth > 0).float()
    each = torch.stack([instance_metrics(outputs, labels, **options).f1 for outputs in found.values()])
    spread = (each.amax(0) - each.amin(0)) * labels.flatten(1).any(1)
    chosen = spread.argsort(descending=True)[:rows].tolist()
    figure = Figure(figsize=(1.9 * (len(found) + 1), 2.2 * len(chosen)), dpi=110, layout="constrained")
    grid = figure.subplots(len(chosen), len(found) + 1, squeeze=False)
    for axes_row, index in zip(grid, chosen, strict=True):
        for axes, (arm, outputs) in zip(axes_row, ({"image": None} | found).items(), strict=True):
            axes.set_title(arm.replace(", ", ",\n"), fontsize=7)
            draw_image(axes, images, index, outputs)
    figure.savefig(path, metadata={"Software": None})


def draw_image(axes: Any, images: ImageSet, index: int, outputs: Tensor | None) -> None:
    """One test image; of a volume the slice with the most foreground. Outlines are labels, areas are outputs.

    Blue where they match, a label that is missed red, a false output orange.
    """
    instances = images.test.instances[index : index + 1]
    shown: tuple[Any, ...] = (0, 0)
    if images.dims == 3:
        shown += (..., int((instances > 0).sum((0, 1, 2, 3)).argmax()))
    axes.imshow(images.test.images[index : index + 1][shown], cmap="gray")
    axes.set(xticks=[], yticks=[])
    if outputs is None:
        return
    numbers = connected_components(outputs[index : index + 1] >= 0.5)
    for mine, other, colours, draw in (
        (numbers, instances, (RIGHT, FALSE), "area"),
        (instances, numbers, (MATCHED, MISSED), "outline"),
    ):
        touches = torch.isin(mine, mine[(mine > 0) & (other > 0)].unique())
        for of_kind, colour in zip(((mine > 0) & touches, (mine > 0) & ~touches), colours, strict=True):
            mask = of_kind[shown].numpy()
            if mask.any() and draw == "area":
                axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.6)
            elif mask.any():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)
