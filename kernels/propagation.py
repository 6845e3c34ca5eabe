"""Bounded labelling: what k rounds of masked 3x3x3 max-pooling make of the ids.

At first each foreground voxel holds its own id, its linear index + 1. A round gives every foreground voxel the
largest id among itself and its 26 neighbours; the background stays 0. So after k rounds a voxel holds the largest id
within k steps inside the mask. Each round is one launch, from one buffer into the other. A round that changes
something raises the flag of the next one; a launch whose flag is down returns at once, and both buffers hold the
result by then, so no count of rounds has to come back to Python.

Backward: none, ids are constants. Deterministic: rounds are maxima, and a flag is only ever raised. Bytes a voxel and
round: 4 read (27 loads, of which 26 come from cache; background voxels load only themselves), 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_size, coordinates, cut
from .launches import launch

ROUND_BLOCK = 256


@triton.jit
def _round_kernel(
    source_ptr,  # (B, V) int32
    target_ptr,  # (B, V) int32
    flag_ptr,  # (2,) int32: is this round needed; is the next one
    D,
    H,
    W,
    BLOCK: tl.constexpr,
):
    if tl.load(flag_ptr) != 0:
        voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        start = tl.program_id(1).to(tl.int64) * D * H * W
        in_volume = voxel < D * H * W
        own = tl.load(source_ptr + start + voxel, mask=in_volume, other=0)
        z, y, x = coordinates(voxel, H, W)
        largest = own
        for direction in range(27):
            step_z, step_y, step_x = direction // 9 - 1, direction // 3 % 3 - 1, direction % 3 - 1
            inside = (z + step_z >= 0) & (z + step_z < D) & (y + step_y >= 0) & (y + step_y < H)
            inside = inside & (x + step_x >= 0) & (x + step_x < W) & (own > 0)
            step = (step_z * H + step_y) * W + step_x
            largest = tl.maximum(largest, tl.load(source_ptr + start + voxel + step, mask=inside, other=0))
        tl.store(target_ptr + start + voxel, largest, mask=in_volume)
        if tl.max((largest != own).to(tl.int32), axis=0) > 0:
            tl.store(flag_ptr + 1, 1)


def propagate(mask: Tensor, rounds: int) -> Tensor:
    """Ids (B, D, H, W) int32 after `rounds` > 0 rounds of pooling inside `mask` (B, D, H, W) bool."""
    batch, depth, height, width = mask.shape
    num_voxels = depth * height * width
    own = torch.arange(1, num_voxels + 1, dtype=torch.int32, device=mask.device)
    source = torch.where(mask, own.view(depth, height, width), 0)
    if source.numel() == 0:
        return source
    target = torch.empty_like(source)
    rounds = min(rounds, num_voxels)  # no path inside the mask is longer
    flags = torch.zeros(rounds + 1, dtype=torch.int32, device=mask.device)
    flags[:1].fill_(1)
    block = block_size(num_voxels, ROUND_BLOCK)
    grid = (cut(num_voxels, block), batch)
    for i in range(rounds):
        launch(_round_kernel, grid, source, target, flags[i:], depth, height, width, block)
        source, target = target, source
    return source
