"""The images that `train.py` trains on and tests with: drawn ones, those of a folder, and two public sets as npz.

Each set comes in three parts: to train on, to choose by, and to test.
"""

import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

PICTURES, VOLUMES = (".png", ".tif", ".tiff"), (".nii", ".nii.gz")
LESIONS, SIMULATED = "ms_lesions", "ms_lesions_simulated"
SETS = {"nuclei": "nuclei.npz", LESIONS: "ms_lesions.npz", SIMULATED: "ms_lesions.npz"}
DRAWN_TEST_SEED = 1000  # the test images are the same for all seeds of the training


class DataError(ValueError):
    """What is wrong with a set of images, in a sentence."""


@dataclass(frozen=True)
class Part:
    """Images and what is in them, all of one shape, or a list of volumes of any shapes."""

    images: Tensor  # (n, channels, *spatial) float32
    instances: Tensor  # (n, 1, *spatial) int32: 0 = background, any other number = an instance

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """A set of images."""

    name: str
    train: Part
    validation: Part
    test: Part
    patch: int  # side of the patches that a network is trained on
    sizes: tuple[int, ...]  # where classes of size begin, in voxels
    at: float  # false outputs an image at which runs are compared, whatever the threshold

    @property
    def dims(self) -> int:
        """Of the images, 2 or 3."""
        return self.train.images.ndim - 2


def load(data: str, name: str | None, dims: int) -> ImageSet:
    """The set that the command line names: "synthetic", or a folder, and which set of it.

    Raises:
        DataError: The folder does not hold what it should.
    """
    if data == "synthetic":
        return synthetic(dims)
    folder = Path(data)
    if not folder.is_dir():
        raise DataError(f"--data must be 'synthetic' or a folder, got {data}")
    there = [each for each, file in SETS.items() if (folder / file).is_file()]
    if name is not None and name not in there:
        raise DataError(f"--set must be one of those in {data}: {', '.join(there) or 'none'}; got {name}")
    if not there:
        return from_files(folder)
    if name is None and len(there) > 1:
        raise DataError(f"--set must say which of the sets in {data}: {', '.join(there)}")
    chosen = name or there[0]
    try:
        with np.load(folder / SETS[chosen]) as arrays:
            return nuclei(arrays) if chosen == "nuclei" else ms_lesions(arrays, chosen == SIMULATED)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"--data: {folder / SETS[chosen]}: {error}") from error


def nuclei(arrays: np.lib.npyio.NpzFile) -> ImageSet:
    """Fluorescence images of nuclei, some of which touch; 200 to train on, 34 to choose by, 100 to test, as stored."""
    images = torch.from_numpy(arrays["images"])[:, None].float()
    # Exposures differ by a hundred times: each image is scaled by its own brightest pixels.
    images = images / torch.quantile(images.flatten(1), 0.998, dim=1).clamp(min=1)[:, None, None, None]
    instances = torch.from_numpy(arrays["instances"].astype(np.int32))[:, None]
    parts = [Part(images[part], instances[part]) for part in (slice(0, 200), slice(200, 234), slice(234, None))]
    return ImageSet("nuclei", *parts, patch=128, sizes=(100, 300, 600), at=2.0)


def ms_lesions(arrays: np.lib.npyio.NpzFile, simulated: bool) -> ImageSet:
    """Axial slices of the brain with lesions of multiple sclerosis.

    Three patients have images: the left hemisphere trains, the right one tests, and of the left every sixth slice is
    to choose by. Or, `simulated`, the masks of 30 patients with a contrast that is made up, in the three brains,
    lesions taken out: 20 patients train, 4 are to choose by, 6 test.
    """
    shape = arrays["shape"].tolist()
    masks = [np.unpackbits(row, count=int(np.prod(shape))).reshape(shape).astype(bool) for row in arrays["labels"]]
    with_images = [arrays["patients"].tolist().index(patient) for patient in arrays["image_patients"]]
    volumes = np.stack([arrays["flair"], arrays["t1"], arrays["t2"]], axis=1).astype(np.float32) / 255
    if not simulated:
        left, right = [], []
        for volume, index in zip(volumes, with_images, strict=True):
            middle = shape[0] // 2
            left.append(_slices(volume[:, :middle], masks[index][:middle]))
            right.append(_slices(volume[:, middle:][:, ::-1], masks[index][middle:][::-1]))
        chosen = [Part(part.images[3::6], part.instances[3::6]) for part in left]
        rest = [torch.arange(len(part)) % 6 != 3 for part in left]
        training = [Part(p.images[r], p.instances[r]) for p, r in zip(left, rest, strict=True)]
        parts = _joined(training), _joined(chosen), _joined(right)
        return ImageSet(LESIONS, *parts, patch=64, sizes=(10, 30, 100), at=1.0)
    generator = np.random.default_rng(0)
    brains = [_without(volume[0], masks[index]) for volume, index in zip(volumes, with_images, strict=True)]
    slices = [_simulated(brains[patient % 3], mask, generator) for patient, mask in enumerate(masks)]
    parts = _joined(slices[:20]), _joined(slices[20:24]), _joined(slices[24:])
    return ImageSet(SIMULATED, *parts, patch=64, sizes=(10, 30, 100), at=1.0)


