"""Who labels connected components: ours, and what else is installed; all must name the same components."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_instance_loss import connected_components

from .cases import Inputs
from .entry import Answer, Function, Provider, Setup

PUBLISHED_ROUNDS = 350
# Pooling 350 times on a CPU, and SciPy behind two copies: beyond these sizes they only hold everybody up.
PUBLISHED_VOXELS = {"cpu": 2**15, "cuda": 2**25}
SCIPY_VOXELS = {"cuda": 2**25}


def canonical(labels: Tensor) -> Answer:
    """Each component called by its largest voxel, plus one, whatever it was called: (B, 1, *spatial) int32."""
    samples = []
    for sample in labels.flatten(1).long():
        voxels = torch.arange(1, sample.numel() + 1, device=sample.device)
        largest = torch.zeros(int(sample.max()) + 1, dtype=torch.long, device=sample.device)
        largest.scatter_reduce_(0, sample, voxels, "amax")
        largest[0] = 0
        samples.append(largest[sample].int())
    return [torch.stack(samples).view(labels.shape)]


def by_scipy(mask: Tensor) -> Tensor:
    """scipy.ndimage.label, with full connectivity, sample by sample; on CUDA with the copies there and back."""
    from scipy import ndimage

    host = mask.cpu().numpy()
    labels = np.empty(host.shape, np.int32)
    for sample, target in zip(host, labels, strict=True):
        ndimage.label(sample[0], np.ones((3,) * (host.ndim - 2)), output=target[0])
    return torch.from_numpy(labels).to(mask.device)


def by_cc3d(mask: Tensor) -> Tensor:
    """cc3d.connected_components with 26 (8) neighbours, sample by sample."""
    import cc3d

    connectivity = 26 if mask.ndim == 5 else 8
    samples = [cc3d.connected_components(s[0], connectivity=connectivity, out_dtype=np.uint32) for s in mask.numpy()]
    return torch.from_numpy(np.stack(samples)[:, None].astype(np.int32, copy=False))


def _by_cupy(label: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """A labeller of one CuPy array, sample by sample, without copies of the mask."""

    def run(mask: Tensor) -> Tensor:
        import cupy

        arrays = cupy.from_dlpack(mask.view(torch.uint8))
        return torch.stack([torch.from_dlpack(label(sample[0]).astype(cupy.int32, copy=False)) for sample in arrays])[
            :, None
        ]

    return run


def _label_cupy(array: Any) -> Any:
    import cupy
    from cupyx.scipy import ndimage

    return ndimage.label(array, cupy.ones((3,) * array.ndim))[0]


def _label_cucim(array: Any) -> Any:
    from cucim.skimage import measure

    return measure.label(array, background=0, connectivity=array.ndim)


def _label_bkeccl(array: Any) -> Any:
    import bkeccl

    return bkeccl.ccl(array, dimensionality=f"{array.ndim}D", output_mode="raw")


LABELLERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...], tuple[str, ...]]] = {
    # name: function, what it needs, where it runs
    "scipy": (by_scipy, ("scipy",), ("cpu", "cuda")),
    "cc3d": (by_cc3d, ("cc3d",), ("cpu",)),
    "cupy": (_by_cupy(_label_cupy), ("cupy",), ("cuda",)),
    "cucim": (_by_cupy(_label_cucim), ("cupy", "cucim"), ("cuda",)),
    "bkeccl": (_by_cupy(_label_bkeccl), ("cupy", "bkeccl"), ("cuda",)),
}


def truth(inputs: Inputs, setup: Setup) -> Answer:
    """What SciPy says."""
    return canonical(by_scipy(inputs.outputs))


def _ours(inputs: Inputs, setup: Setup) -> Function:
    return lambda: connected_components(inputs.outputs)


def _published(inputs: Inputs, setup: Setup) -> Function:
    images, spatial_dims = inputs.outputs.float(), inputs.outputs.ndim - 2
    label = setup.references["instance_loss"].connected_components

    def run() -> Tensor:
        # Its mask has room for one sample.
        return torch.cat([label(image[None], PUBLISHED_ROUNDS, 0.5, spatial_dims) for image in images])

    return run


def _theirs(label: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: lambda: label(inputs.outputs)


PROVIDERS = (
    Provider("ours", _ours, truth),
    Provider("published", _published, truth, needs=("instance_loss",), most_voxels=PUBLISHED_VOXELS),
    *(
        Provider(
            name,
            _theirs(label),
            truth,
            needs=needs,
            devices=devices,
            most_voxels=SCIPY_VOXELS if name == "scipy" else {},
            torch_memory="cupy" not in needs,
        )
        for name, (label, needs, devices) in LABELLERS.items()
    ),
)
