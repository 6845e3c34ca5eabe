"""Inputs from a seed: lesions with predictions that match, miss and invent some, and masks, easy or hard to label.

Everything is drawn on the CPU, so that the same seed gives the same input on every device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Volume = NDArray[np.bool_]
Shape = tuple[int, ...]  # (B, 1, *spatial)


@dataclass(frozen=True)
class Inputs:
    """What the providers of a case work on."""

    outputs: Tensor  # (B, 1, *spatial) float32 logits, or the mask (bool) where something is to be labelled
    labels: Tensor  # (B, 1, *spatial) float32, or the mask once more

    def to(self, device: torch.device) -> "Inputs":
        """The same on `device`."""
        return Inputs(self.outputs.to(device), self.labels.to(device))


Draw = Callable[[Shape, int], Inputs]


def _paint_ball(volume: Volume, center: NDArray[np.int64], radius: int) -> None:
    low = np.maximum(center - radius, 0)
    high = np.minimum(center + radius + 1, volume.shape)
    axes = np.ogrid[tuple(slice(*bounds) for bounds in zip(low, high, strict=True))]
    inside = sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True)) <= radius**2
    volume[tuple(slice(*bounds) for bounds in zip(low, high, strict=True))] |= inside


def _from_volumes(predicted: NDArray[np.bool_], true: NDArray[np.bool_], seed: int) -> Inputs:
    """Logits of +-3 with a little noise, which changes no prediction, and float labels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(predicted.shape, generator=generator).mul_(0.3).clamp_(-2.0, 2.0)
    outputs = torch.from_numpy(predicted).float().mul_(6.0).sub_(3.0).add_(noise)
    return Inputs(outputs, torch.from_numpy(true).float())


def lesions(shape: Shape, seed: int, count: int = 30, radius: int = 8) -> Inputs:
    """`count` balls of radius 1 to `radius` a sample; four in five are predicted, a little moved and resized.

    Each of the others is missed, and a ball is invented elsewhere. Balls may overlap.
    """
    rng = np.random.default_rng(seed)
    spatial = np.array(shape[2:])
    radius = min(radius, int(spatial.min()) // 4)
    predicted, true = np.zeros(shape, bool), np.zeros(shape, bool)
    for sample in range(shape[0]):
        for number in range(count):
            center, size = rng.integers(radius, spatial - radius), int(rng.integers(1, radius + 1))
            _paint_ball(true[sample, 0], center, size)
            if number % 5:
                moved = center + rng.integers(-2, 3, len(spatial))
                _paint_ball(predicted[sample, 0], moved, max(1, size + int(rng.integers(-1, 2))))
            else:
                invented = rng.integers(radius, spatial - radius)
                _paint_ball(predicted[sample, 0], invented, int(rng.integers(1, radius + 1)))
    return _from_volumes(predicted, true, seed)


def cells(shape: Shape, seed: int) -> Inputs:
    """As many as an image of cells holds: 150 a sample, each alike large."""
    return lesions(shape, seed, count=150, radius=6)


def untrained(shape: Shape, seed: int) -> Inputs:
    """What a network gives before its first step, noise around 0, where the labels are lesions."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Inputs(noise, lesions(shape, seed).labels)


def one_instance(shape: Shape, seed: int, voxels: int = 10**6) -> Inputs:
    """One cube of `voxels` voxels, predicted exactly; if it does not fit, one of half the sides."""
    side = round(voxels ** (1 / len(shape[2:])))
    true = np.zeros(shape, bool)
    true[(slice(None), slice(None), *(slice(0, side if side <= size else size // 2) for size in shape[2:]))] = True
    return _from_volumes(true, true, seed)


def small_instances(shape: Shape, seed: int, count: int = 5000) -> Inputs:
    """`count` instances of five voxels in a row, on a lattice and predicted exactly; fewer if no more fit."""
    true = np.zeros(shape, bool)
    starts = [
        np.arange(0, size - 4, step) for size, step in zip(shape[2:], (2,) * (len(shape) - 3) + (7,), strict=True)
    ]
    lattice = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(starts))
    for start in lattice[:: max(1, len(lattice) // count)][:count]:
        true[(slice(None), 0, *start[:-1], slice(start[-1], start[-1] + 5))] = True
    return _from_volumes(true, true, seed)


def _mask(volume: Tensor) -> Inputs:
    return Inputs(volume, volume)


def noise(density: float) -> Draw:
    """Each voxel foreground by itself: at 50 % nearly everything is one winding component."""

    def draw(shape: Shape, seed: int) -> Inputs:
        return _mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)

    return draw


def blobs(shape: Shape, seed: int) -> Inputs:
    """The fifth of the voxels where noise, smooth over eight voxels, is highest."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((*shape[:2], *(max(2, size // 8) for size in shape[2:])), generator=generator)
    mode = "bilinear" if coarse.ndim == 4 else "trilinear"
    smooth = torch.nn.functional.interpolate(coarse, size=shape[2:], mode=mode)
    return _mask(smooth > np.quantile(smooth.flatten()[:: max(1, smooth.numel() // 10**6)].numpy(), 0.8))


def giant(shape: Shape, seed: int) -> Inputs:
    """Everything foreground: one component."""
    return _mask(torch.ones(shape, dtype=torch.bool))


def spiral(size: int) -> Volume:
    """A path of one voxel that winds inwards, its windings one voxel apart."""
    plane = np.zeros((size, size), bool)
    y, x, dy, dx, turns = 0, 0, 0, 1, 0
    plane[0, 0] = True
    while turns < 2:
        reach = [(y + step * dy, x + step * dx) for step in (1, 2)]
        inside = [0 <= at[0] < size and 0 <= at[1] < size for at in reach]
        if not inside[0] or any(plane[at] for at, there in zip(reach, inside, strict=True) if there):
            dy, dx, turns = dx, -dy, turns + 1
            continue
        y, x, turns = y + dy, x + dx, 0
        plane[y, x] = True
    return plane


def spirals(shape: Shape, seed: int) -> Inputs:
    """A spiral in every second plane (in every image): the longest chains there are."""
    mask = torch.zeros(shape, dtype=torch.bool)
    size = min(shape[-2:])
    plane = torch.from_numpy(spiral(size))
    if len(shape) == 5:
        mask[:, :, ::2, :size, :size] = plane
    else:
        mask[..., :size, :size] = plane
    return _mask(mask)


def comb(shape: Shape, seed: int) -> Inputs:
    """Teeth that only the last plane (the last line of an image) joins: all components become one at the end."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[(Ellipsis, *(slice(None, None, 2),) * (len(shape) - 3))] = True
    mask[:, :, -1] = True
    return _mask(mask)


def checkerboard(shape: Shape, seed: int) -> Inputs:
    """Every second voxel, connected through edges and corners alone."""
    total = sum(torch.arange(size).view(-1, *(1,) * (len(shape) - 3 - axis)) for axis, size in enumerate(shape[2:]))
    return _mask((total % 2 == 0).expand(shape).contiguous())
