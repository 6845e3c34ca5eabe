"""The picture of a report: slices with label outlines and output fills, by what became of each instance."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from instance_report import FALSE, MATCHED, MISSED, NOT_USED, Report
from matplotlib import patheffects
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

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
