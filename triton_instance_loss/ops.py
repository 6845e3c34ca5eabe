"""The operators: what each one takes and gives, and which backend answers.

A volume is (B, D, H, W) and contiguous; an image comes as a volume with D = 1. `V = D * H * W`.
A *row map* holds at each voxel the number of its instance, 1..n in id order, or 0; row r of a table is instance r + 1.
Tables have a fixed number of rows, `capacity`, so that no shape depends on data and Python never reads a count; what
stands in a row beyond the count is undefined. (`SymInt` in a schema: it follows from shapes, and what is compiled for
one shape may serve others.) A table of both sides, (2 B, capacity, ...), has those of outputs first. There may be more
outputs than that, `rest` at most; they are only counted, and false or not (instances.py says why).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import BACKEND_VARIABLE as BACKEND_VARIABLE
from .dispatch import answer, operator
from .dispatch import backend as backend

# Activations: the activated output a of x; the probability p, if there is one, and z, what the gradient flows into.
NONE = 0  # a = x; foreground where x >= threshold, or x == 1 if the threshold is 0 or less; z = x
SIGMOID = 1  # a = foreground = [p >= threshold]; p = sigmoid(x), z = x
GIVEN = 2  # a = foreground = [p >= threshold]; p = x = sigmoid(z), of a logit z that is not looked at

# What the pixel term, where it is fused, sees as prediction u and truth w.
NOT_FUSED = -1
RAW = 0  # x, and the labels as they are
PROBABILITY = 1  # p, or x with NONE; and y
HARD = 2  # a, with the derivative of p where a or y is 1 and none elsewhere; and the labels as they are

# The gradient of false and missed instances in a false output O and a missed label L.
NO_GRADIENT = 0
OF_MEAN = 1  # of the mean of a over O, and of 1 - the mean of a over L
OF_LOGARITHM = 2  # of the mean of -log(1 - p) over O, and of -log p over L

# How many there are in a sample: outputs, those of them that are used individually (rows 1..kept), labels.
OUTPUTS, KEPT, LABELS, COUNTS = 0, 1, 2, 3
# Columns of a geometry table (int64). Bounds are inclusive.
SIZE, COORDINATE_SUMS, LOWS, HIGHS = 0, slice(1, 4), slice(4, 7), slice(7, 10)
GEOMETRY_COLUMNS = 10

# Columns of a sums table (float64). a is the activated output, phi the quantity of the criterion (see criteria.py), e
# what an output brings into each label that it touches: phi(a * stopgrad(a), 0) where y = 0 (*).
MASS = 0  # sum of a over the instance
INTERSECTION = 1  # output: sum of a where a label instance is; label: sum of a inside kept outputs
COST = 2  # output: sum of phi(a, 1 where a label instance is); label: of phi(a, 1) inside kept outputs (*), and their e
LABEL = 3  # kept output: sizes of the labels that it touches
TOUCHED = 3  # label: voxels inside any output, kept or not
OVERLAP = 4  # output: voxels on a label instance; label: voxels inside kept outputs
SUMS_COLUMNS = 5
# (*) without no_tp: e is phi(a, 0) over the whole output, and a label's own share is phi(a, 1) - phi(a, 0).
# Columns of the sample table (float64): sums over all voxels of a * y, of phi(a, y) and of y.
SAMPLE_COLUMNS = 3
# Gradients of a sums table have its first three columns, those of a sample table its first two: the others are counts.
# Those of a sample have one more, by the mean of a over each output beyond the tables that touches no label.
GRADIENT_COLUMNS, SAMPLE_GRADIENT_COLUMNS = 3, 2
BY_REST, WHOLE_GRADIENT_COLUMNS = 2, 3

# The terms, in the order of the operator `terms`.
PIXEL, INSTANCE_LABEL, INSTANCE_OUTPUT, CENTER, FALSE_INSTANCES, MISSED_INSTANCES, PROXIMITY = range(7)
# What terms are made of, in a list of numbers: each criterion as a ratio of two linear functions, of sums or, for
# center, of the numbers of voxels in both kinds of box, in output boxes only, and in label boxes only (terms.py).
PIXEL_RATIO, INSTANCE_RATIO, MISSING, CENTER_RATIO, CENTER_SLOPES, SMOOTHER, NUMBERS = 0, 8, 16, 17, 25, 29, 30
# How the instances of a batch are averaged: all alike, or samples alike and in each the mean or sum.
BY_INSTANCE, BY_MEAN, BY_SUM = range(3)
# Columns of a table of slopes (float64), from which gradients follow: derivatives of center, and of false or missed
# instances, by the mass of an instance; of its criterion by intersection and prediction; its distance to the nearest.
BY_CENTER, BY_FALSE, BY_INTERSECTION, BY_PREDICTION, DISTANCE = range(5)
SLOPES_COLUMNS = 5
# The same of a sample: derivatives of the pixel term by intersection and prediction, of the instance terms by the
# criterion of a label and of an output, of proximity by a criterion times its distance, of false instances by one of
# them, and of the criterion of the whole sample by intersection and prediction.
PIXEL_BY_INTERSECTION, PIXEL_BY_PREDICTION, BY_LABEL, BY_OUTPUT, BY_DISTANCE, BY_MISTAKE = range(6)
WHOLE_BY_INTERSECTION, WHOLE_BY_PREDICTION, SAMPLE_SLOPES_COLUMNS = 6, 7, 8
# What a region loss does with the sums over its regions (SPEC section 8), and the numbers that each of them takes.
BLOB = 0  # dice and ce (0 or 1), smooth, by_logits (0 or 1): region 0 is where nothing is true
CELLS = 1  # dice and ce (0 or 1), smooth, share: each voxel is in a cell; a sample without instances is one, region 0
TVERSKY = 2  # alpha, beta, gamma, epsilon, background_weight, smooth: region 0 as with BLOB
FALSE = 3  # none: the regions that are chosen
# Columns of the table of their slopes (float64): derivatives by the sums of p, p * y, p * stopgrad(p), cross entropy.
BY_MASS, BY_TRUE_MASS, BY_SQUARES, BY_CROSS_ENTROPY, REGION_SLOPES = range(5)

# The sites of the CPU backend: the voxels of either foreground and those with a label, by their index in the batch, in
# that order, (1, voxels) int64; and of each its rows in both sides (2, voxels) int32, -1 for foreground in no instance.
# Columns at the end that are not used hold -1.

_library = torch.library.Library("triton_instance_loss", "DEF")

_SCHEMAS = {
    # x float32 or float64, labels of any real dtype but half (y where above 0.5), precomputed ids (int32 or int64; on
    # CUDA 0 outside y, on the CPU not looked at there) or none
    # -> sites: where the foreground is, and which instances it belongs to, as the same backend's operators below want
    # it; sums (B, 3) float64 of u * w, phi(u, w) and truth w of the pixel term, zeros with pixel=-1; health (B,)
    # float64: 1, or NaN if any x is not finite or any label not in [-0.5, 1.5]; counts (3, B) int32 (outputs, kept
    # outputs, labels) and geometry (2 B, capacity, 10) int64; capacity 0: as many rows as the largest count, at least 1
    # (the CPU backend alone, where counting costs nothing; it has no rest)
    "find": "(Tensor x, Tensor labels, Tensor? ids, int activation, float threshold, int pixel, int pixel_quantity,"
    " int num_iterations, int min_size, int max_kept, float too_many, SymInt capacity, SymInt rest)"
    " -> (Tensor[], Tensor, Tensor, Tensor, Tensor)",
    # sites -> the row maps of both sides, (2 B, D, H, W) int32, -1 where the foreground is in no instance
    "row_maps": "(Tensor x, Tensor[] sites) -> Tensor",
    # mask bool -> ids int32: largest linear index + 1 of the component (0 rounds: whole components), 0 = background
    "components": "(Tensor mask, int num_iterations) -> Tensor",
    # mask bool -> row map int32, counts (B,) int32, geometry (B, capacity, 10) int64; capacity as above
    "find_instances": "(Tensor mask, int num_iterations, int min_size, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    # the same from given ids (an integer dtype, any positive number): instances are the sets of equal ids
    "number_instances": "(Tensor ids, int min_size, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    # -> sums (2 B, capacity, 5) and sample sums (B, 3; read only of samples without labels or kept outputs), float64,
    #    and the pairs (kept output, label) that touch, for which there is room for `pairs`, as the same backend's
    #    backward wants them; which of the rest of the outputs touch a label, (B, rest) bool
    "sum_instances": "(Tensor x, Tensor[] sites, Tensor counts, Tensor geometry, int activation, int quantity,"
    " bool no_tp, SymInt pairs) -> (Tensor, Tensor, Tensor, Tensor)",
    # the terms of what `find` found. pairs is room for the pairs (kept output, label) that touch; offset that of boxes
    # along the longest axis, or None: no center; spacing is that along D, H, W, of which planar ignores the first, the
    # axis of an image that is none; without values (2 B, capacity)
    # of the criterion these follow from the sums; totals (2, classes) float64 are kept outputs and labels of a class,
    # if not those of this batch. Samples belong to classes in turns. criteria: what ratios.py describes
    # -> terms (7,), and their sum with weights, 0-d, or with no weights nothing of use, of the dtype of x; and what the
    #    same backend's backward wants: slopes of instances (2 B, capacity, 5; of a side without any, row 0), those of
    #    samples (B, 8), float64, pairs, and which of the rest of the outputs touch a label
    "evaluate": "(Tensor x, Tensor[] sites, Tensor counts, Tensor geometry, Tensor pixel_sums, Tensor health,"
    " Tensor? values, Tensor? totals, float[] weights, int activation, int quantity, bool no_tp, SymInt pairs,"
    " bool planar, float? offset, float[3] spacing, bool proximity, float[] criteria, int classes, int reduction,"
    " bool rates) -> (Tensor, Tensor, Tensor[])",
    # `find`, and `evaluate` of what it finds, without values or totals: the options of the one, then those of the other
    # but the activation -> what `evaluate` gives, sites, counts
    "find_and_evaluate": "(Tensor x, Tensor labels, Tensor? ids, float[] weights, int activation, float threshold,"
    " int pixel, int pixel_quantity, int num_iterations, int min_size, int max_kept, float too_many, SymInt capacity,"
    " SymInt rest, int quantity, bool no_tp, SymInt pairs, bool planar, float? offset, float[3] spacing,"
    " bool proximity, float[] criteria, int classes, int reduction, bool rates)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    # gradients of the terms (7,), and of their sum, either of which may be missing; with masses the surrogate's, with
    # flows those of sums over instances; what gradient mistakes have; whether values of the criterion were given
    # -> gradient of z, of the shape and dtype of x, and of the values (2 B, capacity), or of nothing. With an
    #    activation other than NONE, instances have none where neither a nor y is 1
    "evaluate_backward": "(Tensor x, Tensor labels, Tensor[] sites, Tensor counts, Tensor[] kept,"
    " Tensor? grad_terms, Tensor? grad_sum, float[] weights, int activation, int quantity, bool no_tp, int pixel,"
    " int pixel_quantity, bool masses, bool flows, int mistakes, bool values) -> (Tensor, Tensor)",
    # centre boxes of kept outputs and labels -> owner (B, D, H, W) int32 = largest output row whose box covers the
    # voxel, 0 = none; covered (B, D, H, W) bool = inside a label box
    "center_volumes": "(Tensor geometry, Tensor counts, SymInt[3] shape, int[3] offsets) -> (Tensor, Tensor)",
    # of what `find` found, with a row for each output, and room for so many pairs (output, label) that touch
    # -> (B, capacity) bool: outputs that no label claims; False in rows that are not used. A label claims, of the
    #    outputs that touch it, that with the largest Dice 2 |O and L| / (|O| + |L|), of equals the first
    "unclaimed": "(Tensor x, Tensor[] sites, Tensor counts, Tensor geometry, SymInt pairs) -> Tensor",
    # row map, spacing along D, H, W (of an image the first does not matter) -> the row of the nearest voxel that has
    # one, int32, by exact Euclidean distance, of equally near ones the largest; 0 where a sample has none. Rows below 0
    # count as 0, and are answered like all others
    "cells": "(Tensor rows, float[3] spacing) -> Tensor",
    # x as logits (SIGMOID; with softmax of one class against the rest) or probabilities (NONE), labels as in `find`, a
    # row map, below 0 in no region, counts (B,), and with FALSE, (B, capacity) bool, the regions that are meant.
    # With CELLS, maps and counts may be those of two sides, one behind the other, (2 B, ...): the loss is that of the
    # first times share and that of the second times 1 - share
    # -> the value, 0-d of the dtype of x, mean over classes, NaN if any x is not finite or any label not in
    #    [-0.5, 1.5] where the row is not below 0; slopes (len(rows), capacity + 1, 4) of a sample's own value by sums
    #    of its regions, row 0 for what is in no instance; factors (len(rows),) float64: derivatives of the value by
    #    those of samples
    "region_loss": "(Tensor x, Tensor labels, Tensor rows, Tensor counts, Tensor? chosen, int activation, int kind,"
    " float[] numbers, int classes, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    # gradient of the value, 0-d -> of x; 0 where a voxel is in no region. p' and ce' are derivatives in x, and y that
    # of the label: grad * factors * ((BY_MASS + BY_TRUE_MASS * y + BY_SQUARES * p) p' + BY_CROSS_ENTROPY * ce')
    "region_loss_backward": "(Tensor grad, Tensor x, Tensor labels, Tensor rows, Tensor slopes, Tensor factors,"
    " int activation, int kind) -> Tensor",
}


def _fake_find(
    x: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    activation: int,
    threshold: float,
    pixel: int,
    pixel_quantity: int,
    num_iterations: int,
    min_size: int,
    max_kept: int,
    too_many: float,
    capacity: int,
    rest: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    batch, *shape = x.shape
    if backend(x) == "cpu":
        sites = [x.new_empty((1, x.numel()), dtype=torch.int64), x.new_empty((2, x.numel()), dtype=torch.int32)]
    else:
        sites = [x.new_empty(size, dtype=torch.int32) for size in ((2 * batch, *shape), (batch, rest))]
    return (
        sites,
        x.new_empty((batch, SAMPLE_COLUMNS), dtype=torch.float64),
        x.new_empty((batch,), dtype=torch.float64),
        x.new_empty((COUNTS, batch), dtype=torch.int32),
        x.new_empty((2 * batch, capacity, GEOMETRY_COLUMNS), dtype=torch.int64),
    )


def _fake_row_maps(x: Tensor, sites: list[Tensor]) -> Tensor:
    return x.new_empty((2 * x.shape[0], *x.shape[1:]), dtype=torch.int32)


def _fake_components(mask: Tensor, num_iterations: int) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int32)


def _fake_find_instances(
    mask: Tensor, num_iterations: int, min_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_number_instances(mask, min_size, capacity)


def _fake_number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = ids.shape[0]
    return (
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty((batch,), dtype=torch.int32),
        ids.new_empty((batch, capacity, GEOMETRY_COLUMNS), dtype=torch.int64),
    )


def _fake_sum_instances(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pairs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, on_cpu = x.shape[0], backend(x) == "cpu"
    return (
        x.new_empty((*geometry.shape[:2], SUMS_COLUMNS), dtype=torch.float64),
        x.new_empty((batch, SAMPLE_COLUMNS), dtype=torch.float64),
        x.new_empty((batch, 0 if on_cpu else pairs), dtype=torch.int64),
        x.new_empty((batch, 0 if on_cpu else sites[1].shape[1]), dtype=torch.bool),
    )


def _fake_evaluate(
    x: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    geometry: Tensor,
    pixel_sums: Tensor,
    health: Tensor,
    values: Tensor | None,
    totals: Tensor | None,
    weights: list[float],
    activation: int,
    quantity: int,
    no_tp: bool,
    pairs: int,
    planar: bool,
    offset: float | None,
    spacing: list[float],
    proximity: bool,
    criteria: list[float],
    classes: int,
    reduction: int,
    rates: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    slopes = pixel_sums.new_empty((*geometry.shape[:2], SLOPES_COLUMNS))
    of_samples = pixel_sums.new_empty((x.shape[0], SAMPLE_SLOPES_COLUMNS))
    *_, where, touched = _fake_sum_instances(x, sites, counts, geometry, activation, quantity, no_tp, pairs)
    return x.new_empty((PROXIMITY + 1,)), x.new_empty(()), [slopes, of_samples, where, touched]


def find_then_evaluate(
    find: Any,
    evaluate: Any,
    x: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    weights: list[float],
    activation: int,
    *options: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """The operator `find_and_evaluate`, of a backend's other two. Of the options, nine are those of `find`."""
    of_find, of_evaluate = options[:9], options[9:]
    sites, pixel_sums, health, counts, geometry = find(x, labels, ids, activation, *of_find)
    found = x, sites, counts, geometry, pixel_sums, health, None, None
    return *evaluate(*found, weights, activation, *of_evaluate), sites, counts


