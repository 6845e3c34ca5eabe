"""Losses on regions: `region_loss` and its backward of ops.py.

At a voxel: p the probability, y its label, c the cross entropy. Of a logit x, c = max(-x, 0) + l where y = 1 and
max(x, 0) + l where y = 0, with l = log(1 + exp(-|x|)) to all digits; of a probability -log p and -log(1 - p), at most
100. A region is what has one number in the row map, from 0 to the count; a voxel below 0, or beyond the table, is in
none, nor is one of number 0 with y = 1, but with CELLS. Its sums are those of p, y, p y, p^2, c, and its voxels.

1. `_clear_kernel` clears the rows that are used.
2. `_sum_regions_kernel`: each program goes over some blocks of a sample. What is in no instance it keeps to itself
   until it is done. Elsewhere, while voxels remain, it takes the largest number, reduces over its voxels, sends scalar
   atomics to its row, drops them: a run of a cell is one atomic for each sum.
3. `_losses_kernel`, one program a sample, goes over its rows up to the count (region_formulas.py): the sample's own
   value and its slopes, by the sums of p, p y, p^2 and c, and its share in the mean over its class.
4. `_total_kernel` adds samples up: the value, and its derivative by the value of each.

Of two sides, each voxel is in a region of either: samples of the second follow those of the first, S of them on B
volumes.

Backward, one kernel, s the slopes of the voxel's region, times the factor of its sample and the gradient:

    dx = (s.MASS + s.TRUE_MASS y + s.SQUARES p) p' + s.CROSS_ENTROPY c',    p' = p (1 - p),  c' = p - y,

and without activation p' = 1, c' = (p - y) / max(p (1 - p), 1e-12). (One of both p in a square is held constant.)

p and c are computed in the precision of x, and added in float64. Deterministic but for the order of atomics, which
shows in the last bits of a float64, unless PyTorch is asked to be deterministic: then one program goes over the blocks
of a sample. Where x or a label is broken, so is the value. Bytes a voxel: the sizes of x and of a label, and 4 for the
row, each way, and one gradient written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .activation import SIGMOID, is_label, is_mask_like, probability
from .blocks import adding_programs, block_size, cut, table_programs
from .launches import bits_of, launch, of_bits
from .quantities import CROSS_ENTROPY as ENTROPY_QUANTITY
from .quantities import log_of_sum, phi_derivative, sum_where
from .region_formulas import (
    BY_CROSS_ENTROPY,
    BY_MASS,
    BY_SQUARES,
    BY_TRUE_MASS,
    COLUMNS,
    CROSS_ENTROPY,
    MASS,
    SIZE,
    SLOPES,
    SQUARES,
    TRUE_MASS,
    TRUTH,
    blob,
    cells,
    false,
    nothing,
    tversky,
)

BLOB: tl.constexpr = tl.constexpr(ops.BLOB)
CELLS: tl.constexpr = tl.constexpr(ops.CELLS)
TVERSKY: tl.constexpr = tl.constexpr(ops.TVERSKY)
FALSE: tl.constexpr = tl.constexpr(ops.FALSE)
# Numbers of a kind come by value, since Triton would compile for each of them: as bits.
NUMBERS = [f"number_{place}" for place in range(6)]
# For one warp, which reduces without barriers (pairs.py).
SUMS_BLOCK, SUMS_WARPS = 128, 1
# Programs a sample, at most: enough to fill today's devices, and no more, as each sends its background to one address.
SUMS_PROGRAMS = 2048
GRADIENT_BLOCK = 512
CLEAR_BLOCK = 256
# One lane a thread: samples rarely have more instances, and the float64 arithmetic wants the registers.
ROWS_BLOCK = 128
SAMPLES_BLOCK = 16


@triton.jit
def _clear_kernel(
    counts_ptr,  # (S,) int32
    sums_ptr,  # (S, capacity + 1, 6) float64
    capacity,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    sums_ptr += sample * (capacity + 1) * COLUMNS
    used = (tl.minimum(tl.load(counts_ptr + sample), capacity) + 1) * COLUMNS
    for first in range(tl.program_id(0) * BLOCK, used, tl.num_programs(0) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(sums_ptr + place, tl.zeros((BLOCK,), tl.float64), mask=place < used)


@triton.jit
def _region(row, y, capacity, KIND: tl.constexpr):
    """The number of a voxel's region, -1 for none."""
    nowhere = row > capacity
    if KIND != CELLS:
        nowhere |= (row == 0) & y
    return tl.where(nowhere, -1, row)


