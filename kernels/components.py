"""Connected components by union-find, and the instances they make.

Cells and nodes are those of nodes.py. The output is the parent array itself: the place of a node, the voxel of that id,
holds the id of its parent; other voxels hold 0.

1. `_nodes_kernel`, or that of activation.py: the byte of each cell, and for each node the largest one of its run.
2. `_merge_kernel`: each cell looks at its 13 forward neighbours. Two cells touch if both have foreground on the
   faces, edges or corners that they share, which the two bytes tell. Then their sets are united, unless they come
   together without: in one run; or through a third cell between them, one step along an axis away, that touches both
   (then each pair on the way is a step along an axis, or touches through others in turn); or, for a step along an axis,
   beside a pair that touches by the same step, and whose cells touch theirs. The pair is the one before along another
   axis, so there is a first one, which is united. Of cells that fill a box, only one pair of rows or planes is left.
3. `_flatten_kernel`: every node climbs to its root, which is the largest id in the component. It also counts the roots
   in each block of voxels, from which they are numbered (numbering.py). Where ids are wanted, all voxels get theirs.

Uniting, by all programs at once and without locks: of two nodes the lower one climbs, until they meet or it is a root
`low`. Then `old = atomic_max(parent of low, high)` hangs it under the other node. If another program was faster, low
had the parent `old` by then; it is our task now to unite old and high. A parent always has a larger id than its
child, so no cycle can form and every step climbs: the loop ends. While climbing, a node is hung under its grandparent
(path splitting; without it chains grow long). Such a store may undo another program's atomic_max, and a load may be
stale, yet both only ever name an ancestor; it is the first parent a root gets that must last, and that one is decided
by the value which the atomic returns.

Backward: none, ids are constants. Deterministic: the largest id of a component does not depend on who unites first.
Bytes a voxel: 1 read and 4 written for the nodes, 1/8 written and about 2 read (15/8) for the cells, which alone are
read to flatten; nodes also climb and have 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_size, cut, threads
from .finish import Ending
from .launches import launch
from .nodes import (
    RUN,
    Cells,
    begin_cells,
    bits_of_row,
    cell_coordinates,
    empty_cells,
    node_of,
    row_of,
    rows_of,
)
from .numbering import blocks_of, number, number_components
from .propagation import propagate

# One lane a thread: where a block has fewer lanes than threads, a value-returning atomic in a loop can repeat for ever;
# with many more it takes over 200 registers. One warp, so that no lane waits at a barrier for another warp.
MERGE_WARPS = 1
# One cell a thread of one warp: with more, a block is less often background.
FLATTEN_BLOCK, FLATTEN_WARPS = 32, 1


@triton.jit
def _facing(step_z, step_y, step_x):
    """Bits of a cell that touch the neighbour at (step_z, step_y, step_x); a constant holds a byte for each step."""
    return (0xF0FF0F >> 8 * (step_z + 1)) & (0xCCFF33 >> 8 * (step_y + 1)) & (0xAAFF55 >> 8 * (step_x + 1)) & 0xFF


@triton.jit
def _touch(cell, other, STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr):
    """Whether two cells touch, by their bytes, if the other one is at such a step."""
    near, far = _facing(STEP_Z, STEP_Y, STEP_X), _facing(-STEP_Z, -STEP_Y, -STEP_X)
    return tl.minimum(cell & near, other & far) != 0


@triton.jit
def _through(
    cell, other, between, STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, AXIS: tl.constexpr
):
    """Whether two cells touch the one between, where the step along one axis leads."""
    step_z, step_y, step_x = STEP_Z if AXIS == 0 else 0, STEP_Y if AXIS == 1 else 0, STEP_X if AXIS == 2 else 0
    first = _touch(cell, between, step_z, step_y, step_x)
    return first & _touch(between, other, STEP_Z - step_z, STEP_Y - step_y, STEP_X - step_x)


@triton.jit
def _load_cell(
    cells_ptr, cell, z, y, x, D, H, W, STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, here
):
    """The byte of the cell at a step from each cell that is `here`, 0 outside."""
    if STEP_Z > 0:
        here &= z + 2 < D
    if STEP_Y < 0:
        here &= y > 0
    if STEP_Y > 0:
        here &= y + 2 < H
    if STEP_X < 0:
        here &= x > 0
    if STEP_X > 0:
        here &= x + 2 < W
    to_cell = cell + (STEP_Z * ((H + 1) // 2) + STEP_Y) * ((W + 1) // 2) + STEP_X
    return tl.load(cells_ptr + to_cell, mask=here, other=0).to(tl.int32)


@triton.jit
def _touches_alone(
    cell, other, beside_z, beside_y, beside_x, STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr
):
    """Whether a cell touches the one at a diagonal step, and none of the cells one step along an axis touches both."""
    touching = _touch(cell, other, STEP_Z, STEP_Y, STEP_X)
    if STEP_Z != 0:
        touching &= ~_through(cell, other, beside_z, STEP_Z, STEP_Y, STEP_X, 0)
    if STEP_Y != 0:
        touching &= ~_through(cell, other, beside_y, STEP_Z, STEP_Y, STEP_X, 1)
    if STEP_X != 0:
        touching &= ~_through(cell, other, beside_x, STEP_Z, STEP_Y, STEP_X, 2)
    return touching


@triton.jit
def _parallel(
    cell,
    other,
    before,
    before_other,
    STEP_Z: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    BACK_Y: tl.constexpr,
    BACK_X: tl.constexpr,
):
    """Whether two cells touch those at a step back from them, and these each other."""
    sides = _touch(cell, before, 0, BACK_Y, BACK_X) & _touch(other, before_other, 0, BACK_Y, BACK_X)
    return sides & _touch(before, before_other, STEP_Z, STEP_Y, STEP_X)


@triton.jit
def _to_unite(cells_ptr, cell, occupancy, z, y, x, D, H, W):
    """With which of its 13 forward neighbours a cell is to be united: a bit for each, in their order."""
    here = occupancy != 0
    before_x = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 0, -1, here)
    behind_x = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 0, 1, here)
    behind_y = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 1, 0, here)
    before_x_behind_y = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 1, -1, here)
    along_x = _touch(occupancy, behind_x, 0, 0, 1) & (cell % RUN == RUN - 1)  # others are in one run
    along_y = _touch(occupancy, behind_y, 0, 1, 0)
    along_y &= ~_parallel(occupancy, behind_y, before_x, before_x_behind_y, 0, 1, 0, 0, -1)
    left = _touches_alone(occupancy, before_x_behind_y, occupancy, behind_y, before_x, 0, 1, -1)
    other = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 1, 1, here)
    right = _touches_alone(occupancy, other, occupancy, behind_y, behind_x, 0, 1, 1)
    wanted = along_x.to(tl.int32) | (left.to(tl.int32) << 1) | (along_y.to(tl.int32) << 2) | (right.to(tl.int32) << 3)
    if D > 2:  # there is another layer of cells
        before_y = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, -1, 0, here)
        behind_z = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 1, 0, 0, here)
        along_z = _touch(occupancy, behind_z, 1, 0, 0)
        for direction in tl.static_range(18, 27):  # of the 27 steps -1, 0, 1 in three axes
            if direction != 22:  # the step along the axis
                other = _load_cell(
                    cells_ptr, cell, z, y, x, D, H, W, 1, direction // 3 % 3 - 1, direction % 3 - 1, here
                )
                beside_y = before_y if direction < 21 else behind_y
                beside_x = before_x if direction % 3 == 0 else behind_x
                touching = _touches_alone(
                    occupancy, other, behind_z, beside_y, beside_x, 1, direction // 3 % 3 - 1, direction % 3 - 1
                )
                wanted |= touching.to(tl.int32) << (direction - 14)
                if direction == 19:
                    along_z &= ~_parallel(occupancy, behind_z, before_y, other, 1, 0, 0, -1, 0)
                if direction == 21:
                    along_z &= ~_parallel(occupancy, behind_z, before_x, other, 1, 0, 0, 0, -1)
        wanted |= along_z.to(tl.int32) << 8
    return wanted


@triton.jit
def _neighbour(cells_ptr, cell, wanted, z, y, x, H, W):
    """The node of the neighbour that the lowest bit stands for, where there is one."""
    lowest = wanted & -wanted
    # The exponent of a power of two is its place.
    direction = 14 + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    step_z, step_y, step_x = direction // 9 - 1, direction // 3 % 3 - 1, direction % 3 - 1
    to_cell = cell + (step_z * ((H + 1) // 2) + step_y) * ((W + 1) // 2) + step_x
    occupancy = tl.load(cells_ptr + to_cell, mask=wanted != 0, other=0).to(tl.int32)
    return node_of(occupancy, z + 2 * step_z, y + 2 * step_y, x + 2 * step_x, H, W)


@triton.jit
def _climb(parents_ptr, left, right):
    """One step on the way to unite the sets of two nodes each; they are equal once they are in one set."""
    low, high = tl.minimum(left, right), tl.maximum(left, right)
    active = low != high
    parent = tl.load(parents_ptr + low, mask=active, other=0)
    grandparent = tl.load(parents_ptr + parent, mask=active, other=0)
    tl.store(parents_ptr + low, grandparent, mask=active & (parent != grandparent))
    at_root = active & (parent == low)
    old = tl.atomic_max(parents_ptr + low, high, mask=at_root, sem="relaxed")
    low = tl.where(at_root, tl.where(old == low, high, old), tl.where(active, parent, low))
    return low, high


@triton.jit
def _nodes_kernel(
    mask_ptr,  # (B, V) bool
    cells_ptr,  # (B, N) uint8
    parents_ptr,  # (B, V) int32
    D,
    H,
    W,
    N,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    z, y, x = cell_coordinates(cell, H, W)
    occupancy = tl.zeros((BLOCK, 2), tl.int32)
    for row in tl.static_range(ROWS):
        voxel, inside = row_of(z, y, x, cell < N, D, H, W, row, EVEN)
        foreground = tl.load(mask_ptr + sample * D * H * W + voxel, mask=inside, other=0)
        occupancy |= bits_of_row(foreground, row)
    begin_cells(
        tl.sum(occupancy, axis=1), cells_ptr + sample * N, parents_ptr + sample * D * H * W,
        cell, z, y, x, D, H, W, N, ROWS, EVEN, BLOCK,
    )  # fmt: skip


# (with a size that is 1 for a constant, LLVM leaves a byte of stack behind)
@triton.jit(do_not_specialize=["D", "H", "W"])
def _merge_kernel(
    cells_ptr,  # (B, N) uint8
    parents_ptr,  # (B, V) int32
    roots_ptr,  # (B, blocks) int32, which become zeros
    D,
    H,
    W,
    N,
    blocks,
    BLOCK: tl.constexpr,
):
    cell = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tl.store(roots_ptr + sample * blocks + block, 0)
    cells_ptr += sample * N
    parents_ptr += sample * D * H * W - 1  # id i is voxel i - 1

    occupancy = tl.load(cells_ptr + cell, mask=cell < N, other=0).to(tl.int32)
    if tl.max(occupancy, axis=0) > 0:  # most cells are background
        z, y, x = cell_coordinates(cell, H, W)
        wanted = _to_unite(cells_ptr, cell, occupancy, z, y, x, D, H, W)
        left = node_of(occupancy, z, y, x, H, W)
        right = left
        while tl.max((wanted | (left != right).to(tl.int32)), axis=0) > 0:
            # Who has met begins with the next neighbour, from where it is.
            if tl.max(tl.where(left == right, wanted, 0), axis=0) > 0:
                begins = tl.where(left == right, wanted, 0)
                right = tl.where(begins != 0, _neighbour(cells_ptr, cell, begins, z, y, x, H, W), right)
                wanted &= ~(begins & -begins)
            left, right = _climb(parents_ptr, left, right)


@triton.jit
def _flatten_kernel(
    cells_ptr,  # (B, N) uint8
    parents_ptr,  # (B, V) int32
    roots_ptr,  # (B, blocks) int32: of each block of voxels
    D,
    H,
    W,
    N,
    blocks,
    ROOTS_BLOCK: tl.constexpr,
    IDS: tl.constexpr,  # whether all voxels get the id of their component
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Programs begin in order, and roots are large: who comes later finds that parents have climbed already.
    cell = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    parents_ptr += sample * D * H * W
    occupancy = tl.load(cells_ptr + sample * N + cell, mask=cell < N, other=0).to(tl.int32)
    if tl.max(occupancy, axis=0) > 0:  # most cells are background
        z, y, x = cell_coordinates(cell, H, W)
        node = tl.where(occupancy != 0, node_of(occupancy, z, y, x, H, W), 0)
        root, climbing = node, node > 0
        while tl.max(climbing.to(tl.int32), axis=0) > 0:
            parent = tl.load(parents_ptr - 1 + root, mask=climbing, other=0)
            climbing = climbing & (parent != root)
            root = tl.where(climbing, parent, root)
        is_root = (node > 0) & (root == node)
        tl.atomic_add(roots_ptr + sample * blocks + (node - 1) // ROOTS_BLOCK, 1, mask=is_root, sem="relaxed")
        if IDS:
            for row in tl.static_range(ROWS):
                voxel, inside = row_of(z, y, x, cell < N, D, H, W, row, EVEN)
                foreground = (bits_of_row(inside, row) & occupancy[:, None]) != 0
                tl.store(parents_ptr + voxel, root[:, None] + tl.zeros_like(voxel), mask=foreground)
        else:
            tl.store(parents_ptr - 1 + node, root, mask=(node > 0) & ~is_root)


def begin(mask: Tensor) -> Cells:
    """The cells of `mask` (B, D, H, W) bool."""
    batch, *shape = mask.shape
    cells = empty_cells(batch, shape, mask.device)
    if mask.numel() > 0:
        num_cells = cells.bytes.shape[1]
        block = block_size(num_cells, threads(1))
        launch(_nodes_kernel, (cut(num_cells, block), batch),
            mask, *cells, *shape, num_cells, *rows_of(shape), block, num_warps=1,
        )  # fmt: skip
    return cells


def unite(cells: Cells, ids: bool) -> Tensor:
    """Hang nodes under the roots of their components; how many roots are in each block of voxels, (B * blocks,) int32.

    With `ids` the parents become the ids of components.
    """
    batch, *shape = cells.parents.shape
    roots_block, num_blocks = blocks_of(cells.parents)
    roots = cells.parents.new_empty(batch * num_blocks)
    if cells.parents.numel() > 0:
        num_cells = cells.bytes.shape[1]
        block = block_size(num_cells, threads(MERGE_WARPS))
        launch(_merge_kernel, (cut(num_cells, block), batch),
            *cells, roots, *shape, num_cells, num_blocks, block, num_warps=MERGE_WARPS,
        )  # fmt: skip
        block = block_size(num_cells, FLATTEN_BLOCK)
        launch(_flatten_kernel, (cut(num_cells, block), batch),
            *cells, roots, *shape, num_cells, num_blocks, roots_block, ids, *rows_of(shape), block,
            num_warps=FLATTEN_WARPS,
        )  # fmt: skip
    return roots


def launch_components(mask: Tensor, num_iterations: int) -> Tensor:
    """Ids of the components of `mask` (B, D, H, W) bool; with `num_iterations` > 0, of that many rounds of pooling."""
    if num_iterations > 0:
        return propagate(mask, num_iterations)
    cells = begin(mask)
    unite(cells, ids=True)
    return cells.parents


def instances_of(
    cells: Cells, capacity: int, rest_sizes: Tensor | None = None, ending: Ending | None = None, too_many: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of the components of cells, see `number`; and what `find` ends with (finish.py)."""
    return number_components(cells, unite(cells, ids=False), capacity, rest_sizes, ending, too_many)