_fake_find_and_evaluate = functools.partial(find_then_evaluate, _fake_find, _fake_evaluate)


def _fake_evaluate_backward(
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    counts: Tensor,
    kept: list[Tensor],
    grad_terms: Tensor | None,
    grad_sum: Tensor | None,
    weights: list[float],
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
    masses: bool,
    flows: bool,
    mistakes: int,
    values: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kept[0].new_empty(kept[0].shape[:2] if values else (0,))


def _fake_center_volumes(
    geometry: Tensor, counts: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    volume = (counts.shape[1], *shape)
    return geometry.new_empty(volume, dtype=torch.int32), geometry.new_empty(volume, dtype=torch.bool)


def _fake_unclaimed(x: Tensor, sites: list[Tensor], counts: Tensor, geometry: Tensor, pairs: int) -> Tensor:
    return geometry.new_empty((x.shape[0], geometry.shape[1]), dtype=torch.bool)


def _fake_cells(rows: Tensor, spacing: list[float]) -> Tensor:
    return rows.new_empty(rows.shape)


def _fake_region_loss(
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    counts: Tensor,
    chosen: Tensor | None,
    activation: int,
    kind: int,
    numbers: list[float],
    classes: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = x.new_empty((rows.shape[0], capacity + 1, REGION_SLOPES), dtype=torch.float64)
    return x.new_empty(()), slopes, slopes.new_empty((rows.shape[0],))


def _fake_region_loss_backward(
    grad: Tensor,
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    slopes: Tensor,
    factors: Tensor,
    activation: int,
    kind: int,
) -> Tensor:
    return x.new_empty(x.shape)


def reach_of_boxes(shape: list[int], planar: bool, offset: float, spacing: Sequence[float]) -> list[int]:
    """How far a centre box reaches along each axis of a volume, if it is `offset` along the longest."""
    # An image is a volume of one plane, which any reach of at least one covers.
    spatial, steps = shape[planar:], spacing[planar:]
    reach = [length / max(spatial) * offset for length in spatial]
    if len(set(steps)) > 1:  # (rounded, so that 0.9 / 0.3 is 3)
        mean = sum(steps) / len(steps)
        reach = [round(each * mean / step, 9) for each, step in zip(reach, steps, strict=True)]
    return [1] * planar + [math.ceil(each) for each in reach]


def first_rows(counts: Tensor, rows: int) -> Tensor:
    """(B,) -> (B, rows) bool: True in the first `counts` rows of each sample."""
    return torch.arange(rows, device=counts.device) < counts[:, None]


def gradient_of_values(grad_terms: Tensor, slopes: Tensor, sample_slopes: Tensor, counts: Tensor) -> Tensor:
    """Gradient of the criterion of each instance, where it was given, from that of the terms (7,)."""
    by_output = grad_terms[INSTANCE_OUTPUT] * sample_slopes[:, BY_OUTPUT]
    by_label = grad_terms[INSTANCE_LABEL] * sample_slopes[:, BY_LABEL]
    by_distance = grad_terms[PROXIMITY] * sample_slopes[:, BY_DISTANCE]
    by_value, by_distance = torch.cat((by_output, by_label)), torch.cat((-by_distance, by_distance))
    gradient = by_value[:, None] + by_distance[:, None] * slopes[..., DISTANCE]
    return torch.where(first_rows(counts[KEPT:].flatten().clamp(min=1), slopes.shape[1]), gradient, 0.0)


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, functools.partial(answer, _name), _key)
    torch.library.register_fake(f"triton_instance_loss::{_name}", globals()[f"_fake_{_name}"], lib=_library)

find = operator("find")
row_maps = operator("row_maps")
components = operator("components")
find_instances = operator("find_instances")
number_instances = operator("number_instances")
sum_instances = operator("sum_instances")
evaluate = operator("evaluate")
find_and_evaluate = operator("find_and_evaluate")
evaluate_backward = operator("evaluate_backward")
center_volumes = operator("center_volumes")
unclaimed = operator("unclaimed")
cells = operator("cells")
region_loss = operator("region_loss")
region_loss_backward = operator("region_loss_backward")
