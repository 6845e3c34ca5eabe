"""Which kept outputs and labels touch, and what they bring each other.

The *pairs* of rows (output, label) that touch are a hash set for each sample: a table of slots, twice
as many as there can be pairs. A pair is put in by linear probing, and a slot taken by compare-and-swap and
never freed. In which order pairs come, and so where they stand, is any; what follows from them is added in the order of
rows, each pair looked up:

    output o:  LABEL = sum of the sizes of the labels that touch o
    label l:   COST += sum of the excess of the outputs that touch l

Backward (terms_backward.py): the gradient of the excess of o is the sum of the gradients of COST over the labels that
touch o.

The kernel that does this last part of the forward also adds up the sums of whole samples, of which the blocks of
tables.py have written a part each. Deterministic: everything is added in a fixed order. Bytes a voxel: none; 8 for each
row of a kept output and each row of a label, a few times.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import block_size, table_programs
from .launches import launch
from .quantities import PARTS_BLOCK, sum_parts

COST: tl.constexpr = tl.constexpr(ops.COST)
LABEL: tl.constexpr = tl.constexpr(ops.LABEL)
COLUMNS: tl.constexpr = tl.constexpr(ops.SUMS_COLUMNS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
GEOMETRY_COLUMNS: tl.constexpr = tl.constexpr(ops.GEOMETRY_COLUMNS)
SIZE: tl.constexpr = tl.constexpr(ops.SIZE)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
# Warps of the kernel that puts pairs in: one, so that all its threads see one slot alike.
SUMS_WARPS = 1
# One lane a thread of two warps: a sample rarely has more labels or kept outputs.
NEIGHBOURS_BLOCK, NEIGHBOURS_WARPS = 64, 2
# Odd multipliers with well spread bits (from the golden ratio and from MurmurHash3), below 2^32, so that a product with
# a row stays below 2^63. Of the low half of a product the high bits are mixed best: they say where in the table.
OUT_FACTOR: tl.constexpr = tl.constexpr(0x9E3779B1)
LAB_FACTOR: tl.constexpr = tl.constexpr(0x85EBCA6B)


@triton.jit
def _key_and_slot(out, lab, slots):
    """What stands for a pair of rows, counted from 1 in int64, and in which of the slots it is looked for first."""
    mixed = ((out * OUT_FACTOR) ^ (lab * LAB_FACTOR)) & 0xFFFFFFFF
    return (out << 32) | lab, (mixed * slots) >> 32


@triton.jit
def _next(slot, slots):
    """The slot behind one, in a circle."""
    return tl.where(slot + 1 < slots, slot + 1, 0)


@triton.jit
def insert_pair(pairs_ptr, out, lab, slots, THREADS: tl.constexpr):
    """Put a pair of rows into the hash table of `slots`, unless it is there or the table is full; its slot.

    By all THREADS of the program, one lane each.
    """
    key, slot = _key_and_slot(out, lab, slots)
    empty = tl.zeros((THREADS,), tl.int64)
    place = slot
    probes = 0
    while probes < slots:
        # One value for all threads, so that all of them go the same way, whatever others write meanwhile.
        found = tl.max(tl.load(pairs_ptr + slot + empty), axis=0)
        if found == 0:
            # All threads try to take the slot: Triton up to 3.4 can't assemble a scalar compare-and-swap of 64 bits.
            # If one of them did, the next ones found the key there.
            found = tl.max(tl.atomic_cas(pairs_ptr + slot + empty, empty, empty + key, sem="relaxed"), axis=0)
        place = tl.where(found == key, slot, place)
        probes = tl.where(found == key, slots, probes + 1)
        slot = _next(slot, slots)
    return place


@triton.jit
def touching(pairs_ptr, out, lab, here, slots):
    """Which pairs of rows, counted from 0, are in the hash table, of those that are `here`."""
    key, slot = _key_and_slot(out.to(tl.int64) + 1, lab.to(tl.int64) + 1, slots)
    found = tl.zeros_like(key)
    searching = here.to(tl.int32)
    probes = 0
    while (tl.max(searching, axis=0) > 0) & (probes < slots):
        at = tl.load(pairs_ptr + slot, mask=searching > 0, other=0)
        found = tl.where(at == key, key, found)
        searching = tl.where((at == key) | (at == 0), 0, searching)
        slot = _next(slot, slots)
        probes += 1
    return found > 0


@triton.jit
def _sum_neighbours_kernel(
    pairs_ptr,  # (B, slots) int64
    geometry_ptr,  # (2 B, capacity, 10) int64
    excess_ptr,  # (B, capacity) float64
    counts_ptr,  # (3, B) int32
    parts_ptr,  # (B, parts, 3) float64: of the sums of a sample
    sums_ptr,  # (2 B, capacity, 5) float64
    sample_sums_ptr,  # (B, 3) float64
    parts,
    slots,
    capacity,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1)
    kept, num_labels = tl.load(counts_ptr + KEPT * B + sample), tl.load(counts_ptr + LABELS * B + sample)
    if tl.program_id(0) >= tl.maximum(tl.maximum(kept, num_labels), 1):  # there is no row for it
        return
    if tl.program_id(0) == 0:
        read = tl.where((kept == 0) | (num_labels == 0), parts, 0)  # elsewhere nobody asks for them
        for column in tl.static_range(SAMPLE_COLUMNS):
            part_ptr = parts_ptr + sample * parts * SAMPLE_COLUMNS + column
            total = sum_parts(part_ptr, read, SAMPLE_COLUMNS, PARTS)
            tl.store(sample_sums_ptr + sample * SAMPLE_COLUMNS + column, total)
    pairs_ptr += sample * slots
    excess_ptr += sample * capacity
    labels_ptr = geometry_ptr + (B + sample) * capacity * GEOMETRY_COLUMNS
    kept, num_labels = tl.minimum(kept, capacity), tl.minimum(num_labels, capacity)
    for row in range(tl.program_id(0), kept, tl.num_programs(0)):
        sizes = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, num_labels, BLOCK):
            lab = first + tl.arange(0, BLOCK)
            here = touching(pairs_ptr, row + lab * 0, lab, lab < num_labels, slots)
            sizes += tl.load(labels_ptr + lab * GEOMETRY_COLUMNS + SIZE, mask=here, other=0)
        row_ptr = sums_ptr + (sample * capacity + row) * COLUMNS
        tl.store(row_ptr + LABEL, tl.sum(sizes, axis=0).to(tl.float64))
    for row in range(tl.program_id(0), num_labels, tl.num_programs(0)):
        brought = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, kept, BLOCK):
            out = first + tl.arange(0, BLOCK)
            here = touching(pairs_ptr, out, row + out * 0, out < kept, slots)
            brought += tl.load(excess_ptr + out, mask=here, other=0.0)
        row_ptr = sums_ptr + ((B + sample) * capacity + row) * COLUMNS
        tl.store(row_ptr + COST, tl.load(row_ptr + COST) + tl.sum(brought, axis=0))


def sum_neighbours(
    pairs: Tensor, geometry: Tensor, excess: Tensor, counts: Tensor, parts: Tensor, sums: Tensor, sample_sums: Tensor
) -> None:
    """Write what rows get from those that touch them into `sums`, and the sums of `parts` into `sample_sums`."""
    (batch, slots), capacity, blocks = pairs.shape, sums.shape[1], parts.shape[1]
    launch(_sum_neighbours_kernel, (table_programs(capacity), batch),
        pairs, geometry, excess, counts, parts, sums, sample_sums, blocks, slots, capacity,
        block_size(blocks, PARTS_BLOCK), block_size(capacity, NEIGHBOURS_BLOCK), num_warps=NEIGHBOURS_WARPS,
    )  # fmt: skip