def find_instances(
    mask: Tensor, num_iterations: int, min_size: int, capacity: int, rest_sizes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of the components of `mask` with more than `min_size` voxels; see `number`."""
    if num_iterations > 0 or min_size > 0:
        return number(launch_components(mask, num_iterations), min_size, capacity, rest_sizes)
    return instances_of(begin(mask), capacity, rest_sizes)


def launch_find_instances(
    mask: Tensor, num_iterations: int, min_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of the components of `mask` with more than `min_size` voxels."""
    return find_instances(mask, num_iterations, min_size, capacity)


def launch_number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of the sets of equal `ids` (B, D, H, W) int64 with more than `min_size` voxels."""
    if ids.numel() == 0:
        return number(ids.to(torch.int32), min_size, capacity)
    # Any 63-bit id becomes its rank among the ids of its sample, which keeps their order and fits a table by voxel.
    values, order = ids.flatten(1).sort(dim=1)
    new = values > 0
    new[:, 1:].logical_and_(values[:, 1:] != values[:, :-1])
    # One flat cumsum: along the last axis of a few long rows, torch's runs on a few threads. What earlier samples add
    # to the ranks is taken off again.
    ranks = new.flatten().cumsum(0, dtype=torch.int32).view(new.shape)
    ranks = torch.where(values > 0, ranks - ranks[:, :1] + new[:, :1], 0)
    # Flat, too: where PyTorch is asked for deterministic algorithms, a scatter along an axis may wait for the host.
    order += values.shape[1] * torch.arange(len(order), device=ids.device)[:, None]
    ranks = ranks.new_empty(ids.numel()).scatter_(0, order.flatten(), ranks.flatten())
    return number(ranks.view(ids.shape), min_size, capacity)
