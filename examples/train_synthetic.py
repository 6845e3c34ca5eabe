"""Train small U-Nets on synthetic lesions of very different sizes: Dice alone against the family of losses.

python examples/train_synthetic.py --out training              # 2D, about three minutes on two cores
python examples/train_synthetic.py --empty 0.8 --out empty     # four in five training images have no lesion
python examples/train_synthetic.py --dims 3 --out training3d   # for a GPU
python examples/train_synthetic.py --table training/results.json

The same seed gives every arm the same images, initial weights and order of batches. With `--empty` the arms are others:
Dice + CE, as such data are trained with, and the terms of instances added to it; Dice alone and the family stay. The
held-out images all have lesions, with `--empty` too: they are the same in every run.
"""

import json
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from instance_report import Parser, stdout_console
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from numpy.typing import NDArray
from rich.progress import Progress
from scipy import ndimage
from train_report import bars, curve, draw_example, draw_scores, markdown, print_tables, score, surroundings

from triton_instance_loss import InstanceLoss, WeightedSum

TEST_SEED = 1000  # the held-out images are the same for all seeds of the training
PIXEL, FAMILY, PUBLISHED = "pixel (Dice alone)", "family", "family, published gradients"
MISSED, FALSE = "family, missed x 4", "family, false x 4"
LATE = "family, false x 4 from half on"  # before, the default weights
BOTH, TWO_PIXELS = "ensemble, missed + false", "ensemble of two pixel runs"
ONLY_PIXEL = dict.fromkeys(("instance_label", "instance_output", "center", "false_instances", "missed_instances"), 0.0)
# Weights other than the default ones. Weights and the learning rate were fixed before the test images were looked at;
# LATE came afterwards, to find out why FALSE does harm.
ARMS = {
    PIXEL: ONLY_PIXEL,
    FAMILY: {},
    PUBLISHED: {},
    MISSED: {"missed_instances": 1},
    FALSE: {"false_instances": 1},
    LATE: {"false_instances": 1},
}
CE, WITH_TERMS, WITH_LOG = "Dice + CE", "Dice + CE + terms", "Dice + CE + terms, log"
# Where images are empty: with Dice + CE as the pixel loss, or with Dice, and the default weights of the other terms.
ARMS_WHERE_EMPTY = {CE: ONLY_PIXEL, WITH_TERMS: {}, WITH_LOG: {}, PIXEL: ONLY_PIXEL, FAMILY: {}}


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    dims: int
    seeds: int
    steps: int
    size: int  # voxels along each axis of an image
    training_images: int
    test_images: int
    batch: int
    channels: tuple[int, ...]
    rate: float = 0.01  # the highest learning rate of the cycle
    empty: float = 0.0  # share of the training images that have no lesion

    @property
    def arms(self) -> dict[str, dict[str, float]]:
        """What is trained, and with which weights."""
        return ARMS_WHERE_EMPTY if self.empty else ARMS


def setting(dims: int, seeds: int, steps: int | None, quick: bool, empty: float) -> Setting:
    """The defaults of 2D and of 3D; `quick` only shows that everything works."""
    if quick:
        return Setting(dims, seeds, steps or 4, {2: 48, 3: 24}[dims], 8, 6, 4, (4, 8), empty=empty)
    if dims == 2:
        return Setting(2, seeds, steps or 300, 96, 400, 150, 4, (8, 16, 32), empty=empty)
    return Setting(3, seeds, steps or 1000, 64, 200, 100, 4, (16, 32, 64), empty=empty)


