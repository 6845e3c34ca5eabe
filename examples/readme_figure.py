"""The first picture of the README: labels, outputs, and what the losses make of them.

python examples/readme_figure.py docs/images/matching.png
"""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from triton_instance_loss import InstanceLoss, connected_components

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, SKY, VERMILLION, ORANGE, INK = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#333333"
SCALE = 10  # pixels to one unit of the drawing below
HEIGHT, WIDTH = 60 * SCALE, 72 * SCALE
CENTROID_OFFSET = 2 * SCALE

# Row, column, radius along the rows, radius along the columns.
LABELS = ((15, 14, 9, 8), (14, 42, 5, 5), (13, 62, 3, 3), (44, 20, 7, 11), (46, 47, 4, 4), (35, 63, 6, 5))
OUTPUTS = (
    (17, 15, 8, 9),
    (13, 43, 4, 5),
    (42, 13, 4, 5),
    (46, 27, 5, 4),
    (37, 61, 7, 6),
    (30, 38, 4, 4),
    (53, 63, 3, 4),
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def drawn(ellipses: tuple[tuple[int, int, int, int], ...]) -> torch.Tensor:
    """(1, 1, H, W): 1 inside the ellipses."""
    row, column = np.mgrid[:HEIGHT, :WIDTH] / SCALE
    image = np.zeros((HEIGHT, WIDTH))
    for r, c, tall, wide in ellipses:
        image[((row - r) / (tall + 0.05)) ** 2 + ((column - c) / (wide + 0.05)) ** 2 <= 1] = 1
    return torch.from_numpy(image)[None, None]


def numbered(mask: torch.Tensor) -> NDArray[np.int32]:
    """The number of the instance at each pixel, 0 = background."""
    return connected_components(mask, relabel=True)[0][0, 0].numpy()


def fill(axes: Any, mask: NDArray[np.bool_], colour: str) -> None:
    """Paint the pixels of `mask`."""
    if mask.any():
        axes.contourf(mask.astype(float), levels=[0.5, 1.5], colors=[colour])


def outline(axes: Any, mask: NDArray[np.bool_], colour: str) -> None:
    """Draw the border of `mask`."""
    if mask.any():
        axes.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=2.2)


def center_boxes(axes: Any, numbers: NDArray[np.int32], colour: str, style: str) -> None:
    """The boxes that the term center compares, [c - o - 1, c + o) around the rounded mean coordinates c."""
    for number in range(1, numbers.max() + 1):
        at = np.nonzero(numbers == number)
        reach = [int(np.ceil(size / WIDTH * CENTROID_OFFSET)) for size in (HEIGHT, WIDTH)]
        row, column = (int(np.ceil(axis.mean())) for axis in at)
        corner = (column - reach[1] - 1 - 0.5, row - reach[0] - 1 - 0.5)
        width, height = 2 * reach[1] + 1, 2 * reach[0] + 1
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.6, linestyle=style))


def write_numbers(axes: Any, numbers: NDArray[np.int32], letter: str) -> None:
    """L1, O2, ... in the middle of the instances."""
    for number in range(1, numbers.max() + 1):
        row, column = (axis.mean() for axis in np.nonzero(numbers == number))
        axes.text(column, row, f"{letter}{number}", ha="center", va="center", fontsize=9, color=INK, weight="bold")


def main(arguments: list[str] | None = None) -> None:
    """Draw the three panels."""
    parser = Parser(description="Draw the README's picture of what is matched, missed and false.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/images/matching.png"))
    path = parser.parse_args(arguments).path
    if not path.absolute().parent.is_dir():
        parser.error(f"no folder {path.absolute().parent}")

    labels, outputs = drawn(LABELS), drawn(OUTPUTS)
    loss = InstanceLoss(activation="none", spatial_dims=2, centroid_offset=CENTROID_OFFSET)
    terms = loss(outputs, labels)
    lab, out = numbered(labels), numbered(outputs)
    detected, correct = np.unique(lab[out > 0]), np.unique(out[lab > 0])
    missed, false = (lab > 0) & ~np.isin(lab, detected), (out > 0) & ~np.isin(out, correct)

    figure = Figure(figsize=(12, 4.3), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("labels", "outputs", "matched, missed, false")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=13, color=INK)
        axes.set(xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
        axes.set_facecolor("#FAFAFA")
        for spine in axes.spines.values():
            spine.set(color="#BBBBBB")
    outline(panels[0], lab > 0, INK)
    write_numbers(panels[0], lab, "L")
    fill(panels[1], out > 0, "#C8C8C8")
    write_numbers(panels[1], out, "O")
    fill(panels[2], (out > 0) & ~false, SKY)
    fill(panels[2], false, ORANGE)
    outline(panels[2], (lab > 0) & ~missed, BLUE)
    outline(panels[2], missed, VERMILLION)
    center_boxes(panels[2], lab, INK, "-")
    center_boxes(panels[2], out, INK, ":")

    panels[0].set_xlabel(f"{lab.max()} instances", fontsize=11, color=INK)
    panels[1].set_xlabel(f"{out.max()} instances", fontsize=11, color=INK)
    counts = f"missed_instances {terms.missed_instances:.0f}, false_instances {terms.false_instances:.0f}"
    panels[2].set_xlabel(counts, fontsize=11, color=INK)
    handles = [
        Patch(facecolor="none", edgecolor=BLUE, linewidth=2.2, label="matched label"),
        Patch(facecolor=SKY, label="matched output"),
        Patch(facecolor="none", edgecolor=VERMILLION, linewidth=2.2, label="missed label"),
        Patch(facecolor=ORANGE, label="false output"),
        Patch(facecolor="none", edgecolor=INK, linewidth=1.6, label="centre box of a label"),
        Patch(facecolor="none", edgecolor=INK, linewidth=1.6, linestyle=":", label="of an output"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)
    try:
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