@triton.jit
def _rest(x, p, ACTIVATION: tl.constexpr):
    """1 - p, of a logit without cancellation."""
    return probability(-x, ACTIVATION) if ACTIVATION == SIGMOID else 1 - p


@triton.jit
def _cross_entropy(x, p, y, ACTIVATION: tl.constexpr):
    """-log p where y, else -log(1 - p)."""
    if ACTIVATION == SIGMOID:
        against = tl.where(y, -x, x)
        cost = tl.where(against > 0, against, 0.0).to(x.dtype) + log_of_sum(tl.exp(-tl.abs(x)))
    else:
        cost = -tl.where(y, tl.log(p), log_of_sum(-p))
        cost = tl.where(cost > 100, tl.full(p.shape, 100.0, p.dtype), cost)  # NaN stays
    return cost


@triton.jit
def _count(numbers):
    """Sum of whole numbers, or how many lanes there are, in float64."""
    return tl.sum(numbers.to(tl.int32), axis=0).to(tl.float64)


@triton.jit
def _add(sums_ptr, mass, truth, true_mass, squares, cost, size, KIND: tl.constexpr, ENTROPY: tl.constexpr):
    """Add to a row what its kind of loss looks at."""
    tl.atomic_add(sums_ptr + MASS, mass, sem="relaxed")
    tl.atomic_add(sums_ptr + SIZE, size, sem="relaxed")
    if KIND == CELLS:
        tl.atomic_add(sums_ptr + TRUTH, truth, sem="relaxed")
        tl.atomic_add(sums_ptr + TRUE_MASS, true_mass, sem="relaxed")
        tl.atomic_add(sums_ptr + SQUARES, squares, sem="relaxed")
    if ENTROPY:
        tl.atomic_add(sums_ptr + CROSS_ENTROPY, cost, sem="relaxed")


