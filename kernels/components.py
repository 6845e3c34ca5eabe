"""Connected components by union-find, and the instances they make.

Two foreground voxels of one 2x2x2 cell always touch, so a cell is one *node*, called by the largest id (linear index
+ 1) of a foreground voxel in it. The output is the parent array itself: a voxel holds the id of its parent, 0 in the
background.

1. `_nodes_kernel`: every foreground voxel gets its node for a parent; one byte a cell says which of its voxels are
   foreground.
2. `_merge_kernel`: each cell looks at its 13 forward neighbours. Two cells touch if both have foreground on the
   faces, edges or corners that they share, which the two bytes tell. Then their sets are united, unless a third cell
   between them, one step along an axis away, touches both. (Then each pair on the way is a step along an axis, which
   is always united, or touches through others in turn.)
3. `_flatten_kernel`: every voxel climbs to its root, which is the largest id in the component. Each block also
   counts its roots, from which they are numbered (numbering.py).

Uniting, by all programs at once and without locks: of two nodes the lower one climbs, until they meet or it is a root
`low`. Then `old = atomic_max(parent of low, high)` hangs it under the other node. If another program was faster, low
had the parent `old` by then; it is our task now to unite old and high. A parent always has a larger id than its
child, so no cycle can form and every step climbs: the loop ends. While climbing, a node is hung under its grandparent
(path splitting; without it chains grow long). Such a store may undo another program's atomic_max, and a load may be
stale, yet both only ever name an ancestor; it is the first parent a root gets that must last, and that one is decided
by the value which the atomic returns.

Backward: none, ids are constants. Deterministic: the largest id of a component does not depend on who unites first.
Bytes a voxel: 1 read and 4 written for the nodes, 1/8 written and about 2 read (14/8) for the cells, 4 read to flatten;
foreground also climbs and has 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_size, coordinates, cut, threads
from .launches import launch
from .numbering import REDUCE_WARPS, blocks_of, number, number_components
from .propagation import propagate

NODES_BLOCK = 128
# One lane a thread: where a block has fewer lanes than threads, a value-returning atomic in a loop can repeat for ever;
# with many more it takes over 200 registers. One warp, so that no lane waits at a barrier for another warp.
MERGE_WARPS = 1


@triton.jit
def _cell_coordinates(cell, H, W):
    """Coordinates of the first voxel of a 2x2x2 cell."""
    z, y, x = coordinates(cell, (H + 1) // 2, (W + 1) // 2)
    return 2 * z, 2 * y, 2 * x


@triton.jit
def _node(occupancy, z, y, x, H, W):
    """Largest foreground id of the cell at (z, y, x): that of its highest bit, as bits are in the order of ids."""
    in_z = (occupancy >= 16).to(tl.int32)
    occupancy = occupancy >> 4 * in_z
    in_y = (occupancy >= 4).to(tl.int32)
    occupancy = occupancy >> 2 * in_y
    in_x = (occupancy >= 2).to(tl.int32)
    return ((z + in_z) * H + y + in_y) * W + x + in_x + 1


@triton.jit
def _facing(step_z, step_y, step_x):
    """Bits of a cell that touch the neighbour at (step_z, step_y, step_x); a constant holds a byte for each step."""
    return (0xF0FF0F >> 8 * (step_z + 1)) & (0xCCFF33 >> 8 * (step_y + 1)) & (0xAAFF55 >> 8 * (step_x + 1)) & 0xFF


@triton.jit
def _touch(cell, other, STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr):
    """Whether two cells touch, by their bytes, if the other one is at such a step."""
    near, far = _facing(STEP_Z, STEP_Y, STEP_X), _facing(-STEP_Z, -STEP_Y, -STEP_X)
    return ((cell & near) != 0) & ((other & far) != 0)


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
    cells_ptr,
    cell,
    occupancy,
    before_x,
    behind_x,
    before_y,
    behind_y,
    behind_z,
    here,
    z,
    y,
    x,
    D,
    H,
    W,
    STEP_Z: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
):
    """Whether a cell touches the one at a step, and no third cell, one step along an axis away, that touches both."""
    other = _load_cell(cells_ptr, cell, z, y, x, D, H, W, STEP_Z, STEP_Y, STEP_X, here)
    touching = _touch(occupancy, other, STEP_Z, STEP_Y, STEP_X)
    if STEP_Z * STEP_Z + STEP_Y * STEP_Y + STEP_X * STEP_X > 1:
        if STEP_Z != 0:
            touching &= ~_through(occupancy, other, behind_z, STEP_Z, STEP_Y, STEP_X, 0)
        if STEP_Y != 0:
            between_y = before_y if STEP_Y < 0 else behind_y
            touching &= ~_through(occupancy, other, between_y, STEP_Z, STEP_Y, STEP_X, 1)
        if STEP_X != 0:
            between_x = before_x if STEP_X < 0 else behind_x
            touching &= ~_through(occupancy, other, between_x, STEP_Z, STEP_Y, STEP_X, 2)
    return touching


@triton.jit
def _to_unite(cells_ptr, cell, occupancy, z, y, x, D, H, W):
    """With which of its 13 forward neighbours a cell is to be united: a bit for each, in their order.

    Not with one that it touches through a third cell, one step along an axis away: those two pairs are united.
    """
    here = occupancy != 0
    before_x = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 0, -1, here)
    behind_x = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 0, 1, here)
    behind_y = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, 1, 0, here)
    wanted = tl.zeros_like(occupancy)
    for direction in tl.static_range(14, 18):  # of the 27 steps -1, 0, 1 in three axes: in the same layer
        touching = _touches_alone(
            cells_ptr, cell, occupancy, before_x, behind_x, behind_y, behind_y, behind_y, here, z, y, x, D, H, W,
            direction // 9 - 1, direction // 3 % 3 - 1, direction % 3 - 1,
        )  # fmt: skip
        wanted |= touching.to(tl.int32) << (direction - 14)
    if D > 2:  # there is another layer of cells
        before_y = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 0, -1, 0, here)
        behind_z = _load_cell(cells_ptr, cell, z, y, x, D, H, W, 1, 0, 0, here)
        for direction in tl.static_range(18, 27):
            touching = _touches_alone(
                cells_ptr, cell, occupancy, before_x, behind_x, before_y, behind_y, behind_z, here, z, y, x, D, H, W,
                direction // 9 - 1, direction // 3 % 3 - 1, direction % 3 - 1,
            )  # fmt: skip
            wanted |= touching.to(tl.int32) << (direction - 14)
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
    return _node(occupancy, z + 2 * step_z, y + 2 * step_y, x + 2 * step_x, H, W)


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
    ids_ptr,  # (B, V) int32
    cells_ptr,  # (B, N) uint8
    D,
    H,
    W,
    N,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    z, y, x = _cell_coordinates(cell, H, W)
    first = sample * D * H * W + (z * H + y) * W + x

    occupancy = tl.zeros((BLOCK,), tl.int32)
    for corner in tl.static_range(8):
        inside = (cell < N) & (z + corner // 4 < D) & (y + corner // 2 % 2 < H) & (x + corner % 2 < W)
        step = (corner // 4 * H + corner // 2 % 2) * W + corner % 2
        foreground = tl.load(mask_ptr + first + step, mask=inside, other=0)
        occupancy |= foreground.to(tl.int32) << corner
    tl.store(cells_ptr + sample * N + cell, occupancy.to(tl.uint8), mask=cell < N)

    node = _node(occupancy, z, y, x, H, W)
    for corner in tl.static_range(8):
        inside = (cell < N) & (z + corner // 4 < D) & (y + corner // 2 % 2 < H) & (x + corner % 2 < W)
        step = (corner // 4 * H + corner // 2 % 2) * W + corner % 2
        tl.store(ids_ptr + first + step, tl.where((occupancy >> corner) & 1 != 0, node, 0), mask=inside)


# (with a size that is 1 for a constant, LLVM leaves a byte of stack behind)
@triton.jit(do_not_specialize=["D", "H", "W"])
def _merge_kernel(
    ids_ptr,  # (B, V) int32
    cells_ptr,  # (B, N) uint8
    D,
    H,
    W,
    N,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    cells_ptr += sample * N
    parents_ptr = ids_ptr + sample * D * H * W - 1  # id i is voxel i - 1

    occupancy = tl.load(cells_ptr + cell, mask=cell < N, other=0).to(tl.int32)
    if tl.max(occupancy, axis=0) > 0:  # most cells are background
        z, y, x = _cell_coordinates(cell, H, W)
        wanted = _to_unite(cells_ptr, cell, occupancy, z, y, x, D, H, W)
        left = _node(occupancy, z, y, x, H, W)
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
    ids_ptr,  # (B, V) int32
    roots_ptr,  # (B, programs) int32
    V,
    BLOCK: tl.constexpr,
):
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    ids_ptr += sample * V
    node = tl.load(ids_ptr + voxel, mask=voxel < V, other=0)
    roots = tl.full([], 0, tl.int32)
    if tl.max(node, axis=0) > 0:  # most blocks are background
        climbing = node > 0
        while tl.max(climbing.to(tl.int32), axis=0) > 0:
            parent = tl.load(ids_ptr - 1 + node, mask=climbing, other=0)
            climbing = climbing & (parent != node)
            node = tl.where(climbing, parent, node)
        tl.store(ids_ptr + voxel, node, mask=node > 0)
        roots = tl.sum((node == voxel + 1).to(tl.int32), axis=0)
    tl.store(roots_ptr + sample * tl.num_programs(0) + tl.program_id(0), roots)


def _label(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the components of `mask` (B, D, H, W) bool, and the number of roots in each block, (B, programs) int32."""
    batch, depth, height, width = mask.shape
    ids = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    flatten_block, programs = blocks_of(ids)
    roots = ids.new_empty((batch, programs))
    if ids.numel() == 0:
        return ids, roots
    cells = torch.empty(
        (batch, cut(depth, 2) * cut(height, 2) * cut(width, 2)),
        dtype=torch.uint8,
        device=mask.device,
    )
    num_cells = cells.shape[1]
    block = block_size(num_cells, NODES_BLOCK)
    launch(_nodes_kernel, (cut(num_cells, block), batch), mask, ids, cells, depth, height, width, num_cells, block)
    block = block_size(num_cells, threads(MERGE_WARPS))
    launch(
        _merge_kernel,
        (cut(num_cells, block), batch),
        ids,
        cells,
        depth,
        height,
        width,
        num_cells,
        block,
        num_warps=MERGE_WARPS,
    )
    launch(
        _flatten_kernel,
        (programs, batch),
        ids,
        roots,
        depth * height * width,
        flatten_block,
        num_warps=REDUCE_WARPS,
    )
    return ids, roots


def launch_components(mask: Tensor, num_iterations: int) -> Tensor:
    """Ids of the components of `mask` (B, D, H, W) bool; with `num_iterations` > 0, of that many rounds of pooling."""
    return propagate(mask, num_iterations) if num_iterations > 0 else _label(mask)[0]


def find_instances(
    mask: Tensor, num_iterations: int, min_size: int, capacity: int, rest_sizes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of the components of `mask` with more than `min_size` voxels; see `number`."""
    if num_iterations > 0 or min_size > 0:
        return number(launch_components(mask, num_iterations), min_size, capacity, rest_sizes)
    return number_components(*_label(mask), capacity, rest_sizes)


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
