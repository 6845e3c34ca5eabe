"""What `find` ends with: counts of each sample, and what the parts of activation.py add up to.

Kept are the first outputs, none if there are more than so many for each label. The health of a sample is 1, or NaN if
one of its parts is: then it is broken. This is done in the kernel that comes last: that of cells (numbering.py) or, on
other ways, one of its own (instances.py). Deterministic: parts are added in a fixed order. Bytes a voxel: 1/16 of
parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops

OUTPUTS: tl.constexpr = tl.constexpr(ops.OUTPUTS)
KEPT: tl.constexpr = tl.constexpr(ops.KEPT)
LABELS: tl.constexpr = tl.constexpr(ops.LABELS)
SAMPLE_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS)
PART_COLUMNS: tl.constexpr = tl.constexpr(ops.SAMPLE_COLUMNS + 1)
# Parts that a warp adds at once: two for each thread.
PARTS_BLOCK = 64
# Without `debug` assertions do nothing on a GPU. This one ends the use of the device, as PyTorch's own do.
ASSERTING = {"debug": True, "sanitize_overflow": False}


class Ending(NamedTuple):
    """Parts, and what is made of them and of the numbers of instances."""

    parts: Tensor  # (B, programs, 4) float64: of the sums of the pixel term, and 0 or NaN
    counts: Tensor  # (3, B) int32: outputs, kept outputs, labels
    sums: Tensor  # (B, 3) float64
    health: Tensor  # (B,) float64
    programs: int
    max_kept: int  # 0: all


def ending_of(parts: Tensor, max_kept: int) -> Ending:
    """What is still to be written."""
    batch, programs, _ = parts.shape
    counts = torch.empty((ops.COUNTS, batch), dtype=torch.int32, device=parts.device)
    sums = torch.empty((batch, ops.SAMPLE_COLUMNS), dtype=torch.float64, device=parts.device)
    health = torch.empty(batch, dtype=torch.float64, device=parts.device)
    return Ending(parts, counts, sums, health, programs, max_kept)


@triton.jit
def finish(
    sample,
    B,
    found_ptr,  # (2 B,) int32: outputs, labels
    parts_ptr,
    counts_ptr,
    sums_ptr,
    health_ptr,
    programs,
    max_kept,
    capacity,
    TOO_MANY: tl.constexpr,  # outputs for each label
    BLOCK: tl.constexpr,
):
    """Write counts and sums of a sample, and whether it is broken."""
    outputs, labels = tl.load(found_ptr + sample), tl.load(found_ptr + B + sample)
    tl.device_assert(labels <= capacity, "labels have too many instances, see docs/limits.md")
    kept = tl.minimum(outputs, max_kept) if max_kept > 0 else outputs
    # (a bare constant would be rounded to float32)
    most = labels.to(tl.float64) * tl.full([], TOO_MANY, tl.float64)
    kept = tl.where((labels > 0) & (outputs > most), 0, kept)
    tl.store(counts_ptr + OUTPUTS * B + sample, outputs)
    tl.store(counts_ptr + KEPT * B + sample, kept)
    tl.store(counts_ptr + LABELS * B + sample, labels)

    column = tl.arange(0, PART_COLUMNS)
    total = tl.zeros((BLOCK, PART_COLUMNS), tl.float64)
    for first in range(0, programs, BLOCK):
        part = first + tl.arange(0, BLOCK)
        part_ptr = parts_ptr + (sample * programs + part)[:, None] * PART_COLUMNS + column[None, :]
        total += tl.load(part_ptr, mask=(part < programs)[:, None], other=0.0)
    total = tl.sum(total, axis=0)
    tl.store(sums_ptr + sample * SAMPLE_COLUMNS + column, total, mask=column < SAMPLE_COLUMNS)
    tl.store(health_ptr + sample, 1.0 + tl.sum(tl.where(column == SAMPLE_COLUMNS, total, 0.0), axis=0))
