"""Public labelling: `connected_components`."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, ops
from .activation import to_volume, unwrap, widen


def capacity_bound(shape: torch.Size, num_iterations: int | None) -> int:
    """The most instances a sample of a volume (B, D, H, W) can hold.

    Foreground voxels of one 2x2x2 block always touch, so whole components number at most one a block; rounds of
    max-pooling can leave one id a voxel.
    """
    _, depth, height, width = shape
    if num_iterations is not None:
        return depth * height * width
    return -(-depth // 2) * -(-height // 2) * -(-width // 2)


@overload
def connected_components(
    mask: Tensor, num_iterations: int | None = None, *, relabel: Literal[False] = False
) -> Tensor: ...


@overload
def connected_components(
    mask: Tensor, num_iterations: int | None = None, *, relabel: Literal[True]
) -> tuple[Tensor, Tensor]: ...


@checks.not_scriptable
def connected_components(
    mask: Tensor, num_iterations: int | None = None, *, relabel: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Label the connected components of each sample: voxels that touch through faces, edges or corners.

    The id of a component is the largest linear index of its voxels (row-major over the spatial axes), plus one.

    Args:
        mask: (B, 1, H, W) or (B, 1, H, W, D), any real dtype, 0 or 1; a voxel is foreground where it is above 0.5.
        num_iterations: None finds whole components. A number k gives what k rounds of 3x3(x3) max-pooling of the
            linear indices inside the mask give, as in the published code: a component wider than k steps falls apart.
        relabel: give 1..n in each sample, in the order of the ids, and the counts.

    Returns:
        The ids, int32, of the shape of `mask`; 0 is background. With `relabel`, a pair: the numbers 1..n, int32, of
        the shape of `mask`, and how many components each sample has, (B,) int32. Neither synchronises with the host.

    Raises:
        TypeError: `mask` is no dense tensor of a real dtype; `num_iterations` is no integer; `relabel` is no bool.
        ValueError: `mask` has another shape, another number of channels, no voxel, or more than 2^31 - 1 a sample,
            or is on another device than the CPU or CUDA; `num_iterations` is below 1; `mask` holds a value outside
            [-0.5, 1.5] (looked for on the CPU always, on CUDA if the environment variable TRITON_INSTANCE_LOSS_DEBUG is
            1).
        NotImplementedError: Under torch.vmap, torch.jit.trace or torch.jit.script.

    Note:
        Deterministic on every device. Not differentiable.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[[1, 1, 0, 0], [0, 0, 0, 1]]]])
        >>> connected_components(mask)[0, 0].tolist()
        [[2, 2, 0, 0], [0, 0, 0, 8]]
        >>> numbers, counts = connected_components(mask, relabel=True)
        >>> numbers[0, 0].tolist(), counts.tolist()
        ([[1, 1, 0, 0], [0, 0, 0, 2]], [2])
    """
    checks.tensor("mask", mask)
    checks.volume("mask", mask, 2 if mask.ndim == 4 else 3)
    if mask.shape[1] != 1:
        raise ValueError(f"mask must have one channel, (B, 1, *spatial), got {tuple(mask.shape)}.")
    if num_iterations is not None:
        num_iterations = checks.integer("num_iterations", num_iterations, 1)
    relabel = checks.flag("relabel", relabel)
    values = widen(unwrap(mask).detach())
    if checks.debugging(values):
        checks.mask("mask", values, "Of a mask of 0 and 255, or numbers of instances, give mask > 0.")
    volume = to_volume(values) > 0.5
    if not relabel:
        ids: Tensor = ops.components(volume, num_iterations or 0)
        return ids.view(mask.shape)
    bound = capacity_bound(volume.shape, num_iterations)
    numbers, counts, _ = ops.find_instances(volume, num_iterations or 0, 0, rows_of_tables(volume, bound))
    return numbers.view(mask.shape), counts


def rows_of_tables(tensor: Tensor, bound: int) -> int:
    """How many rows tables have: 0, "as many as there are", where counting is free, else the `bound`."""
    eager = type(tensor) is Tensor and not torch.compiler.is_compiling()
    return 0 if eager and ops.backend(tensor) == "cpu" else bound
