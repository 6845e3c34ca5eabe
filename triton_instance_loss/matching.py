"""Which outputs and which labels match: what the metrics, the table and the pictures are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, quantities
from .activation import (
    Given,
    check_and_widen,
    for_each_class,
    health_of,
    to_activate,
    to_compare,
    to_volume,
    unwrap,
    whole,
    without_autocast,
)
from .components import rows_of_tables
from .instances import Found, find, search
from .options import Options

Matching = Literal["overlap", "iou", "dilated"]
MATCHINGS = ("overlap", "iou", "dilated")


@dataclass(frozen=True)
class Rules:
    """What an instance is, and what matches, checked."""

    options: Options
    matching: str
    iou_threshold: float
    dilation: int
    spacing: tuple[float, ...] | None

    @property
    def voxel(self) -> float:
        """The size of a voxel in the unit of sizes."""
        return 1.0 if self.spacing is None else math.prod(self.spacing)

    @property
    def dilated(self) -> bool:
        """Whether an output matches a label from nearby."""
        return self.matching == "dilated"

    def sizes(self, name: str, value: Sequence[float] | None) -> tuple[int, ...]:
        """Where strata of sizes begin, in voxels; empty for all sizes together."""
        if value is None:
            return ()
        return tuple([_voxels(each, self.voxel) for each in checks.ascending(name, value, 0, above_minimum=True)])


def rules(
    *,
    matching: Matching = "overlap",
    iou_threshold: float = 0.5,
    dilation: int = 3,
    spacing: Sequence[float] | None = None,
    activation: str = "sigmoid",
    num_out_chn: int = 1,
    object_chn: int | Sequence[int] = 1,
    spatial_dims: int = 3,
    num_iterations: int | None = None,
    segmentation_threshold: float | None = None,
    min_instance_size: float = 0,
    to_onehot_y: bool = False,
    ignore_index: float | None = None,
) -> Rules:
    """The keyword options of `instance_metrics` but `sizes`, as it describes them."""
    checks.choice("matching", matching, MATCHINGS)
    iou_threshold = checks.number("iou_threshold", iou_threshold, 0.5, 1.0)
    dilation = checks.integer("dilation", dilation, 1)
    if spacing is not None:
        spacing = checks.spacing("spacing", spacing, checks.integer("spatial_dims", spatial_dims, 2))
        size = checks.number("min_instance_size", min_instance_size, 0)
        # the most voxels that are no more than this: one less than what is more
        min_instance_size = _voxels(size, math.prod(spacing), above=True) - 1
    options = Options(
        activation=activation,
        num_out_chn=num_out_chn,
        object_chn=object_chn,
        spatial_dims=spatial_dims,
        num_iterations=num_iterations,
        segmentation_threshold=segmentation_threshold,
        min_instance_size=min_instance_size,  # type: ignore[arg-type] # Options looks
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
        max_cc_out=0,  # every output is kept,
        mul_too_many=checks.MAX_VOXELS,  # and there are never too many
    )
    if matching == "dilated" and num_iterations is not None:
        raise ValueError(f"num_iterations must be None with matching='dilated', got {num_iterations!r}.")
    return Rules(options, matching, iou_threshold, dilation, spacing)


def _voxels(size: float, voxel: float, *, above: bool = False) -> int:
    """The fewest voxels that have this size or, with `above`, more; what differs by rounding alone is equal."""
    voxels = min(size / voxel, float(checks.MAX_VOXELS))
    nearest = round(voxels)
    if math.isclose(voxels, nearest, rel_tol=1e-9):
        return nearest + above
    return math.ceil(voxels)


class Sides(NamedTuple):
    """The instances of both sides; each class of a sample is a sample, n = B * classes of them."""

    x: Tensor  # (n, D, H, W), in which outputs were found
    found: Found  # outputs and labels
    reached: Found | None  # the same in the same rows, of dilated labels; None if labels are not dilated
    health: Tensor  # (B, classes): 1, or NaN if outputs are not finite or labels neither 0 nor 1


def find_sides(
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None,
    cc_output_batch: Tensor | None,
    ignore_mask: Tensor | None,
    rules: Rules,
) -> Sides:
    """The public boundary of everything that matches instances: check the tensors, and find both sides."""
    options = rules.options
    given = check_and_widen(outputs, labels, cc_label_batch, ignore_mask, options)
    if cc_output_batch is not None:
        checks.instance_numbers("cc_output_batch", cc_output_batch, outputs)
    if rules.dilated and cc_label_batch is not None:
        raise ValueError(
            "cc_label_batch must be None with matching='dilated', which finds its instances itself, got a tensor."
        )
    suspicion = checks.logits(given.outputs, "sigmoid", given.ignored) if options.activation == "sigmoid" else None
    if suspicion is not None:
        raise ValueError(suspicion)
    with torch.no_grad(), without_autocast(given.outputs.device.type):
        x, truth = _to_activate(given, options), to_compare(given, options)
        merged = _merged(truth, rules) if rules.dilated else None
        labels = truth if merged is None else merged > 0
        found = find(x, labels, search(x, labels, given.ids, _PIXEL, options))
        health = _health(given, truth, found, rules)
        if cc_output_batch is not None:
            ids = whole("cc_output_batch", unwrap(cc_output_batch))
            found = _with_output_ids(x, found, ids, options)
        if merged is None:
            return Sides(x, found, None, health)
        as_they_were = _with_rows(x, found, ops.LABELS, torch.where(truth > 0.5, merged, 0), options)
        return Sides(x, as_they_were, found, health)


_PIXEL = ops.NOT_FUSED, quantities.MASS


def _to_activate(given: Given, options: Options) -> Tensor:
    """The volume that the activation works on; of a softmax without a threshold 1 where the class is the largest."""
    if options.activation != "softmax" or options.segmentation_threshold is not None:
        return to_activate(given, options)
    largest = given.outputs.argmax(dim=1, keepdim=True)
    chosen = torch.cat([largest == channel for channel in options.channels], dim=1)
    if given.ignored is not None:
        chosen &= ~given.ignored
    return to_volume(chosen.to(given.outputs.dtype))


def _health(given: Given, truth: Tensor, found: Found, rules: Rules) -> Tensor:
    """1 or NaN for each class of each sample, (B, classes)."""
    shape = (len(given.outputs), len(rules.options.classes))
    health = found.health.view(shape)
    if rules.options.activation == "softmax":  # after which infinity does not show everywhere
        health = health * health_of(given.outputs.flatten(1)[:, None], truth.view(*shape, -1), dim=2)
    elif rules.dilated:  # what was looked at are other labels
        health = health * health_of(truth.new_zeros((*shape, 1)), truth.view(*shape, -1), dim=2)
    return health


def _merged(truth: Tensor, rules: Rules) -> Tensor:
    """Dilated labels, of each component its id, 0 elsewhere; without those in which too few voxels are labels."""
    y = truth > 0.5
    ids: Tensor = ops.components(dilate(y, rules.dilation), 0)
    least = rules.options.min_instance_size
    if least == 0:
        return ids
    of_samples = ids.flatten(1).long()
    sizes = torch.zeros((len(ids), of_samples.shape[1] + 1), dtype=torch.int32, device=ids.device)
    sizes.scatter_add_(1, of_samples, y.flatten(1).int())
    return torch.where(sizes.gather(1, of_samples).view_as(ids) > least, ids, 0)


def dilate(mask: Tensor, times: int) -> Tensor:
    """What is within so many steps through faces and edges; in a plane, which is a volume with D = 1, corners too."""
    for _ in range(times):
        along_width = _spread(mask, 3)
        # of two of the three axes each
        mask = _spread(along_width, 2) | _spread(along_width, 1) | _spread(_spread(mask, 2), 1)
    return mask


def _spread(mask: Tensor, axis: int) -> Tensor:
    """The mask, and one voxel more on both sides along an axis."""
    longer, length = mask.clone(), mask.shape[axis] - 1
    longer.narrow(axis, 1, length).logical_or_(mask.narrow(axis, 0, length))
    longer.narrow(axis, 0, length).logical_or_(mask.narrow(axis, 1, length))
    return longer


def _with_output_ids(x: Tensor, found: Found, ids: Tensor, options: Options) -> Found:
    """`found` with the sets of equal ids as outputs, inside the foreground."""
    foreground, _ = ops.row_maps(x, list(found.sites)).chunk(2)
    return _with_rows(x, found, ops.OUTPUTS, torch.where(foreground != 0, for_each_class(ids, options), 0), options)


def _with_rows(x: Tensor, found: Found, side: int, ids: Tensor, options: Options) -> Found:
    """`found` with the sets of equal ids as instances of one side, on whose foreground alone ids may be above 0."""
    on_labels = side == ops.LABELS
    least = 0 if on_labels else options.min_instance_size  # (of labels here, too small ones are gone)
    capacity = found.geometry.shape[1] if on_labels else x[0].numel()
    numbers, count, geometry = ops.number_instances(ids, least, rows_of_tables(x, capacity))
    where, which = found.sites
    if ops.backend(x) == "cpu":  # voxels and their rows on both sides, -1 in columns that are not used
        here = numbers.flatten()[where[0].clamp(min=0)]
        rows = list(which.unbind())
        rows[on_labels] = torch.where((where[0] < 0) | ((rows[on_labels] != 0) & (here == 0)), -1, here)
        sites = where, torch.stack(rows)
    else:  # row maps of both sides
        maps = list(where.chunk(2))
        maps[on_labels] = torch.where((maps[on_labels] != 0) & (numbers == 0), -1, numbers)
        sites = torch.cat(maps), which
    tables = list(found.geometry.chunk(2))
    tables[on_labels] = geometry
    most = max(table.shape[1] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, 0, 0, most - table.shape[1])) for table in tables]
    counts = list(found.counts.unbind())
    counts[side] = count
    counts[ops.KEPT] = counts[ops.OUTPUTS]
    pairs = found.pairs if on_labels else 2 * x[0].numel()
    # (no _replace: torch 2.6 can't compile it)
    return Found(sites, torch.stack(counts), torch.cat(padded), found.pixel_sums, found.health, pairs)


class Matches(NamedTuple):
    """What matches in each sample, row by row, (n, rows); what stands where a mask is False is undefined."""

    detected: Tensor  # matched labels, in their own rows or, with "iou", in those of their outputs
    label_sizes: Tensor  # of these labels
    shared: Tensor  # voxels that they and what they are compared with share
    sizes: Tensor  # voxels of both together, shared ones twice
    correct: Tensor  # matched outputs
    output_sizes: Tensor


def match(sides: Sides, rules: Rules) -> Matches:
    """Match the instances of both sides."""
    if rules.matching == "iou":
        pairs = majorities(sides)
        matched = pairs.used & (pairs.iou > rules.iou_threshold)
        return Matches(matched, pairs.label_sizes, pairs.shared, pairs.sizes, matched, pairs.output_sizes)
    return _match_by_overlap(sides)


def _match_by_overlap(sides: Sides) -> Matches:
    """Match whatever touches; all of it is in the table of sums."""
    out, lab = _sums(sides.x, sides.found)
    reached = lab
    if sides.reached is not None:
        out, reached = _sums(sides.x, sides.reached)
    output_sizes, label_sizes = sides.found.geometry[:, :, ops.SIZE].chunk(2)
    # (every output is kept)
    used = ops.first_rows(sides.found.counts[ops.KEPT :].flatten(), output_sizes.shape[1]).chunk(2)
    shared, reached_by = lab[..., ops.TOUCHED], reached[..., ops.TOUCHED]
    correct, detected = used[0] & (out[..., ops.OVERLAP] > 0), used[1] & (reached_by > 0)
    return Matches(detected, label_sizes, shared, label_sizes + reached[..., ops.COST], correct, output_sizes)


def _sums(x: Tensor, found: Found) -> tuple[Tensor, Tensor]:
    """Sums over outputs and over labels."""
    # Of a foreground of ones, and without no_tp, COST of a label is the size of all outputs that touch it.
    sums, *_ = ops.sum_instances(
        x, list(found.sites), found.counts, found.geometry, ops.GIVEN, quantities.MASS, False, found.pairs
    )
    out, lab = sums.chunk(2)
    return out, lab


class Majorities(NamedTuple):
    """For each output the only label that may be more than half of both together, (n, rows)."""

    used: Tensor  # whether there is one
    iou: Tensor
    shared: Tensor  # voxels that both share
    sizes: Tensor  # voxels of both together, shared ones twice
    output_sizes: Tensor
    label_sizes: Tensor


def majorities(sides: Sides) -> Majorities:
    """The label that each output shares an IoU of more than 1/2 with, if there is one: it holds more than half of it.

    So it is the median of the labels that the voxels of its output lie on: sort those, and look at the middle.
    """
    x, found = sides.x, sides.found
    out_sizes, lab_sizes = found.geometry[:, :, ops.SIZE].chunk(2)
    batch, rows = out_sizes.shape
    # One key for each pair of rows, in the order of outputs and then of labels; 0 where either has none.
    base = rows + 1
    if rows_of_tables(x, rows) == 0:  # shapes may depend on data, and sites are lists of voxels
        (voxels,), sides_of_voxels = found.sites
        both = (sides_of_voxels > 0).all(dim=0)
        sample, (out_rows, lab_rows) = voxels[both] // x[0].numel(), sides_of_voxels[:, both].long()
        keys = torch.where(sample == torch.arange(batch)[:, None], out_rows * base + lab_rows, 0)
        keys = torch.nn.functional.pad(keys, (1, 0))
    else:
        out_rows, lab_rows = ops.row_maps(x, list(found.sites)).flatten(1).chunk(2)
        keys = torch.where((out_rows > 0) & (lab_rows > 0), out_rows.long() * base + lab_rows, 0)
    keys = keys.sort(dim=1).values
    # Where the keys of each output begin, and those of the next one.
    begins = torch.searchsorted(keys, (base * torch.arange(1, rows + 2, device=x.device)).repeat(batch, 1))
    middle = (begins[:, :-1] + begins[:, 1:]) // 2
    pair = keys.gather(1, middle.clamp(max=keys.shape[1] - 1))
    shared = torch.searchsorted(keys, pair, right=True) - torch.searchsorted(keys, pair)
    label = pair - base * torch.arange(1, rows + 1, device=x.device)
    used = ops.first_rows(found.counts[ops.OUTPUTS], rows) & (label > 0) & (label < base)
    label_sizes = lab_sizes.gather(1, label.clamp(1, rows) - 1)
    sizes = out_sizes + label_sizes
    return Majorities(used, shared / (sizes - shared), shared, sizes, out_sizes, label_sizes)


class Pairs(NamedTuple):
    """The pairs of an output and a label that touch, on the CPU, in the order of samples, outputs and labels."""

    samples: Tensor
    outputs: Tensor  # rows, counted from 0
    labels: Tensor
    shared: Tensor  # voxels that both share; 0 where the output touches no more than the dilated label


def touching_pairs(sides: Sides) -> Pairs:
    """All pairs that touch; how many there are is read, so on CUDA this waits."""
    out, lab = ops.row_maps(sides.x, list((sides.reached or sides.found).sites)).chunk(2)
    at = ((out > 0) & (lab > 0)).flatten().nonzero()[:, 0]
    inside = torch.ones_like(at, dtype=torch.bool)
    if sides.reached is not None:
        inside = ops.row_maps(sides.x, list(sides.found.sites)).chunk(2)[1].flatten()[at] > 0
    rows, inside = torch.stack((at // out[0].numel(), out.flatten()[at] - 1, lab.flatten()[at] - 1)).cpu(), inside.cpu()
    most = rows.amax(dim=1) + 1 if rows.shape[1] else torch.ones(3, dtype=torch.int64)
    keys, which = torch.unique((rows[0] * most[1] + rows[1]) * most[2] + rows[2], return_inverse=True)
    shared = torch.bincount(which[inside], minlength=len(keys))
    return Pairs(keys // most[2] // most[1], keys // most[2] % most[1], keys % most[2], shared)