@triton.jit
def _sum_regions_kernel(
    x_ptr,  # (B, V) float32 or float64
    labels_ptr,  # (B, V) of any real dtype
    rows_ptr,  # (S, V) int32
    sums_ptr,  # (S, capacity + 1, 6) float64
    B,
    V,
    capacity,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample % B * V
    labels_ptr += sample % B * V
    rows_ptr += sample * V
    sums_ptr += sample * (capacity + 1) * COLUMNS
    mass = tl.zeros((BLOCK,), tl.float64)  # of what is in no instance
    truth = tl.zeros((BLOCK,), tl.int32)
    true_mass = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    cost = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.int32)
    blocks = (V - 1) // BLOCK + 1  # rounded up; V + BLOCK may not fit
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        voxel = block * BLOCK + tl.arange(0, BLOCK)
        in_volume = voxel < V
        x = tl.load(x_ptr + voxel, mask=in_volume, other=0)
        labels = tl.load(labels_ptr + voxel, mask=in_volume, other=0)
        row = tl.load(rows_ptr + voxel, mask=in_volume, other=-1)
        y = is_label(labels)
        broken = (row >= 0) & ~((tl.abs(x) < float("inf")) & is_mask_like(labels))
        key = _region(row, y, capacity, KIND)
        key = tl.where(broken & (key < 0), 0, key)  # in no region, but broken is broken
        p = tl.where(broken, float("nan"), probability(x, ACTIVATION))
        c = _cross_entropy(x, p, y, ACTIVATION) if ENTROPY else p

        background = key == 0
        mass += tl.where(background, p.to(tl.float64), 0.0)
        size += background.to(tl.int32)
        if KIND == CELLS:
            truth += (background & y).to(tl.int32)
            true_mass += tl.where(background & y, p.to(tl.float64), 0.0)
            squares += tl.where(background, (p * p).to(tl.float64), 0.0)
        if ENTROPY:
            cost += tl.where(background, c.to(tl.float64), 0.0)
        while tl.max(key, axis=0) > 0:
            largest = tl.max(key, axis=0)
            here = key == largest
            _add(
                sums_ptr + largest * COLUMNS, sum_where(p, here), _count(here & y),
                sum_where(p, here & y), sum_where(p * p, here), sum_where(c, here),
                _count(here), KIND, ENTROPY,
            )  # fmt: skip
            key = tl.where(here, 0, key)
    voxels = tl.sum(size, axis=0)
    if voxels > 0:
        _add(
            sums_ptr, tl.sum(mass, axis=0), _count(truth), tl.sum(true_mass, axis=0), tl.sum(squares, axis=0),
            tl.sum(cost, axis=0), voxels.to(tl.float64), KIND, ENTROPY,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _losses_kernel(
    number_0: tl.int64,  # those of the kind (ops.py), float64 in their bits
    number_1: tl.int64,
    number_2: tl.int64,
    number_3: tl.int64,
    number_4: tl.int64,
    number_5: tl.int64,
    sums_ptr,  # (S, capacity + 1, 6) float64
    counts_ptr,  # (S,) int32
    chosen_ptr,  # (S, capacity) bool, or None
    slopes_ptr,  # (S, capacity + 1, 4) float64
    parts_ptr,  # (S, 2) float64: value and share of each sample
    capacity,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    sums_ptr += sample * (capacity + 1) * COLUMNS
    slopes_ptr += sample * (capacity + 1) * SLOPES
    count = tl.minimum(tl.load(counts_ptr + sample), capacity)
    for column in tl.static_range(SLOPES):
        tl.store(slopes_ptr + column, 0.0)
    share = (count > 0).to(tl.float64)
    if KIND == BLOB:
        value = blob(
            sums_ptr, slopes_ptr, count, of_bits(number_0), of_bits(number_1), of_bits(number_2), of_bits(number_3),
            BLOCK,
        )  # fmt: skip
    elif KIND == CELLS:
        share = share * 0.0 + 1
        value = cells(sums_ptr, slopes_ptr, count, of_bits(number_0), of_bits(number_1), of_bits(number_2), BLOCK)
    elif KIND == TVERSKY:
        share = share * 0.0 + 1
        value = tversky(
            sums_ptr, slopes_ptr, count, of_bits(number_0), of_bits(number_1), of_bits(number_2), of_bits(number_3),
            of_bits(number_4), of_bits(number_5), BLOCK,
        )  # fmt: skip
    else:
        value, share = false(sums_ptr, slopes_ptr, chosen_ptr + sample * capacity, count, BLOCK)
    tl.store(parts_ptr + sample * 2, value + nothing(sums_ptr, count, BLOCK))
    tl.store(parts_ptr + sample * 2 + 1, share)


@triton.jit(do_not_specialize=["share"])
def _total_kernel(
    share: tl.int64,  # of the first of two sides, float64 in its bits
    parts_ptr,  # (S, 2) float64: value and share of each sample
    counts_ptr,  # (S,) int32
    value_ptr,  # () float32 or float64
    factors_ptr,  # (S,) float64
    samples,  # of a class
    classes,
    KIND: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([], tl.float64)
    of_side = of_bits(share)
    for number in range(classes * SIDES):
        start = number // classes * samples * classes + number % classes
        shares = tl.zeros((BLOCK,), tl.float64)
        present = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, samples, BLOCK):
            turn = first + tl.arange(0, BLOCK)
            sample, here = start + turn * classes, turn < samples
            of_sample = tl.load(parts_ptr + sample * 2 + 1, mask=here, other=0.0)
            shares += of_sample
            if KIND == TVERSKY:
                present |= (tl.load(counts_ptr + sample, mask=here, other=0) > 0).to(tl.int32)
            else:
                present |= (of_sample > 0).to(tl.int32)
        # Without any, the value of a class is 0.
        factor = 1 / (tl.maximum(tl.sum(shares, axis=0), 1.0) * classes)
        factor = tl.where(tl.max(present, axis=0) > 0, factor, 0.0)
        if SIDES == 2:
            factor *= tl.where(number < classes, of_side, 1 - of_side)
        for first in range(0, samples, BLOCK):
            turn = first + tl.arange(0, BLOCK)
            sample, here = start + turn * classes, turn < samples
            value = tl.load(parts_ptr + sample * 2, mask=here, other=0.0)
            total += tl.sum(value * factor, axis=0)
            tl.store(factors_ptr + sample, factor + tl.zeros_like(value), mask=here)
    tl.store(value_ptr, total)


@triton.jit
def _of_region(p, rest, y, row, factor, slopes_ptr, capacity, ACTIVATION: tl.constexpr, KIND: tl.constexpr):
    """Gradient of x, from the slopes of the region that each voxel is in and the factor of the sample."""
    key = _region(row, y, capacity, KIND)
    here = key >= 0
    row_ptr = slopes_ptr + key * SLOPES
    by_p = tl.load(row_ptr + BY_MASS, mask=here, other=0.0)
    if KIND == CELLS:
        by_p += tl.load(row_ptr + BY_TRUE_MASS, mask=here & y, other=0.0)
        by_p += tl.load(row_ptr + BY_SQUARES, mask=here, other=0.0) * p.to(tl.float64)
    grad = by_p
    if ACTIVATION == SIGMOID:
        grad = by_p * (p * rest).to(tl.float64)
    if (KIND == BLOB) | (KIND == CELLS):
        by_cost = tl.load(row_ptr + BY_CROSS_ENTROPY, mask=here, other=0.0)
        if ACTIVATION == SIGMOID:
            grad += by_cost * tl.where(y, -rest, p).to(tl.float64)
        else:
            slope = phi_derivative(p, y.to(p.dtype), ENTROPY_QUANTITY)
            # A zero stays one: where cross entropy is not asked for, its slope may be anything.
            grad += tl.where(by_cost != 0, by_cost * slope.to(tl.float64), 0.0)
    return tl.where(here, grad * factor, 0.0)


@triton.jit
def _region_backward_kernel(
    grad_ptr,  # () of any float dtype
    x_ptr,  # (B, V) float32 or float64
    labels_ptr,  # (B, V) of any real dtype
    rows_ptr,  # (S, V) int32
    slopes_ptr,  # (S, capacity + 1, 4) float64
    factors_ptr,  # (S,) float64
    grad_x_ptr,  # (B, V), of the dtype of x
    V,
    capacity,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample, B = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    in_volume = voxel < V
    x = tl.load(x_ptr + sample * V + voxel, mask=in_volume, other=0)
    y = is_label(tl.load(labels_ptr + sample * V + voxel, mask=in_volume, other=0))
    p = probability(x, ACTIVATION)
    rest = _rest(x, p, ACTIVATION)
    total = tl.zeros((BLOCK,), tl.float64)
    for side in tl.static_range(SIDES):
        row = tl.load(rows_ptr + (side * B + sample) * V + voxel, mask=in_volume, other=-1)
        factor = tl.load(grad_ptr).to(tl.float64) * tl.load(factors_ptr + side * B + sample)
        side_ptr = slopes_ptr + (side * B + sample) * (capacity + 1) * SLOPES
        total += _of_region(p, rest, y, row, factor, side_ptr, capacity, ACTIVATION, KIND)
    tl.store(grad_x_ptr + sample * V + voxel, total.to(x.dtype), mask=in_volume)


def launch_region_loss(
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
    """The value, slopes of each sample's own by sums of its regions, and its derivatives by those of samples."""
    batch, samples, num_voxels = len(x), len(rows), x.shape[1:].numel()
    sizes = (samples,), (samples, capacity + 1, SLOPES.value), (samples, capacity + 1, COLUMNS.value), (samples, 2)
    factors, slopes, sums, parts = (torch.empty(size, dtype=torch.float64, device=x.device) for size in sizes)
    value = x.new_empty(())
    if batch == 0:
        return value.zero_(), slopes, factors
    clear_block = block_size((capacity + 1) * COLUMNS.value, CLEAR_BLOCK)
    launch(_clear_kernel, (table_programs(cut((capacity + 1) * COLUMNS.value, clear_block)), samples),
        counts, sums, capacity, clear_block,
    )  # fmt: skip
    if num_voxels > 0:
        entropy = kind in (ops.BLOB, ops.CELLS) and numbers[1] != 0
        block = block_size(num_voxels, SUMS_BLOCK)
        programs = min(cut(num_voxels, block), SUMS_PROGRAMS)
        launch(_sum_regions_kernel, (adding_programs(programs), samples),
            x, labels, rows, sums, batch, num_voxels, capacity, activation, kind, entropy, block,
            num_warps=SUMS_WARPS,
        )  # fmt: skip
    launch(_losses_kernel, (samples,),
        sums, counts, chosen, slopes, parts, capacity, kind, block_size(capacity, ROWS_BLOCK),
        values=bits_of((*numbers, *(0.0,) * (len(NUMBERS) - len(numbers)))),
    )  # fmt: skip
    launch(_total_kernel, (1,),
        parts, counts, value, factors, batch // classes, classes, kind, samples // batch, SAMPLES_BLOCK,
        values=bits_of(numbers[3:4] if kind == ops.CELLS else (1.0,)), num_warps=1,
    )  # fmt: skip
    return value, slopes, factors


def launch_region_loss_backward(
    grad: Tensor,
    x: Tensor,
    labels: Tensor,
    rows: Tensor,
    slopes: Tensor,
    factors: Tensor,
    activation: int,
    kind: int,
) -> Tensor:
    """Gradient of x."""
    grad_x = torch.empty_like(x)
    batch, num_voxels = len(x), x.shape[1:].numel()
    if batch * num_voxels > 0:
        block = block_size(num_voxels, GRADIENT_BLOCK)
        launch(_region_backward_kernel, (cut(num_voxels, block), batch),
            grad, x, labels, rows, slopes, factors, grad_x, num_voxels, slopes.shape[1] - 1,
            activation, kind, len(rows) // batch, block,
        )  # fmt: skip
    return grad_x
