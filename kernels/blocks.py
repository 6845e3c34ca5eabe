"""How work is cut into programs, and where a lane of a program lies in its volume.

A kernel over voxels runs on a grid of (programs a sample, samples), so at most 65535 samples; a lane is one voxel, or
one 2x2x2 cell, of one sample. A kernel over the rows of a table runs on a fixed number of programs a sample, each of
which takes every so many-th row up to the number of instances, which only the device knows: rows that are not used
cost nothing.
"""

import os

import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight of every helper)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter pays for each operation of each program and hardly for lanes, so there programs are few and wide.
INTERPRETED_LANES = 32768
INTERPRETED_PROGRAMS = 2
# Programs a sample for tables: one for each multiprocessor of most devices; those without a row still cost their start.
TABLE_PROGRAMS = 128


def block_size(lanes: int, on_gpu: int) -> int:
    """Lanes of one program when a sample has `lanes` of them: `on_gpu`, except in the interpreter."""
    # (at least two: the interpreter of Triton 3.2 ignores the mask of a single lane)
    return min(INTERPRETED_LANES, triton.next_power_of_2(max(lanes, 2))) if INTERPRETED else on_gpu


def cut(lanes: int, block: int) -> int:
    """Programs that share `lanes`, `block` of them each: `triton.cdiv`, which costs the host 5 us."""
    return -(-lanes // block)


def warp_size() -> int:
    """Threads of a warp on the current device: 32, on some of AMD's 64."""
    return 32 if torch.version.hip is None else torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size


def threads(warps: int) -> int:
    """Lanes of a program that has one for each thread of its warps."""
    return warp_size() * warps


def table_programs(rows: int) -> int:
    """Programs that share the rows of one sample's table."""
    return min(rows, INTERPRETED_PROGRAMS if INTERPRETED else TABLE_PROGRAMS)


def deterministic() -> bool:
    """Whether PyTorch is asked for the same bits in each run."""
    return torch.are_deterministic_algorithms_enabled()


def adding_programs(blocks: int) -> int:
    """Programs a sample whose atomics add numbers that are not whole: of several, nobody knows which one is first."""
    return 1 if deterministic() else blocks


@triton.jit
def coordinates(index, H, W):
    """Coordinates (z, y, x) of a linear index into a volume (D, H, W)."""
    return index // W // H, index // W % H, index % W
