"""Pictures of what is matched, missed and false, with matplotlib: `draw_instances`."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import checks, ops
from .matching import find_sides, rules
from .table import FALSE, LABEL, MATCHED, MISSED, OUTPUT, tabulate

try:
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError(
        "triton_instance_loss.plot needs matplotlib: `pip install 'triton_instance_loss[examples]'`."
    ) from error

NOT_USED = 3  # an output that a loss leaves out (max_cc_out, mul_too_many); metrics have none
# Okabe and Ito's colours, which colour-blind readers tell apart: blue is right, warm is wrong. Labels are outlines and
# outputs are areas, so the picture also reads in grey.
COLOURS = {
    (LABEL, MATCHED): "#0072B2",
    (LABEL, MISSED): "#D55E00",
    (OUTPUT, MATCHED): "#56B4E9",
    (OUTPUT, FALSE): "#E69F00",
    (OUTPUT, NOT_USED): "#BBBBBB",
}
LEGEND = {
    (LABEL, MATCHED): "label, matched",
    (LABEL, MISSED): "label, missed",
    (OUTPUT, MATCHED): "output, matched",
    (OUTPUT, FALSE): "output, false",
    (OUTPUT, NOT_USED): "output, not used individually",
}
INK, GREY = "#333333", "#777777"
Volume = NDArray[Any]


def draw_instances(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    cc_output_batch: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    image: Tensor | None = None,
    sample: int = 0,
    panels: int = 6,
    numbers: bool = True,
    title: str = "",
    **options: Any,
) -> Figure:
    """Draw one sample: outlines of the labels, areas of the outputs, in the colour of what became of each.

    Matched labels are blue, missed ones red; matched outputs are light blue, false ones orange. A volume is shown in
    the slices that together show the most instances, along the axis where that goes best, each instance as near as
    possible to where it is largest. Rows go down and columns to the right, as in the array.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64, as in `instance_metrics`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional numbers of the label instances.
        cc_output_batch: (B, 1, *spatial), optional numbers of the output instances.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        image: (B, C, *spatial), any real dtype, optional: its first channel is drawn in grey behind the instances, and
            the whole of it is shown. Without it the picture ends near the outermost instances.
        sample: which of the B samples.
        panels: at most so many slices of a volume.
        numbers: write L1, O2, ... beside the instances, where there is room; they are those of `instance_table`.
        title: a line above the picture.
        **options: keyword options of `instance_metrics`, same names, checks and defaults, but `sizes`; `object_chn`
            is one class, and `spacing` is also the aspect of the picture.

    Returns:
        A `matplotlib.figure.Figure`: `figure.savefig("instances.png")`, or TensorBoard's
        `writer.add_figure("instances", figure, step)`. It belongs to no window, so there is nothing to close.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: An option or shape is not allowed, the tensors do not fit each other, or `outputs` holds NaN or
            infinity.

    Note:
        On CUDA it waits for the device. Colours are those of Okabe and Ito.

    Example:
        >>> import torch
        >>> labels, outputs = torch.zeros(2, 1, 1, 16, 16)
        >>> labels[..., 2:6, 2:6], outputs[..., 3:7, 3:7], outputs[..., 12:14, 9:13] = 1, 1, 1
        >>> figure = draw_instances(outputs, labels, activation="none", spatial_dims=2)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['label, matched (1)', 'output, matched (1)', 'output, false (1)']
    """
    asked = rules(**options)
    if len(asked.options.classes) > 1:
        raise ValueError(f"object_chn must be one class for a picture, got {asked.options.object_chn!r}.")
    checks.integer("panels", panels, 1)
    checks.flag("numbers", numbers)
    tensors = {
        "outputs": outputs,
        "labels": labels,
        "cc_label_batch": cc_label_batch,
        "cc_output_batch": cc_output_batch,
        "ignore_mask": ignore_mask,
        "image": image,
    }
    for name, value in tensors.items():
        if value is not None or name in ("outputs", "labels"):
            checks.tensor(name, value)
    if not 0 <= checks.integer("sample", sample, 0) < len(outputs):
        raise ValueError(f"sample must be one of the {len(outputs)} of outputs, counted from 0, got {sample!r}.")
    if image is not None:
        checks.same_place("image", image, outputs, (image.shape[1] if image.ndim > 1 else 1,))
    one = {name: None if value is None else value[sample : sample + 1] for name, value in tensors.items()}
    shown = one.pop("image")
    sides = find_sides(**one, rules=asked)  # type: ignore[arg-type]
    table = tabulate(sides, asked)
    maps = ops.row_maps(sides.x, list(sides.found.sites)).clamp(min=0).chunk(2)
    spatial = outputs.shape[2:]
    statuses = [table["status"][table["side"] == side].numpy() for side in (LABEL, OUTPUT)]
    return draw_maps(
        *(each[0].view(spatial).cpu().numpy() for each in (maps[1], maps[0])),
        *statuses,
        image=None if shown is None else shown[0, 0].detach().to("cpu", torch.float32).numpy(),
        panels=panels,
        numbers=numbers,
        title=title,
        spacing=asked.spacing,
    )


class _Drawn(NamedTuple):
    """The instances of both sides, (side,)."""

    maps: tuple[Volume, Volume]  # (H, W, D), the number of its instance at each voxel, 0 = background
    statuses: tuple[Volume, Volume]  # of instances 1..n

    def number(self, side: int, status: int) -> int:
        """How many instances have a status."""
        return int((self.statuses[side] == status).sum())


def draw_maps(
    labels: Volume,
    outputs: Volume,
    label_statuses: Volume,
    output_statuses: Volume,
    *,
    image: Volume | None = None,
    panels: int = 6,
    numbers: bool = True,
    title: str = "",
    spacing: Sequence[float] | None = None,
    upright: bool = False,
) -> Figure:
    """The picture of two maps of instance numbers, (H, W) or (H, W, D), and what became of instances 1..n.

    With `upright` the first axis goes to the right and the second up, as in viewers of NIfTI files.
    """
    planar = labels.ndim == 2
    found = _Drawn((np.atleast_3d(labels), np.atleast_3d(outputs)), (label_statuses, output_statuses))
    axis, slices = (2, [0]) if planar else _choose_slices(found, panels)
    rows, columns = [each for each in range(3) if each != axis]
    if upright:
        rows, columns = columns, rows
    planes = _Drawn(
        tuple(np.transpose(volume, (rows, columns, axis)) for volume in found.maps),  # type: ignore[arg-type]
        found.statuses,
    )
    behind = None if image is None else np.transpose(np.atleast_3d(image), (rows, columns, axis))
    whole = image is not None
    window = _window((planes.maps[LABEL] > 0) | (planes.maps[OUTPUT] > 0), whole)
    size = [1.0, 1.0, 1.0] if spacing is None else [*spacing, 1.0][:3]
    aspect = size[rows] / size[columns]

    (top, bottom), (left, right) = window
    across = min(len(slices), 3)
    down = math.ceil(len(slices) / across)
    panel = 7.0 if len(slices) == 1 else 4.0
    tall = (panel - 0.45) * min(max((bottom - top) * aspect / (right - left), 0.4), 1.6)
    size_in_inches = (panel * across + 0.4, (tall + 0.6) * down + (0.8 if title else 0.5))
    figure = Figure(figsize=size_in_inches, dpi=110, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[len(slices) :]:
        axes.set_axis_off()
    names = "xyz" if upright else ("axis 0", "axis 1", "axis 2")
    for axes, position in zip(grid, slices, strict=False):
        if behind is not None:
            low, high = np.nanpercentile(behind, (0.5, 99.5))
            axes.imshow(behind[:, :, position], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        _draw_plane(axes, planes, position, 0.6 if whole else 1.0)
        across_rows = (top - 0.5, bottom - 0.5) if upright else (bottom - 0.5, top - 0.5)
        axes.set(xlim=(left - 0.5, right - 0.5), ylim=across_rows, aspect=aspect)
        axes.set(xlabel=names[columns], ylabel=names[rows])
        axes.locator_params(integer=True)
        if not planar:
            axes.set_title(f"{names[axis]} = {position}", fontsize=10, color=INK)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    _write_legend(figure, found, len(slices))
    if numbers:
        figure.draw_without_rendering()  # settles the layout, so that numbers know how much room they take
        for axes, position in zip(grid, slices, strict=False):
            _write_numbers(axes, planes, position)
    return figure


def _write_legend(figure: Figure, found: _Drawn, slices: int) -> None:
    """What the colours mean, with how many there are."""
    handles = []
    for (side, status), text in LEGEND.items():
        number, colour = found.number(side, status), COLOURS[side, status]
        if number > 0:
            face, edge = ("none", colour) if side == LABEL else (colour, "none")
            handles.append(Patch(facecolor=face, edgecolor=edge, linewidth=2.2, label=f"{text} ({number})"))
    if handles:
        columns = len(handles) if slices > 1 else min(len(handles), 2 if len(handles) == 4 else 3)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _choose_slices(found: _Drawn, panels: int) -> tuple[int, list[int]]:
    """The axis and the positions along it that show the instances best."""
    best: tuple[float, int, list[int]] = (-1.0, 2, [found.maps[LABEL].shape[2] // 2])
    for axis in (2, 1, 0):
        length = found.maps[LABEL].shape[axis]
        shares = []
        for numbers in found.maps:
            at = np.nonzero(numbers)
            count = int(numbers.max())
            areas = np.bincount((numbers[at] - 1) * length + at[axis], minlength=count * length)
            areas = areas.reshape(count, length)
            shares.append(0.3 * (areas > 0) + 0.7 * areas / areas.max(axis=1, keepdims=True, initial=1))
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


def _window(mask: Volume, whole: bool) -> list[tuple[int, int]]:
    """Where anything is along the rows and columns of the planes, with a margin of a twelfth; or all of it."""
    window = []
    for axis in (0, 1):
        size = mask.shape[axis]
        filled = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        low, high = (filled[0], filled[-1] + 1) if len(filled) and not whole else (0, size)
        margin = max(2, round((high - low) / 12))
        window.append((max(0, int(low) - margin), min(size, int(high) + margin)))
    return window


def _draw_plane(axes: Any, planes: _Drawn, position: int, opacity: float) -> None:
    """One slice: areas of the outputs below the outlines of the labels."""
    labels, outputs = (volume[:, :, position] for volume in planes.maps)
    fills = np.zeros((len(planes.statuses[OUTPUT]) + 1, 4))
    for number, status in enumerate(planes.statuses[OUTPUT], start=1):
        fills[number] = to_rgba(COLOURS[OUTPUT, int(status)], opacity)
    axes.imshow(fills[outputs], interpolation="nearest")
    for status in (MATCHED, MISSED):
        chosen = np.isin(labels, 1 + np.flatnonzero(planes.statuses[LABEL] == status))
        lines = list(_outline(labels, chosen))
        axes.add_collection(
            LineCollection(
                lines, colors=COLOURS[LABEL, status], linewidths=1.8, antialiaseds=False, capstyle="projecting"
            )
        )
    axes.tick_params(labelsize=7, length=2, colors=GREY)
    axes.xaxis.label.set(fontsize=8, color=GREY)
    axes.yaxis.label.set(fontsize=8, color=GREY)
    for spine in axes.spines.values():
        spine.set(color="#CCCCCC")


def _outline(numbers: Volume, chosen: Volume) -> Volume:
    """(segments, 2, 2): the voxel edges, as column and row, between the chosen instances and anything else."""
    lines = []
    for axis in (0, 1):
        padding = [(1, 1) if axis == other else (0, 0) for other in (0, 1)]
        n, c = np.pad(numbers, padding), np.pad(chosen, padding)
        if axis == 1:
            n, c = n.T, c.T
        border = (n[:-1] != n[1:]) & (c[:-1] | c[1:])
        edge, along = np.nonzero(border)
        points = np.stack((np.stack((edge - 0.5, along - 0.5), 1), np.stack((edge - 0.5, along + 0.5), 1)), axis=1)
        lines.append(points if axis == 1 else points[:, :, ::-1])
    return np.concatenate(lines)


def _places(at: tuple[Volume, ...], down: float, side: int) -> Iterator[tuple[Any, ...]]:
    """Where the number of an instance may stand: beside it, or on it; with the offset and the alignment.

    `down` is -1 where rows go up in the picture, else 1.
    """
    row, column = at
    (first, left), (last, right) = np.min(at, axis=1), np.max(at, axis=1)
    upper, lower = (first, last) if down > 0 else (last, first)
    above = ((column[row == upper].mean(), upper - 0.5 * down), (0, 2), "center", "bottom")
    below = ((column[row == lower].mean(), lower + 0.5 * down), (0, -2), "center", "top")
    yield from (above, below) if side == LABEL else (below, above)
    yield (right + 0.5, row[column == right].mean()), (3, 0), "left", "center"
    yield (left - 0.5, row[column == left].mean()), (-3, 0), "right", "center"
    yield (right + 0.5, upper - 0.5 * down), (2, 1), "left", "bottom"
    yield (left - 0.5, lower + 0.5 * down), (-2, -1), "right", "top"
    yield (column.mean(), row.mean()), (0, 0), "center", "center"


def _write_numbers(axes: Any, planes: _Drawn, position: int) -> None:
    """L1, O2, ... beside each instance of a slice, where no other number is; left out where there is no room."""
    taken: list[Any] = []
    inside = axes.get_window_extent()
    halo = [patheffects.withStroke(linewidth=2.4, foreground="white")]
    down = 1.0 if axes.yaxis_inverted() else -1.0
    for side in (LABEL, OUTPUT):
        plane = planes.maps[side][:, :, position]
        for number in np.unique(plane[plane > 0]):
            missed = side == LABEL and planes.statuses[side][number - 1] == MISSED
            for point, offset, horizontal, vertical in _places(np.nonzero(plane == number), down, side):
                text = axes.annotate(
                    f"{'LO'[side]}{number}",
                    point,
                    xytext=offset,
                    textcoords="offset points",
                    ha=horizontal,
                    va=vertical,
                    fontsize=8,
                    fontweight="bold" if side == LABEL else "normal",
                    color="#B34700" if missed else "#003F66" if side == LABEL else "#222222",
                    path_effects=halo,
                )
                room = text.get_window_extent()
                free = inside.x0 <= room.x0 and room.x1 <= inside.x1 and inside.y0 <= room.y0 and room.y1 <= inside.y1
                if free and not any(room.overlaps(other) for other in taken):
                    taken.append(room)
                    break
                text.remove()
