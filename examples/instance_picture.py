"""The picture of a report: slices with label outlines and output fills, by what became of each instance."""

from pathlib import Path

import numpy as np
from instance_report import FALSE, MATCHED, MISSED, NOT_USED, Report

from triton_instance_loss import plot

STATUSES = {MATCHED: plot.MATCHED, MISSED: plot.MISSED, FALSE: plot.FALSE, NOT_USED: plot.NOT_USED}


def draw(path: Path, found: Report, *, title: str = "", panels: int = 6) -> None:
    """Write a PNG: outlines of the labels, areas of the outputs, and the number of each instance.

    A volume is shown in the slices, at most `panels` of them and along the axis where that goes best, that together
    show the most instances, each as near as possible to where it is largest. An image is shown as it is.
    """
    statuses = (
        np.array([STATUSES[one.status] for one in found.instances if one.side == side], dtype=int)
        for side in ("label", "output")
    )
    figure = plot.draw_maps(found.labels, found.outputs, *statuses, panels=panels, title=title, upright=True)
    figure.savefig(path, format="png", metadata={"Software": None})