def lesions(
    dims: int, size: int, generator: np.random.Generator, empty: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """An image and its labels: ellipses of radius 1 to 7, small ones more often, blurred, faint in noise; or none."""
    at = np.stack(np.meshgrid(*[np.arange(size)] * dims, indexing="ij"))
    labels = np.zeros((size,) * dims, dtype=bool)
    signal = np.zeros(labels.shape)
    taken: list[tuple[NDArray[np.float64], float]] = []
    for _ in range(0 if empty else generator.integers(3, 11)):
        radius = np.exp(generator.uniform(0, np.log(7)))
        center = generator.uniform(radius, size - 1 - radius, dims)
        if any(np.linalg.norm(center - other) < 1.2 * (radius + far) + 2 for other, far in taken):
            continue  # lesions do not touch, so that components are lesions
        taken.append((center, radius))
        radii = radius * generator.uniform(0.8, 1.2, dims)
        here = (((at.T - center) / radii) ** 2).sum(-1).T <= 1
        here[tuple(center.round().astype(int))] = True
        labels |= here
        signal += generator.uniform(0.7, 1.3) * here
    noise = ndimage.gaussian_filter(generator.normal(size=labels.shape), 0.7)
    uneven = ndimage.gaussian_filter(generator.normal(size=labels.shape), 8)
    image = ndimage.gaussian_filter(signal, 0.8) + 0.15 * noise / noise.std() + 0.15 * uneven / uneven.std()
    return image.astype(np.float32), labels


def dataset(chosen: Setting, count: int, seed: int, empty: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels (count, 1, *spatial); a share `empty` of them, the first ones, without a lesion."""
    generator = np.random.default_rng(seed)
    without = min(round(empty * count), count - 1)
    drawn = (lesions(chosen.dims, chosen.size, generator, number < without) for number in range(count))
    images, labels = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(labels))[:, None].float()


def train(
    arm: str, seed: int, data: tuple[torch.Tensor, torch.Tensor], chosen: Setting, progress: Progress
) -> torch.nn.Module:
    """A network trained with the loss of an arm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    strides = [2] * (len(chosen.channels) - 1)
    network = UNet(chosen.dims, 1, 1, chosen.channels, strides, num_res_units=1).to(device)
    # With "sigmoid" the published gradients would be those of Dice alone; with probabilities and "none" they are not.
    published = {"activation": "none", "gradients": "reference"} if arm == PUBLISHED else {}
    options = {"gradients": "log"} if arm == WITH_LOG else published
    # (Dice over the batch, as nnU-Net takes it: that of a patch without a lesion says next to nothing)
    pixel = DiceCELoss(sigmoid=True, batch=True) if arm in (CE, WITH_TERMS, WITH_LOG) else None
    family = InstanceLoss(pixel, spatial_dims=chosen.dims, rate_instead_number=True, **options)
    loss = WeightedSum(family, **chosen.arms[arm])
    loss_of_first_half = WeightedSum(family) if arm == LATE else loss
    optimiser = torch.optim.Adam(network.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, chosen.rate, total_steps=chosen.steps)
    order = torch.Generator().manual_seed(seed)
    task = progress.add_task(f"{arm}, seed {seed}", total=chosen.steps)
    for step in range(chosen.steps):
        batch = torch.randperm(len(data[0]), generator=order)[: chosen.batch]
        images, labels = (tensor[batch].to(device) for tensor in data)
        outputs = network(images)
        optimiser.zero_grad()
        criterion = loss if step >= chosen.steps / 2 else loss_of_first_half
        criterion(outputs.sigmoid() if published else outputs, labels).backward()
        optimiser.step()
        cycle.step()
        progress.advance(task)
    progress.remove_task(task)
    return network.eval()


@torch.no_grad()
def probabilities(network: torch.nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
    """(images, *spatial)."""
    device = next(network.parameters()).device
    return torch.cat([network(batch.to(device)).sigmoid()[:, 0].cpu() for batch in images.split(10)]).numpy()


def scores(found: NDArray[np.float32], truth: NDArray[np.bool_]) -> dict[str, Any]:
    """Everything at threshold 0.5, and recall against false outputs at the others."""
    return score(found >= 0.5, truth) | {"curve": curve(found, truth)}


def main(arguments: list[str] | None = None) -> None:
    """Train every arm with every seed, score it on held-out images, and write down what came out."""
    parser = Parser(description="Dice alone against the instance-level losses on synthetic lesions.")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="2D images or 3D volumes (2)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--steps", type=int, help="steps of each run (2D: 300, 3D: 1000)")
    parser.add_argument(
        "--empty", type=float, default=0.0, metavar="SHARE", help="share of training images without lesions (0)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("training"), metavar="FOLDER", help="what is written (training)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny images, four steps: does everything work?")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print stored results as Markdown")
    given = parser.parse_args(arguments)
    if given.table:
        try:
            print(markdown(json.loads(given.table.read_text())))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--table: no results in {given.table}: {error!r}")
        return
    for name in ("seeds", "steps"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not 0 <= given.empty < 1:
        parser.error(f"--empty must be at least 0 and below 1, got {given.empty}")
    try:
        given.out.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")

    chosen = setting(given.dims, given.seeds, given.steps, given.quick, given.empty)
    where = surroundings()  # before training, while the code is what runs
    begin, used = time.perf_counter(), time.process_time()
    runs, pixels, example = [], [], {}
    with bars() as progress:
        everything = progress.add_task("all runs", total=given.seeds * len(chosen.arms))
        images, labels = dataset(chosen, chosen.test_images, TEST_SEED)
        truth = labels[:, 0].numpy() == 1
        for seed in range(given.seeds):
            data = dataset(chosen, chosen.training_images, seed, chosen.empty)
            found = {}
            for arm in chosen.arms:
                found[arm] = probabilities(train(arm, seed, data, chosen, progress), images)
                progress.advance(everything)
            if not chosen.empty:
                found[BOTH] = (found[MISSED] + found[FALSE]) / 2
                pixels.append(found[PIXEL])
            runs += [{"arm": arm, "seed": seed} | scores(found[arm], truth) for arm in found]
            example = example or found
    for pair, (one, other) in enumerate(combinations(pixels, 2)):
        runs.append({"arm": TWO_PIXELS, "pair": pair} | scores((one + other) / 2, truth))
    results = {
        "setting": vars(chosen),
        **where,
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "runs": runs,
    }
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_scores(given.out / "training.png", results)
    outputs = {arm: found >= 0.5 for arm, found in example.items()}
    draw_example(given.out / "training_example.png", images[:, 0].numpy(), truth, outputs)
    print_tables(stdout_console(width=120), results)


if __name__ == "__main__":
    main()
