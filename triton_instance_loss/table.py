"""One row an instance: `instance_table`."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks, ops
from .matching import Rules, Sides, find_sides, rules, touching_pairs

# What the numbers in the columns "side" and "status" stand for.
SIDES = ("label", "output")
STATUSES = ("matched", "missed", "false")
LABEL, OUTPUT = range(2)
MATCHED, MISSED, FALSE = range(3)


@checks.not_scriptable
def instance_table(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    cc_output_batch: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """List all instances, one row each: what became of it, with which partner, and how well the two agree.

    Rows are in the order of samples, then classes, then labels before outputs, then numbers. The columns are tensors of
    as many rows, on the CPU:

    - side, int64: 0 is a label, 1 an output (`SIDES`).
    - sample, int64, from 0; class, int64: the number of its class, `object_chn`.
    - number, int64: from 1 in each sample, class and side, in the order of the ids.
    - size, float64: voxels, or with `spacing` mm^3 (in 2D mm^2).
    - centre, (rows, axes) float64: the mean of its coordinates, in voxels from 0, or with `spacing` in mm.
    - bounds, (rows, 2, axes) int64: its first and its last voxel along each axis, whatever the spacing.
    - status, int64: 0 matched, 1 missed (labels), 2 false (outputs) (`STATUSES`), as `instance_metrics` counts them.
    - partner, int64: the number of the instance on the other side that matches and shares most voxels with it, of
      equal ones the first; 0 if it is not matched.
    - iou, dice, float64: with all that it matches together, which with "iou" is its partner; 0 if it is not matched.
      Their means over the matched labels are `segmentation_quality` and `dice` of `instance_metrics`.

    Args:
        outputs: (B, N, *spatial), float16, bfloat16, float32 or float64, as in `instance_metrics`.
        labels: (B, 1, *spatial) or (B, N, *spatial), any real dtype; 0 or 1, foreground where above 0.5.
        cc_label_batch: (B, 1, *spatial), optional numbers of the label instances. (Rows are numbered anew.)
        cc_output_batch: (B, 1, *spatial), optional numbers of the output instances.
        ignore_mask: (B, 1, *spatial) bool, optional: where True, a voxel is neither foreground nor background.
        **options: keyword options of `instance_metrics`, same names, checks and defaults, but `sizes`.

    Returns:
        A dict of tensors, (rows, ...) each; a `pandas.DataFrame` takes those of one axis as they are.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: An option or shape is not allowed, the tensors do not fit each other, or `outputs` holds NaN or
            infinity.
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        It is for reading: on CUDA it waits for the device, as the number of rows is read. Deterministic.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[[1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]]])
        >>> outputs = torch.tensor([[[[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]]]).float()
        >>> table = instance_table(outputs, labels, activation="none", spatial_dims=2)
        >>> names = ("side", "number", "status", "size", "partner")
        >>> for side, number, status, size, partner in zip(*(table[name].tolist() for name in names)):
        ...     print(SIDES[side], number, STATUSES[status], size, partner)
        label 1 matched 3.0 1
        label 2 missed 1.0 0
        label 3 matched 2.0 3
        output 1 matched 2.0 1
        output 2 false 1.0 0
        output 3 matched 1.0 3
    """
    asked = rules(**options)
    sides = find_sides(outputs, labels, cc_label_batch, cc_output_batch, ignore_mask, asked)
    return tabulate(sides, asked)


class _Side(NamedTuple):
    """The instances of one side, in the order of samples."""

    sample: Tensor  # (rows,), of n = B * classes
    row: Tensor  # in its sample, from 0
    geometry: Tensor  # (rows, 10) int64
    first: Tensor  # (n,): where each sample begins


def tabulate(sides: Sides, asked: Rules) -> dict[str, Tensor]:
    """The table of what was found."""
    broken = sides.health.isnan().cpu()
    if bool(broken.any()):
        sample = int(broken.nonzero()[0, 0])
        raise ValueError(
            f"outputs must be finite, and labels 0 or 1, got NaN, infinity or another label in sample {sample}."
        )
    both = [_rows(sides, side) for side in (LABEL, OUTPUT)]
    sizes = [side.geometry[:, ops.SIZE] for side in both]
    pairs = touching_pairs(sides)
    # The places of the two of each pair among the instances of their sides.
    mine = [both[LABEL].first[pairs.samples] + pairs.labels, both[OUTPUT].first[pairs.samples] + pairs.outputs]
    shared = pairs.shared
    if asked.matching == "iou":
        matched = shared / (sizes[LABEL][mine[LABEL]] + sizes[OUTPUT][mine[OUTPUT]] - shared) > asked.iou_threshold
        mine, shared = [places[matched] for places in mine], shared[matched]
    columns = [
        _columns(
            side, both[side], mine[side], sizes[1 - side][mine[1 - side]], both[1 - side].row[mine[1 - side]], shared
        )
        for side in (LABEL, OUTPUT)
    ]
    table = {name: torch.cat([each[name] for each in columns]) for name in columns[0]}
    order = table["sample"].argsort(stable=True)  # labels stay before outputs
    return _finished({name: column[order] for name, column in table.items()}, asked)


def _rows(sides: Sides, side: int) -> _Side:
    """All instances of one side, on the CPU."""
    found = sides.found
    counts = found.counts[(ops.LABELS, ops.OUTPUTS)[side]].cpu().long()
    table = found.geometry.chunk(2)[(1, 0)[side]].cpu()
    sample, row = ops.first_rows(counts, table.shape[1]).nonzero().unbind(dim=1)
    return _Side(sample, row, table[sample, row], counts.cumsum(dim=0) - counts)


def _columns(
    side: int, mine: _Side, places: Tensor, other_sizes: Tensor, other_rows: Tensor, shared: Tensor
) -> dict[str, Tensor]:
    """The columns of one side; a pair of what matches is a place in it, and size and row of its partner."""
    count = len(mine.row)
    covered, others = (
        torch.zeros(count, dtype=torch.int64).index_add_(0, places, values) for values in (shared, other_sizes)
    )
    matched = torch.zeros(count, dtype=torch.bool).index_fill_(0, places, True)
    # Written in this order, the last one stays: the first partner of those that share most.
    order = np.lexsort((-other_rows.numpy(), shared.numpy()))
    partner = np.zeros(count, dtype=np.int64)
    partner[places.numpy()[order]] = other_rows.numpy()[order] + 1
    size = mine.geometry[:, ops.SIZE]
    together = size + others
    return {
        "side": torch.full((count,), side),
        "sample": mine.sample,
        "number": mine.row + 1,
        "size": size,
        "sums": mine.geometry[:, ops.COORDINATE_SUMS],
        "bounds": torch.stack((mine.geometry[:, ops.LOWS], mine.geometry[:, ops.HIGHS]), dim=1),
        "status": torch.where(matched, MATCHED, (MISSED, FALSE)[side]),
        "partner": torch.from_numpy(partner),
        "iou": torch.where(matched, covered.double() / (together - covered), 0.0),
        "dice": torch.where(matched, 2.0 * covered / together, 0.0),
    }


def _finished(table: dict[str, Tensor], asked: Rules) -> dict[str, Tensor]:
    """Samples and classes apart, in the units and axes that were asked for."""
    classes = asked.options.classes
    axes = slice(3 - asked.options.spatial_dims, 3)  # an image is a volume of one plane
    spacing = torch.tensor(asked.spacing or (1.0,) * asked.options.spatial_dims, dtype=torch.float64)
    size, sums, samples = table["size"].double(), table["sums"][:, axes].double(), table["sample"]
    return {
        "side": table["side"],
        "sample": samples // len(classes),
        "class": torch.tensor(classes)[samples % len(classes)],
        "number": table["number"],
        "size": size * asked.voxel,
        "centre": sums / size[:, None] * spacing,
        "bounds": table["bounds"][:, :, axes],
        "status": table["status"],
        "partner": table["partner"],
        "iou": table["iou"],
        "dice": table["dice"],
    }
