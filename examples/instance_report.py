"""Which instance was found, by what, and how well: the table, the picture and the command line the examples share."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from triton_instance_loss import InstanceLoss, connected_components

MATCHED, MISSED, FALSE, NOT_USED = "matched", "missed", "false", "not used"
SMOOTH = 1e-5  # of the library's Dice, so that 1 - Dice is the value that enters the terms

# Okabe and Ito's colours, which colour-blind readers tell apart: blue is right, warm is wrong. Labels are outlines and
# outputs are areas, so the picture also reads in grey.
COLOURS = {
    ("label", MATCHED): "#0072B2",
    ("label", MISSED): "#D55E00",
    ("output", MATCHED): "#56B4E9",
    ("output", FALSE): "#E69F00",
    ("output", NOT_USED): "#BBBBBB",
}
LEGEND = {
    ("label", MATCHED): "label, matched",
    ("label", MISSED): "label, missed",
    ("output", MATCHED): "output, matched",
    ("output", FALSE): "output, false",
    ("output", NOT_USED): "output, not used individually",
}
MEANINGS = {
    "pixel": "all voxels at once",
    "instance_label": "mean over the label instances",
    "instance_output": "mean over the output instances",
    "center": "boxes around the centres",
    "false_instances": "outputs that touch no label",
    "missed_instances": "labels that no output touches",
    "proximity": "distance to the nearest partner",
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@dataclass(frozen=True)
class Instance:
    """One connected component of the labels or of the outputs."""

    side: str  # "label" or "output"
    number: int  # 1..n on its side, in the order of the ids
    status: str  # a label is matched or missed; an output is matched, false or not used
    size: int  # voxels
    center: tuple[float, ...]  # mean voxel coordinates
    matched_with: tuple[int, ...]  # numbers on the other side that it touches; of outputs, those that are kept
    dice: float | None  # 1 - its value in the instance terms with Dice; None if it is not used

    @property
    def name(self) -> str:
        """Short, as in the picture: L2 is label 2, O3 is output 3."""
        return f"{self.side[0].upper()}{self.number}"


@dataclass(frozen=True)
class Report:
    """All instances, labels first, and the maps that hold their numbers (0 is background)."""

    instances: list[Instance]
    labels: NDArray[np.int64]
    outputs: NDArray[np.int64]
    too_many: bool  # more outputs than mul_too_many for each label: none is used individually

    def count(self, side: str, status: str | None = None) -> int:
        """How many instances a side has, or has of one status."""
        return sum(i.side == side and status in (None, i.status) for i in self.instances)


def report(outputs: torch.Tensor, labels: torch.Tensor, loss: InstanceLoss) -> Report:
    """What the terms of `loss` see, instance by instance.

    Args:
        outputs: (1, 1, *spatial), what `loss` is called with: logits for "sigmoid", anything finite for "none".
        labels: (1, 1, *spatial), foreground where 1.
        loss: whose options decide what an instance is and which outputs are kept.

    Returns:
        The instances of both sides. The mean of 1 - Dice over the labels is the term instance_label (with Dice as
        criterion), that over the kept outputs instance_output, wherever both sides have instances.

    Raises:
        ValueError: more than one sample or channel, or the activation "softmax".
    """
    if outputs.shape[:2] != (1, 1) or loss.activation == "softmax":
        raise ValueError(f"report takes one sample of one channel without softmax, got {tuple(outputs.shape)}.")
    outputs, labels = outputs.detach().cpu(), labels.detach().cpu()
    threshold = loss.segmentation_threshold
    if loss.activation == "sigmoid":
        mask = torch.sigmoid(outputs) >= threshold
        activated = mask.double()
    else:
        mask = outputs >= threshold if threshold > 0 else outputs == 1
        activated = outputs.double()
    out_map, lab_map = number_map(mask, loss), number_map(labels == 1, loss)

    a = activated.numpy().ravel()
    y = (labels == 1).numpy().ravel()
    out, lab = out_map.ravel(), lab_map.ravel()
    num_outputs, num_labels = int(out.max()), int(lab.max())
    too_many = num_labels > 0 and num_outputs > num_labels * loss.mul_too_many
    kept = 0 if too_many else min(num_outputs, loss.max_cc_out or num_outputs)

    touching = np.unique(np.stack((out, lab), 1)[(out > 0) & (out <= kept) & (lab > 0)], axis=0)
    partners_out = [tuple(touching[touching[:, 0] == i, 1].tolist()) for i in range(num_outputs + 1)]
    partners_lab = [tuple(touching[touching[:, 1] == j, 0].tolist()) for j in range(num_labels + 1)]

    # The sums of SPEC section 6: the criterion of an instance needs no volume of its own.
    out_sizes, lab_sizes = sums(out), sums(lab)
    mass = sums(out, a)
    shared = sums(out, a * (lab > 0))
    excess = sums(out, a * a * ~y) if loss.instance_wise_loss_no_tp else mass
    covered = sums(lab, a * ((out > 0) & (out <= kept)))
    own = covered if loss.instance_wise_loss_no_tp else np.zeros(num_labels + 1)

    instances = []
    for j, center in enumerate(centers(lab_map), start=1):
        predicted = own[j] + sum(excess[i] for i in partners_lab[j])
        dice = (2 * covered[j] + SMOOTH) / (predicted + lab_sizes[j] + SMOOTH)
        status = MATCHED if partners_lab[j] else MISSED
        instances.append(Instance("label", j, status, int(lab_sizes[j]), center, partners_lab[j], float(dice)))
    for i, center in enumerate(centers(out_map), start=1):
        true = sum(lab_sizes[j] for j in partners_out[i])
        dice = (2 * shared[i] + SMOOTH) / (mass[i] + true + SMOOTH)
        status = NOT_USED if i > kept else MATCHED if partners_out[i] else FALSE
        used = None if i > kept else float(dice)
        instances.append(Instance("output", i, status, int(out_sizes[i]), center, partners_out[i], used))
    return Report(instances, lab_map, out_map, too_many)


def number_map(mask: torch.Tensor, loss: InstanceLoss) -> NDArray[np.int64]:
    """The numbers 1..n of the instances at each voxel, without those of `min_instance_size` voxels or fewer."""
    numbers, _ = connected_components(mask, loss.num_iterations, relabel=True)
    numbers = numbers[0, 0].numpy()
    large = np.bincount(numbers.ravel()) > loss.min_instance_size
    large[0] = False
    renumbered: NDArray[np.int64] = np.where(large, large.cumsum(), 0)[numbers]
    return renumbered


def sums(numbers: NDArray[np.int64], values: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Sum of `values` (or of ones) over each instance; entry 0 is the background."""
    return np.bincount(numbers, values).astype(np.float64)


