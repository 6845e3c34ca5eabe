"""Cells of 2x2x2 voxels, as parts of a program: one lane a cell.

Two foreground voxels of one cell always touch, so a cell is one *node*, called by the largest id (linear index + 1) of
a foreground voxel in it. A byte a cell says which of its voxels are foreground, in the order of their ids: bit 4 dz +
2 dy + dx. Volumes are read and written by *rows* of a cell, two voxels side by side each: tensors (BLOCK, 2), which a
thread loads at once. A plane has only the first two rows.

A *run* is a stretch of cells along x that touch one another, among RUN cells that begin at a multiple of it. All cells
of a run get its largest node for their first parent, so that uniting has little left to do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import coordinates, cut

# The lanes of a warp, whose bits fit one number.
RUN: tl.constexpr = tl.constexpr(32)
LEFT: tl.constexpr = tl.constexpr(0x55)
RIGHT: tl.constexpr = tl.constexpr(0xAA)


@triton.jit
def cell_coordinates(cell, H, W):
    """Coordinates of the first voxel of a cell."""
    z, y, x = coordinates(cell, (H + 1) // 2, (W + 1) // 2)
    return 2 * z, 2 * y, 2 * x


@triton.jit
def node_of(occupancy, z, y, x, H, W):
    """Largest foreground id of the cell at (z, y, x): that of its highest bit, as bits are in the order of ids."""
    in_z = (occupancy >= 16).to(tl.int32)
    occupancy = occupancy >> 4 * in_z
    in_y = (occupancy >= 4).to(tl.int32)
    occupancy = occupancy >> 2 * in_y
    in_x = (occupancy >= 2).to(tl.int32)
    return ((z + in_z) * H + y + in_y) * W + x + in_x + 1


@triton.jit
def row_of(z, y, x, here, D, H, W, ROW: tl.constexpr, EVEN: tl.constexpr):
    """Where the two voxels of a row of each cell lie, (BLOCK, 2), and which of them are in the volume.

    Cells that are `here` have their first voxel in the volume. Where the width is EVEN, a row is in or out, (BLOCK, 1).
    """
    side = tl.arange(0, 2)[None, :]
    # (what is a multiple of 2 for the compiler, too, it reads at once)
    width = W // 2 * 2 if EVEN else W
    voxel = (((z + ROW // 2) * H + y + ROW % 2) * width + x)[:, None] + side
    if ROW // 2 > 0:
        here = here & (z + 1 < D)
    if ROW % 2 > 0:
        here = here & (y + 1 < H)
    inside = here[:, None]
    if not EVEN:
        inside = inside & (x[:, None] + side < W)
    return voxel, inside


@triton.jit
def bits_of_row(foreground, ROW: tl.constexpr):
    """The bits that the voxels of a row have in the byte of their cell: (BLOCK, 2)."""
    return foreground.to(tl.int32) << (2 * ROW + tl.arange(0, 2))[None, :]


@triton.jit
def _behind(begins, highest, other_begins, other_highest):
    """Of two stretches, one behind the other: whether a run begins there, and the largest node since the last did."""
    return begins | other_begins, tl.where(other_begins > 0, other_highest, tl.maximum(highest, other_highest))


@triton.jit
def _largest_of_runs(occupancy, node, x, BLOCK: tl.constexpr):
    """The largest node in the run of each cell that is not empty."""
    LENGTH: tl.constexpr = BLOCK if BLOCK < RUN else RUN  # (Triton 3.2 makes a tensor of min)
    occupancy, x, node = (
        occupancy.reshape(BLOCK // LENGTH, LENGTH),
        x.reshape(BLOCK // LENGTH, LENGTH),
        node.reshape(BLOCK // LENGTH, LENGTH),
    )
    place = tl.arange(0, LENGTH).to(tl.uint32)[None, :]
    # Bit i: cell i has voxels that touch the cell before, or behind, if that has such, too.
    before = tl.sum((((occupancy & LEFT) != 0) & (x > 0)).to(tl.uint32) << place, axis=1)
    behind = tl.sum(((occupancy & RIGHT) != 0).to(tl.uint32) << place, axis=1)
    joints = (before & (behind << 1))[:, None]
    begins = 1 - ((joints >> place) & 1).to(tl.int32)
    ends = 1 - ((joints >> place >> 1) & 1).to(tl.int32)
    _, of_first = tl.associative_scan((begins, node), 1, _behind)
    _, of_last = tl.associative_scan((ends, node), 1, _behind, reverse=True)
    return tl.maximum(of_first, of_last).reshape(BLOCK)


@triton.jit
def begin_cells(
    occupancy,
    cells_ptr,  # (N,) uint8
    parents_ptr,  # (V,) int32
    cell,
    z,
    y,
    x,
    D,
    H,
    W,
    N,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the bytes of cells, and the first parents: of a cell's node the largest of its run, 0 of other voxels."""
    tl.store(cells_ptr + cell, occupancy.to(tl.uint8), mask=cell < N)
    if tl.max(occupancy, axis=0) > 0:
        node = tl.where(occupancy != 0, node_of(occupancy, z, y, x, H, W), 0)
        parent = _largest_of_runs(occupancy, node, x, BLOCK)
        for row in tl.static_range(ROWS):
            voxel, inside = row_of(z, y, x, cell < N, D, H, W, row, EVEN)
            tl.store(parents_ptr + voxel, tl.where(voxel + 1 == node[:, None], parent[:, None], 0), mask=inside)
    else:  # most cells are background
        for row in tl.static_range(ROWS):
            voxel, inside = row_of(z, y, x, cell < N, D, H, W, row, EVEN)
            tl.store(parents_ptr + voxel, tl.zeros_like(voxel), mask=inside)


class Cells(NamedTuple):
    """Masks as labelling begins with them."""

    bytes: Tensor  # (B, N) uint8: which voxels of a cell are foreground
    parents: Tensor  # (B, D, H, W) int32


def number_of_cells(shape: Sequence[int]) -> int:
    """Cells of a volume."""
    return cut(shape[0], 2) * cut(shape[1], 2) * cut(shape[2], 2)


def rows_of(shape: Sequence[int]) -> tuple[int, bool]:
    """Rows of a cell in a volume, and whether all have two voxels."""
    return 2 if shape[0] == 1 else 4, shape[2] % 2 == 0


def empty_cells(batch: int, shape: Sequence[int], device: torch.device) -> Cells:
    """Cells to be written by a kernel."""
    of_bytes = torch.empty((batch, number_of_cells(shape)), dtype=torch.uint8, device=device)
    return Cells(of_bytes, torch.empty((batch, *shape), dtype=torch.int32, device=device))