def _slices(volume: NDArray[np.float32], mask: NDArray[np.bool_]) -> Part:
    """Every second axial slice that shows some brain, (n, channels, x, y), and components of the mask in it."""
    shown = [z for z in range(0, mask.shape[-1], 2) if (volume[0, :, :, z] > 0).sum() > 1000]
    images = torch.from_numpy(np.ascontiguousarray(volume[..., shown].transpose(3, 0, 1, 2)))
    labels = np.stack([ndimage.label(mask[..., z], np.ones((3, 3)))[0] for z in shown])
    return Part(images, torch.from_numpy(labels.astype(np.int32))[:, None])


def _without(flair: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """An image whose lesions are filled with what lies around them."""
    outside = ndimage.binary_dilation(mask, iterations=2)
    nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
    filled = np.where(outside, ndimage.gaussian_filter(flair[tuple(nearest)], 1), flair)
    return filled.astype(np.float32)


def _simulated(brain: NDArray[np.float32], mask: NDArray[np.bool_], generator: np.random.Generator) -> Part:
    """Lesions of one patient, each with a contrast of its own, in the brain of another."""
    numbers, count = ndimage.label(mask & (brain > 0), np.ones((3, 3, 3)))
    contrast = np.concatenate(([0.0], generator.uniform(0.05, 0.35, count)))[numbers]
    image = brain + ndimage.gaussian_filter(contrast, 0.7) + generator.normal(0, 0.03, brain.shape) * (brain > 0)
    return _slices(image.astype(np.float32)[None], numbers > 0)


def _joined(parts: list[Part]) -> Part:
    return Part(torch.cat([part.images for part in parts]), torch.cat([part.instances for part in parts]))


def from_files(folder: Path) -> ImageSet:
    """`images/` and `labels/` with files of the same names; the first six in ten train, the next one is to choose by.

    Labels hold the number of an instance at each voxel, or 1 alone: then each component is one.
    """
    found = {}
    for side in ("images", "labels"):
        files = sorted((folder / side).glob("*")) if (folder / side).is_dir() else []
        found[side] = {file.name: file for file in files if file.name.endswith((*PICTURES, *VOLUMES))}
    if not found["images"]:
        kinds = ", ".join((*PICTURES, *VOLUMES))
        raise DataError(f"--data: {folder} must hold nuclei.npz, ms_lesions.npz, or images/ and labels/ with {kinds}")
    if odd := sorted(found["images"].keys() ^ found["labels"].keys()):
        raise DataError(f"--data: images/ and labels/ must hold the same names, but {odd[0]} is in one of them alone")
    if len(found["images"]) < 5:
        raise DataError(f"--data: {folder} must hold 5 images at least, got {len(found['images'])}")
    pairs = [(_read(file), _read(found["labels"][name])) for name, file in found["images"].items()]
    for (image, labels), name in zip(pairs, found["images"], strict=True):
        if image.shape != labels.shape or image.shape != pairs[0][0].shape:
            raise DataError(
                f"--data: all images and labels must have one shape, but {name} has {image.shape} and {labels.shape}, "
                f"the first one {pairs[0][0].shape}"
            )
    images = torch.from_numpy(np.stack([image / max(np.quantile(image, 0.998), 1e-9) for image, _ in pairs])).float()
    numbers = []
    for _, labels in pairs:
        several = len(np.unique(labels)) > 2
        numbers.append(labels if several else ndimage.label(labels > 0, np.ones((3,) * labels.ndim))[0])
    instances = torch.from_numpy(np.stack(numbers).astype(np.int32))
    ends = 0, round(0.6 * len(pairs)), round(0.7 * len(pairs)), len(pairs)
    parts = [Part(images[begin:end, None], instances[begin:end, None]) for begin, end in itertools.pairwise(ends)]
    dims = images.ndim - 1
    return ImageSet(folder.name, *parts, patch=128 if dims == 2 else 48, sizes=(10, 100, 1000), at=1.0)


def _read(file: Path) -> NDArray[np.float64]:
    """One image, without colours."""
    try:
        if file.name.endswith(VOLUMES):
            return np.asarray(nibabel.load(file).dataobj, dtype=np.float64)
        image = np.asarray(Image.open(file), dtype=np.float64)
    except Exception as error:
        raise DataError(f"--data: {file} cannot be read: {error}") from error
    return image[..., :3].mean(-1) if image.ndim == 3 else image


def synthetic(dims: int, size: int | None = None, counts: tuple[int, int, int] | None = None) -> ImageSet:
    """Drawn lesions of very different sizes."""
    size = size or {2: 96, 3: 48}[dims]
    counts = counts or {2: (200, 30, 100), 3: (60, 10, 30)}[dims]
    seeds = 0, 1, DRAWN_TEST_SEED
    parts = [drawn_part(dims, size, count, seed) for count, seed in zip(counts, seeds, strict=True)]
    sizes = (8, 20, 50) if dims == 2 else (15, 65, 270)  # discs and balls of radius 1.5, 2.5 and 4
    return ImageSet("synthetic", *parts, patch=size, sizes=sizes, at=0.2 if dims == 2 else 0.5)


def drawn_part(dims: int, size: int, count: int, seed: int) -> Part:
    """Images and instances from a seed."""
    generator = np.random.default_rng(seed)
    images, labels = zip(*(lesions(dims, size, generator) for _ in range(count)), strict=True)
    return Part(torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(labels))[:, None])


