"""Which instance was found, by what, and how well: the tables and the command line that the examples share."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from triton_instance_loss import InstanceLoss, connected_components

MATCHED, MISSED, FALSE, NOT_USED = "matched", "missed", "false", "not used"
SMOOTH = 1e-5  # of the library's Dice, so that 1 - Dice is the value that enters the terms

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
    threshold = loss.options.threshold
    if loss.activation == "sigmoid":
        mask = torch.sigmoid(outputs) >= threshold
        activated = mask.double()
    else:
        mask = outputs >= threshold if threshold > 0 else outputs == 1
        activated = outputs.double()
    out_map, lab_map = number_map(mask, loss), number_map(labels > 0.5, loss)

    a = activated.numpy().ravel()
    y = (labels > 0.5).numpy().ravel()
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


def stdout_console(width: int = 110) -> Console:
    """Rich on stdout, wide enough for the tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def by_term(terms: Any) -> dict[str, float]:
    """Named terms as numbers."""
    return {name: float(value) for name, value in terms._asdict().items()}
