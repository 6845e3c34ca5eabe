"""Losses on regions on the CPU: `region_loss` and `region_loss_backward` of ops.py.

A pass over all voxels makes p and the part of the cross entropy that has a logarithm, in pieces that stay in the cache,
and a loop adds them to the rows of the regions; what a loss makes of such a table is a few lines each. The cross
entropy of a logit x is max(x, 0) + log(1 + exp(-|x|)) where nothing is true and max(-x, 0) + the same where all is, so
that no digits cancel.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..ops import BY_CROSS_ENTROPY, BY_MASS, BY_SQUARES, BY_TRUE_MASS
from . import compiled
from .activation import CHUNK, Marks, Numbers, Rows

# Sums over a region: of p, y, p * y, p * p, the cross entropy, and its voxels.
MASS, TRUTH, TRUE_MASS, SQUARES, CROSS_ENTROPY, SIZE, COLUMNS = range(7)
# The least denominator of the Dice of a cell, as published.
LEAST = 1e-8


@compiled
def _find_truths(labels: NDArray[Any], limits: NDArray[Any], truths: Marks) -> None:
    """1 where a label is foreground, 0 where it is not, 2 where it is none."""
    lowest, half, highest = limits[0], limits[1], limits[2]
    for voxel in range(len(labels)):
        label = labels[voxel]
        fits = (label >= lowest) & (label <= highest)
        truths[voxel] = np.uint8(label > half) if fits else np.uint8(2)


def _truths(labels: Tensor) -> Marks:
    """What `_find_truths` says of all labels, as a flat array."""
    values = labels.numpy().reshape(-1)
    values = values.view(np.uint8) if values.dtype == np.bool_ else values
    truths = np.empty(len(values), dtype=np.uint8)
    _find_truths(values, np.array([-0.5, 0.5, 1.5]).astype(values.dtype), truths)
    return truths


@compiled
def _add_up(
    x: NDArray[Any], p: NDArray[Any], logs: NDArray[Any], logs_of_rest: NDArray[Any], truths: Marks, rows: Rows,
    soft: bool, kind: int, sums: Numbers,
) -> None:  # fmt: skip
    """Add voxels to the sums of their regions; those that follow each other in one region are added up first."""
    voxel, with_entropy = 0, len(logs) > 0
    while voxel < len(x):
        row, truth = rows[voxel], truths[voxel]
        mass, squares, cost, nothing, begin = 0.0, 0.0, 0.0, 0.0, voxel
        while voxel < len(x) and rows[voxel] == row and truths[voxel] == truth:
            value = p[voxel]
            mass += value
            squares += value * value
            nothing += 0 * x[voxel]  # NaN, if any is not finite
            if with_entropy:
                if not soft:
                    cost -= logs[voxel] if truth == 1 else logs_of_rest[voxel]
                else:
                    cost += max(-x[voxel] if truth == 1 else x[voxel], 0) - logs[voxel]
            voxel += 1
        if row < 0:
            continue
        if truth == 2:
            nothing = np.nan
        line, count = sums[row], voxel - begin
        if row == 0 and truth == 1 and kind != ops.CELLS:
            line[MASS] += 0 * nothing  # in no region, but broken is broken
            continue
        line[MASS] += mass + nothing
        line[SQUARES] += squares + nothing
        line[CROSS_ENTROPY] += cost + nothing
        line[SIZE] += count
        if truth == 1:
            line[TRUTH] += count
            line[TRUE_MASS] += mass + nothing


def _sum_regions(x: Tensor, labels: Tensor, rows: Tensor, soft: bool, entropy: bool, kind: int, most: int) -> Numbers:
    """Sums (len(rows), most + 1, 6) over the regions of each sample, row 0 for what is in no instance."""
    batch, none = len(x), torch.empty(0, dtype=x.dtype)
    sums, maps = np.zeros((len(rows), most + 1, COLUMNS)), rows.flatten(1).numpy()
    for sample, (volume, truth) in enumerate(zip(x.flatten(1), _truths(labels).reshape(batch, -1), strict=True)):
        for begin in range(0, len(volume), CHUNK):
            piece, here = volume[begin : begin + CHUNK], slice(begin, begin + CHUNK)
            p, logs, logs_of_rest = torch.sigmoid(piece) if soft else piece, none, none
            if entropy and soft:
                logs = torch.nn.functional.logsigmoid(piece.abs())
            elif entropy:
                logs, logs_of_rest = p.log().clamp_(min=-100.0), (-p).log1p_().clamp_(min=-100.0)
            values = piece.numpy(), p.numpy(), logs.numpy(), logs_of_rest.numpy(), truth[here]
            for row, table in zip(maps[sample::batch], sums[sample::batch], strict=True):
                _add_up(*values, row[here], soft, kind, table)
    return sums


def _blob(table: Numbers, slopes: Numbers, numbers: list[float]) -> float:
    """Each instance against all that is background."""
    dice, ce, smooth, by_logits = numbers
    rest, blobs, count = table[0], table[1:], len(table) - 1
    sizes = blobs[:, SIZE]
    # As published, logits of other instances are 0: they count as p = 1/2.
    others = by_logits * (sizes.sum() - sizes)
    below = blobs[:, MASS] + rest[MASS] + sizes + others / 2 + smooth
    ratio, size = (2 * blobs[:, MASS] + smooth) / below, sizes + rest[SIZE] + others
    cost = (blobs[:, CROSS_ENTROPY] + rest[CROSS_ENTROPY] + others * math.log(2)) / size
    slopes[1:, BY_MASS], slopes[0, BY_MASS] = dice * (ratio - 2) / below / count, dice * (ratio / below).mean()
    slopes[1:, BY_CROSS_ENTROPY], slopes[0, BY_CROSS_ENTROPY] = ce / size / count, (ce / size).mean()
    return float((dice * (1 - ratio) + ce * cost).mean())


def _cells(table: Numbers, slopes: Numbers, numbers: list[float]) -> float:
    """Each cell by itself; a sample without instances is one."""
    dice, ce, smooth, _ = numbers
    begin = 1 if len(table) > 1 else 0
    cells, slopes = table[begin:], slopes[begin:]
    mass, truth, size, count = cells[:, MASS], cells[:, TRUTH], np.maximum(cells[:, SIZE], 1), len(cells)
    true = (truth > 0) | (begin == 0)
    whole = mass + truth + smooth
    below, least = np.maximum(whole, LEAST), np.maximum(mass, LEAST)
    ratio = (2 * cells[:, TRUE_MASS] + smooth) / below
    slopes[:, BY_TRUE_MASS] = np.where(true, -2 * dice / below / count, 0.0)
    slopes[:, BY_MASS] = np.where(true & ~(whole < LEAST), dice * ratio / below / count, 0.0)
    slopes[:, BY_SQUARES] = np.where(true, 0.0, dice / least / count)
    slopes[:, BY_CROSS_ENTROPY] = ce / size / count
    values = dice * np.where(true, 1 - ratio, cells[:, SQUARES] / least) + ce * cells[:, CROSS_ENTROPY] / size
    return float(values.mean())


def _tversky(table: Numbers, slopes: Numbers, numbers: list[float]) -> float:
    """Instances weighted by their size, and the background; 0 of a sample stands for no loss, 1 for all."""
    alpha, beta, gamma, epsilon, background_weight, smooth = numbers
    rest, blobs = table[0], table[1:]
    weights = (blobs[:, SIZE] + epsilon) ** -gamma
    hit = (weights * blobs[:, MASS]).sum()
    missed = (weights * (blobs[:, SIZE] - blobs[:, MASS])).sum()
    false = background_weight * rest[MASS]
    below = hit + alpha * false + beta * missed + smooth
    ratio = (hit + smooth) / below if below != 0 else 1.0
    below = below if below != 0 else 1.0
    slopes[1:, BY_MASS] = weights * (ratio * (1 - beta) - 1) / below
    slopes[0, BY_MASS] = ratio * alpha * background_weight / below
    return float(1 - ratio)


def _false(table: Numbers, slopes: Numbers, chosen: NDArray[np.bool_]) -> float:
    """The means of p over regions that should not be there, added up."""
    slopes[1:, BY_MASS] = np.where(chosen, 1 / np.maximum(table[1:, SIZE], 1), 0.0)
    return float((slopes[1:, BY_MASS] * np.where(chosen, table[1:, MASS], 0.0)).sum())


def region_loss(
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
    """Operator `region_loss` (ops.py)."""
    used = counts.numpy()
    most = int(max(1, used.max(initial=0)))
    entropy = kind in (ops.BLOB, ops.CELLS) and numbers[1] != 0
    sums = _sum_regions(x, labels, rows, activation != ops.NONE, entropy, kind, most)
    slopes = np.zeros((len(rows), (capacity or most) + 1, ops.REGION_SLOPES))
    values, shares = np.zeros(len(rows)), np.zeros(len(rows))
    for sample, count in enumerate(used.tolist()):
        table, of_sample = sums[sample, : count + 1], slopes[sample, : count + 1]
        shares[sample] = count > 0
        if kind == ops.CELLS:
            shares[sample], values[sample] = 1, _cells(table, of_sample, numbers)
        elif kind == ops.FALSE and chosen is not None:
            meant = chosen[sample, :count].numpy()
            shares[sample], values[sample] = meant.sum(), _false(table, of_sample, meant)
        elif kind == ops.TVERSKY:
            shares[sample], values[sample] = 1, _tversky(table, of_sample, numbers)
        elif count > 0:
            values[sample] = _blob(table, of_sample, numbers)
    # What counts of a class: its samples, those with instances, or regions; without any, its value is 0.
    by_class = len(rows) // max(len(x), 1), -1, classes  # the first are sides
    of_class = shares.reshape(by_class).sum(1, keepdims=True)
    if kind == ops.TVERSKY:
        of_class = of_class * (used.reshape(by_class) > 0).any(1, keepdims=True)
    factors = 1 / np.where(of_class > 0, of_class, np.inf) / classes
    if len(of_class) == 2:
        factors *= np.array([numbers[3], 1 - numbers[3]])[:, None, None]
    factors = (factors * np.ones(shares.shape).reshape(by_class)).reshape(-1)
    value = (values * factors * (shares > 0)).sum() + (0 * sums[..., MASS]).sum()
    return torch.tensor(value, dtype=x.dtype), torch.from_numpy(slopes), torch.from_numpy(factors)


@compiled
def _differentiate(
    p: NDArray[Any], truths: Marks, rows: Rows, table: NDArray[Any], soft: bool, kind: int, adds: bool,
    grads: NDArray[Any],
) -> None:  # fmt: skip
    """Write the gradient of x, from the slopes of each region, or add it to that of the side before."""
    for voxel in range(len(p)):
        row, u, y = rows[voxel], p[voxel], truths[voxel] == 1
        before = grads[voxel] if adds else 0
        if row < 0 or (row == 0 and y and kind != ops.CELLS):
            grads[voxel] = before
            continue
        line, rest = table[row], 1 - u
        by_p = line[BY_MASS] + u * line[BY_SQUARES]
        by_p += line[BY_TRUE_MASS] if y else 0
        by_entropy = line[BY_CROSS_ENTROPY] * (-rest if y else u)
        # A zero stays one: where cross entropy is not asked for, its slope may be anything.
        if soft:
            grads[voxel] = before + by_p * u * rest + by_entropy
        else:
            grads[voxel] = before + by_p + (by_entropy / max(u * rest, 1e-12) if line[BY_CROSS_ENTROPY] != 0 else 0)


def region_loss_backward(
    grad: Tensor,
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    slopes: Tensor,
    factors: Tensor,
    activation: int,
    kind: int,
) -> Tensor:
    """Operator `region_loss_backward` (ops.py)."""
    # From NumPy, which asks the system for large pages.
    grads = torch.from_numpy(np.empty(tuple(x.shape), dtype=x.numpy().dtype))
    batch, soft, truths = len(x), activation != ops.NONE, _truths(labels).reshape(len(x), -1)
    maps, tables = rows.flatten(1).numpy(), (slopes * factors[:, None, None] * grad.double()).to(x.dtype).numpy()
    for sample, (volume, into) in enumerate(zip(x.flatten(1), grads.flatten(1), strict=True)):
        for begin in range(0, len(volume), CHUNK):
            piece, here = volume[begin : begin + CHUNK], slice(begin, begin + CHUNK)
            # (of one side, the gradient takes the place of p)
            p = torch.sigmoid(piece, out=into[here] if len(rows) == batch else None) if soft else piece
            sides = zip(maps[sample::batch], tables[sample::batch], strict=True)
            for side, (row, table) in enumerate(sides):
                _differentiate(
                    p.numpy(), truths[sample, here], row[here], table, soft, kind, side > 0, into[here].numpy()
                )
    return grads
