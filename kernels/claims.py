"""Which outputs no label claims.

A label claims, among the outputs that touch it, the one with the largest Dice 2 |O and L| / (|O| + |L|), of equals the
one with the smallest id. An output that no label claims is false, a second fragment of a label too.

1. `_clear_kernel`: no pairs, no claims, and every output is unclaimed.
2. `_share_kernel` puts each pair (output, label) that touches into a hash table (pairs.py), with the number of voxels
   that both share. Lanes of a block with the same pair are counted first.
3. `_best_kernel`: the largest Dice of each label, as an atomic maximum of bits: those of positive numbers are in order.
4. `_claim_kernel`: of the outputs that have it the smallest id.
5. `_mark_kernel`: these are claimed.

Backward: none, claims are constants. Deterministic: everything is counted, or a minimum or maximum. Bytes a voxel: 8;
12 for each slot of the hash table, three times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, cut, table_programs, threads
from .launches import launch
from .pairs import SUMS_WARPS, insert_pair

SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
GEOMETRY_COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
# For one warp (pairs.py), which reduces without barriers.
SHARE_BLOCK = 256
ROWS_BLOCK = 256


@triton.jit
def _clear_kernel(
    counts_ptr,  # (3, B) int32
    pairs_ptr,  # (B, slots) int64
    shared_ptr,  # (B, slots) int32
    best_ptr,  # (B, capacity) int64
    claims_ptr,  # (B, capacity) int32
    unclaimed_ptr,  # (B, capacity) bool
    slots,
    capacity,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    start, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for first in range(start, slots, step):
        slot = first + tl.arange(0, BLOCK)
        tl.store(pairs_ptr + sample * slots + slot, tl.zeros((BLOCK,), tl.int64), mask=slot < slots)
        tl.store(shared_ptr + sample * slots + slot, tl.zeros((BLOCK,), tl.int32), mask=slot < slots)
    outputs = tl.load(counts_ptr + OUTPUTS * tl.num_programs(1) + sample)
    for first in range(start, capacity, step):
        row = first + tl.arange(0, BLOCK)
        here = row < capacity
        tl.store(best_ptr + sample * capacity + row, tl.zeros((BLOCK,), tl.int64), mask=here)
        tl.store(claims_ptr + sample * capacity + row, tl.zeros((BLOCK,), tl.int32) + capacity, mask=here)
        tl.store(unclaimed_ptr + sample * capacity + row, row < outputs, mask=here)


@triton.jit
def _share_kernel(
    sites_ptr,  # (2 B, V) int32
    pairs_ptr,  # (B, slots) int64
    shared_ptr,  # (B, slots) int32
    V,
    slots,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    index = sample * V + voxel
    out = tl.load(sites_ptr + index, mask=voxel < V, other=0)
    lab = tl.load(sites_ptr + tl.num_programs(1).to(tl.int64) * V + index, mask=voxel < V, other=0)
    key = tl.where((out > 0) & (lab > 0), (out.to(tl.int64) << 32) | lab, 0)
    while tl.max(key, axis=0) > 0:
        largest = tl.max(key, axis=0)
        here = key == largest
        slot = insert_pair(pairs_ptr + sample * slots, largest >> 32, largest & 0xFFFFFFFF, slots, THREADS)
        tl.atomic_add(shared_ptr + sample * slots + slot, tl.sum(here.to(tl.int32), axis=0), sem="relaxed")
        key = tl.where(here, 0, key)


@triton.jit
def _pairs(slot, pairs_ptr, shared_ptr, geometry_ptr, slots, capacity):
    """Rows of the pairs in some slots, counted from 0, the bits of half of their Dice, and whether there is a pair."""
    sample = tl.program_id(1).to(tl.int64)
    pair = tl.load(pairs_ptr + sample * slots + slot, mask=slot < slots, other=0)
    out, lab, here = (pair >> 32) - 1, (pair & 0xFFFFFFFF) - 1, pair > 0
    shared = tl.load(shared_ptr + sample * slots + slot, mask=here, other=0)
    out_row, lab_row = sample * capacity + out, (tl.num_programs(1) + sample) * capacity + lab
    both = tl.load(geometry_ptr + out_row * GEOMETRY_COLUMNS + SIZE, mask=here, other=1)
    both += tl.load(geometry_ptr + lab_row * GEOMETRY_COLUMNS + SIZE, mask=here, other=1)
    dice = shared.to(tl.float64) / both.to(tl.float64)
    return out, lab, dice.to(tl.int64, bitcast=True), here


@triton.jit
def _best_kernel(
    pairs_ptr,  # (B, slots) int64
    shared_ptr,  # (B, slots) int32
    geometry_ptr,  # (2 B, capacity, 10) int64
    best_ptr,  # (B, capacity) int64
    slots,
    capacity,
    BLOCK: tl.constexpr,
):
    best_ptr += tl.program_id(1).to(tl.int64) * capacity
    for first in range(tl.program_id(0) * BLOCK, slots, tl.num_programs(0) * BLOCK):
        slot = first + tl.arange(0, BLOCK)
        _, lab, dice, here = _pairs(slot, pairs_ptr, shared_ptr, geometry_ptr, slots, capacity)
        tl.atomic_max(best_ptr + lab, dice, mask=here, sem="relaxed")


@triton.jit
def _claim_kernel(
    pairs_ptr,  # (B, slots) int64
    shared_ptr,  # (B, slots) int32
    geometry_ptr,  # (2 B, capacity, 10) int64
    best_ptr,  # (B, capacity) int64
    claims_ptr,  # (B, capacity) int32
    slots,
    capacity,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    for first in range(tl.program_id(0) * BLOCK, slots, tl.num_programs(0) * BLOCK):
        slot = first + tl.arange(0, BLOCK)
        out, lab, dice, here = _pairs(slot, pairs_ptr, shared_ptr, geometry_ptr, slots, capacity)
        here &= dice == tl.load(best_ptr + sample * capacity + lab, mask=here, other=0)
        tl.atomic_min(claims_ptr + sample * capacity + lab, out.to(tl.int32), mask=here, sem="relaxed")


@triton.jit
def _mark_kernel(
    counts_ptr,  # (3, B) int32
    claims_ptr,  # (B, capacity) int32
    unclaimed_ptr,  # (B, capacity) bool
    capacity,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    labels = tl.minimum(tl.load(counts_ptr + LABELS * tl.num_programs(1) + sample), capacity)
    for first in range(tl.program_id(0) * BLOCK, labels, tl.num_programs(0) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        claim = tl.load(claims_ptr + sample * capacity + row, mask=row < labels, other=0)
        here = (row < labels) & (claim < capacity)
        tl.store(unclaimed_ptr + sample * capacity + claim, tl.zeros((BLOCK,), tl.int1), mask=here)


def launch_unclaimed(x: Tensor, sites: list[Tensor], counts: Tensor, geometry: Tensor, pairs: int) -> Tensor:
    """(B, capacity) bool: which outputs no label claims, False in rows that are not used."""
    (_, capacity, _), batch, device = geometry.shape, len(x), x.device
    unclaimed = torch.empty((batch, capacity), dtype=torch.bool, device=device)
    num_voxels = x.shape[1:].numel()
    if batch * capacity * num_voxels == 0:
        return unclaimed
    table, shared = (torch.empty((batch, pairs), dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    best, claims = (torch.empty((batch, capacity), dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    block = block_size(max(pairs, capacity), ROWS_BLOCK)
    grid = table_programs(cut(max(pairs, capacity), block)), batch
    launch(_clear_kernel, grid, counts, table, shared, best, claims, unclaimed, pairs, capacity, block)
    voxels = block_size(num_voxels, SHARE_BLOCK)
    launch(_share_kernel, (cut(num_voxels, voxels), batch),
        sites[0], table, shared, num_voxels, pairs, voxels, threads(SUMS_WARPS), num_warps=SUMS_WARPS,
    )  # fmt: skip
    launch(_best_kernel, grid, table, shared, geometry, best, pairs, capacity, block)
    launch(_claim_kernel, grid, table, shared, geometry, best, claims, pairs, capacity, block)
    launch(_mark_kernel, grid, counts, claims, unclaimed, capacity, block)
    return unclaimed