def lesions(dims: int, size: int, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """An image and its instances: ellipses of radius 1 to 7, small ones more often, blurred, faint in noise."""
    at = np.stack(np.meshgrid(*[np.arange(size)] * dims, indexing="ij"))
    labels = np.zeros((size,) * dims, dtype=np.int32)
    signal = np.zeros(labels.shape)
    taken: list[tuple[NDArray[np.float64], float]] = []
    for _ in range(generator.integers(3, 11)):
        radius = np.exp(generator.uniform(0, np.log(7)))
        center = generator.uniform(radius, size - 1 - radius, dims)
        if any(np.linalg.norm(center - other) < 1.2 * (radius + far) + 2 for other, far in taken):
            continue  # lesions do not touch, so that components are lesions
        taken.append((center, radius))
        radii = radius * generator.uniform(0.8, 1.2, dims)
        here = (((at.T - center) / radii) ** 2).sum(-1).T <= 1
        here[tuple(center.round().astype(int))] = True
        labels[here] = len(taken)
        signal += generator.uniform(0.7, 1.3) * here
    noise = ndimage.gaussian_filter(generator.normal(size=labels.shape), 0.7)
    uneven = ndimage.gaussian_filter(generator.normal(size=labels.shape), 8)
    image = ndimage.gaussian_filter(signal, 0.8) + 0.15 * noise / noise.std() + 0.15 * uneven / uneven.std()
    return image.astype(np.float32), labels


class Patches:
    """Batches of patches, flipped at random, from a seed; a share of them without any instance."""

    def __init__(self, part: Part, patch: int, batch: int, empty: float | None, seed: int) -> None:
        self.part, self.batch, self.empty = part, batch, empty
        self.sides = [min(patch, size) for size in part.images.shape[2:]]
        self.generator = np.random.default_rng(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, *sides), and instances (batch, 1, *sides)."""
        drawn = [self._one(number) for number in range(self.batch)]
        images, instances = zip(*drawn, strict=True)
        return torch.stack(images), torch.stack(instances)

    def _one(self, number: int) -> tuple[Tensor, Tensor]:
        """A patch; of the first ones in a batch that many are to be empty, on average."""
        wanted = None if self.empty is None else bool(self.generator.random() < self.empty)
        for _ in range(200):  # and if there is no such patch, any
            index = int(self.generator.integers(len(self.part)))
            image, instances = self.part.images[index], self.part.instances[index]
            starts = [
                int(self.generator.integers(full - side + 1))
                for full, side in zip(image.shape[1:], self.sides, strict=True)
            ]
            where = (slice(None), *(slice(s, s + side) for s, side in zip(starts, self.sides, strict=True)))
            if wanted is None or bool(instances[where].any()) != wanted:
                break
        flips = [axis for axis in range(1, image.ndim) if self.generator.random() < 0.5]
        return image[where].flip(flips), instances[where].flip(flips)