def centers(numbers: NDArray[np.int64]) -> list[tuple[float, ...]]:
    """Mean voxel coordinates of the instances 1..n."""
    at = np.nonzero(numbers)
    sizes = sums(numbers[at])[1:]
    return list(zip(*((sums(numbers[at], axis)[1:] / sizes).tolist() for axis in at), strict=True))


def terms_table(columns: Mapping[str, Mapping[str, float]], formats: Mapping[str, str] | None = None) -> Table:
    """The terms, one row each; a column for each entry of `columns` (title -> term -> value)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("term", style="bold")
    for title in columns:
        table.add_column(title, justify="right")
    table.add_column("what it looks at", style="dim")
    formats = formats or {}
    for term in next(iter(columns.values())):
        values = [format(values[term], formats.get(title, ".4f")) for title, values in columns.items()]
        table.add_row(term, *values, MEANINGS[term])
    return table


def instance_table(found: Report, limit: int = 100) -> Table:
    """The instances, one row each, at most `limit` of a side."""
    styles = {MATCHED: "", MISSED: "bold red", FALSE: "yellow", NOT_USED: "dim"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("instance", "status"):
        table.add_column(title, no_wrap=True)
    for title in ("voxels", "centre", "matched with", "Dice"):
        table.add_column(title, justify="right", no_wrap=title != "matched with")
    for side, other in (("label", "output"), ("output", "label")):
        mine = [i for i in found.instances if i.side == side]
        for one in mine[:limit]:
            table.add_row(
                f"{side} {one.number}",
                one.status,
                str(one.size),
                ", ".join(f"{c:.1f}" for c in one.center),
                f"{other} {', '.join(map(str, one.matched_with))}" if one.matched_with else "-",
                "-" if one.dice is None else f"{one.dice:.4f}",
                style=styles[one.status],
            )
        if len(mine) > limit:
            table.add_row(f"... {len(mine) - limit} more {side}s")
        table.add_section()
    return table


def print_table(console: Console, terms: Table, found: Report) -> None:
    """Print the terms and the instances, and say what is not used."""
    console.print(terms)
    console.print(instance_table(found))
    unused = found.count("output", NOT_USED)
    if unused:
        why = "too many outputs for each label" if found.too_many else "beyond the cap"
        console.print(f"{unused} outputs are not used individually ({why}); false_instances counts them all.")


def steps() -> Progress:
    """A spinner with the present step, on stderr and only if that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def stdout_console() -> Console:
    """Rich on stdout, wide enough for the tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def draw(path: Path, found: Report, *, title: str = "", panels: int = 6) -> None:
    """Write a PNG: outlines of the labels, areas of the outputs, and the number of each instance.

    A volume is shown in the slices, at most `panels` of them and along the axis where that goes best, that together
    show the most instances, each as near as possible to where it is largest. An image is shown as it is.
    """
    axis, slices = choose_slices(found, panels) if found.labels.ndim == 3 else (2, [0])
    labels, outputs = (np.moveaxis(np.atleast_3d(numbers), axis, 2) for numbers in (found.labels, found.outputs))
    window = bounds((labels > 0) | (outputs > 0))
    extents = [high - low for low, high in window]
    width = min(len(slices), 3)
    rows = math.ceil(len(slices) / width)
    panel = 7.0 if len(slices) == 1 else 4.0
    tall = (panel - 0.45) * min(max(extents[1] / extents[0], 0.4), 1.6)

    figure = Figure(
        figsize=(panel * width + 0.4, (tall + 0.6) * rows + (0.8 if title else 0.5)), dpi=110, layout="constrained"
    )
    grid = figure.subplots(rows, width, squeeze=False)
    names = [name for position, name in enumerate("xyz") if position != axis]
    for panel_axes in grid.ravel()[len(slices) :]:
        panel_axes.set_axis_off()
    for panel_axes, position in zip(grid.ravel(), slices, strict=False):
        draw_slice(panel_axes, found, labels[:, :, position], outputs[:, :, position])
        panel_axes.set(xlim=(window[0][0] - 0.5, window[0][1] - 0.5), ylim=(window[1][0] - 0.5, window[1][1] - 0.5))
        panel_axes.set(xlabel=names[0], ylabel=names[1])
        if found.labels.ndim == 3:
            panel_axes.set_title(f"{'xyz'[axis]} = {position}", fontsize=10, color="#333333")
    if title:
        figure.suptitle(title, fontsize=11, color="#333333")
    handles: list[Patch | Line2D] = []
    for (side, status), text in LEGEND.items():
        number, colour = found.count(side, status), COLOURS[side, status]
        if number == 0:
            continue
        text = f"{text} ({number})"
        if side == "label":
            handles.append(Patch(facecolor="none", edgecolor=colour, linewidth=2.2, label=text))
        else:
            handles.append(Patch(facecolor=colour, edgecolor="none", label=text))
    if handles:
        columns = len(handles) if len(slices) > 1 else min(len(handles), 2 if len(handles) == 4 else 3)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    figure.draw_without_rendering()  # settles the layout, so that numbers know how much room they take
    for panel_axes, position in zip(grid.ravel(), slices, strict=False):
        write_numbers(panel_axes, found, labels[:, :, position], outputs[:, :, position])
    figure.savefig(path, format="png", metadata={"Software": None})


def choose_slices(found: Report, panels: int) -> tuple[int, list[int]]:
    """The axis and the positions along it that show the instances best."""
    best: tuple[float, int, list[int]] = (-1.0, 2, [found.labels.shape[2] // 2])
    for axis in (2, 1, 0):
        length = found.labels.shape[axis]
        shares = []
        for numbers in (found.labels, found.outputs):
            at = np.nonzero(numbers)
            count = int(numbers.max())
            areas = np.bincount((numbers[at] - 1) * length + at[axis], minlength=count * length)
            areas = areas.reshape(count, length)
            shares.append(0.3 * (areas > 0) + 0.7 * areas / areas.max(axis=1, keepdims=True))
        share = np.concatenate(shares)  # 1 where an instance has its largest section, above 0.3 where it is seen at all
        shown = np.zeros(len(share))
        chosen: list[int] = []
        while len(share) and len(chosen) < panels:
            gains = np.maximum(share - shown[:, None], 0).sum(axis=0)
            equal = np.flatnonzero(gains > gains.max() - 1e-6)
            position = int(equal[len(equal) // 2])
            if gains[position] < 0.3:
                break
            chosen.append(position)
            shown = np.maximum(shown, share[:, position])
        score = float((shown > 0).sum() + shown.mean()) if len(shown) else -1.0
        if score > best[0]:
            best = (score, axis, sorted(chosen))
    return best[1], best[2]


def bounds(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where anything is along the two axes of the picture, with a margin of a twelfth."""
    window = []
    for axis in (0, 1):
        size = mask.shape[axis]
        filled = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        low, high = (filled[0], filled[-1] + 1) if len(filled) else (0, size)
        margin = max(2, round((high - low) / 12))
        window.append((max(0, int(low) - margin), min(size, int(high) + margin)))
    return window


def draw_slice(axes: Any, found: Report, labels: NDArray[np.int64], outputs: NDArray[np.int64]) -> None:
    """One slice: areas of the outputs below the outlines of the labels."""
    fills = np.zeros((found.count("output") + 1, 4))
    for one in found.instances:
        if one.side == "output":
            fills[one.number] = to_rgba(COLOURS["output", one.status])
    axes.imshow(fills[outputs].transpose(1, 0, 2), origin="lower", interpolation="nearest", aspect="equal")
    for status in (MATCHED, MISSED):
        numbers = [one.number for one in found.instances if one.side == "label" and one.status == status]
        lines = list(outline(labels, np.isin(labels, numbers)))
        axes.add_collection(
            LineCollection(
                lines, colors=COLOURS["label", status], linewidths=1.8, antialiaseds=False, capstyle="projecting"
            )
        )
    axes.tick_params(labelsize=7, length=2, colors="#777777")
    axes.xaxis.label.set(fontsize=8, color="#777777")
    axes.yaxis.label.set(fontsize=8, color="#777777")
    for spine in axes.spines.values():
        spine.set(color="#CCCCCC")


def outline(numbers: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(segments, 2, 2): the voxel edges between the chosen instances and anything else."""
    lines = []
    for axis in (0, 1):
        padding = [(1, 1) if axis == other else (0, 0) for other in (0, 1)]
        n, c = np.pad(numbers, padding), np.pad(chosen, padding)
        before, after = (slice(None, -1), slice(1, None))
        if axis == 1:
            n, c = n.T, c.T
        border = (n[before] != n[after]) & (c[before] | c[after])
        edge, along = np.nonzero(border)
        points = np.stack((np.stack((edge - 0.5, along - 0.5), 1), np.stack((edge - 0.5, along + 0.5), 1)), axis=1)
        lines.append(points if axis == 0 else points[:, :, ::-1])
    return np.concatenate(lines)


def write_numbers(axes: Any, found: Report, labels: NDArray[np.int64], outputs: NDArray[np.int64]) -> None:
    """L1, O2, ... beside each instance of a slice, where no other number is; left out where there is no room."""
    taken: list[Any] = []
    inside = axes.get_window_extent()
    halo = [patheffects.withStroke(linewidth=2.4, foreground="white")]
    for one in found.instances:
        at = np.nonzero((labels if one.side == "label" else outputs) == one.number)
        if not len(at[0]):
            continue
        (left, bottom), (right, top) = np.min(at, axis=1), np.max(at, axis=1)
        over, under = at[0][at[1] == top].mean(), at[0][at[1] == bottom].mean()
        beside, before = at[1][at[0] == right].mean(), at[1][at[0] == left].mean()
        places = [
            ((over, top + 0.5), (0, 2), "center", "bottom"),
            ((under, bottom - 0.5), (0, -2), "center", "top"),
            ((right + 0.5, beside), (3, 0), "left", "center"),
            ((left - 0.5, before), (-3, 0), "right", "center"),
            ((right + 0.5, top + 0.5), (2, 1), "left", "bottom"),
            ((left - 0.5, bottom - 0.5), (-2, -1), "right", "top"),
            ((np.mean(at[0]), np.mean(at[1])), (0, 0), "center", "center"),
        ]
        if one.side == "output":
            places[0], places[1] = places[1], places[0]
        for point, offset, horizontal, vertical in places:
            text = axes.annotate(
                one.name,
                point,
                xytext=offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                fontweight="bold" if one.side == "label" else "normal",
                color="#B34700" if one.status == MISSED else "#003F66" if one.side == "label" else "#222222",
                path_effects=halo,
            )
            room = text.get_window_extent()
            free = inside.x0 <= room.x0 and room.x1 <= inside.x1 and inside.y0 <= room.y0 and room.y1 <= inside.y1
            if free and not any(room.overlaps(other) for other in taken):
                taken.append(room)
                break
            text.remove()


def by_term(terms: Any) -> dict[str, float]:
    """Named terms as numbers."""
    return {name: float(value) for name, value in terms._asdict().items()}
