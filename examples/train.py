"""Train small U-Nets on images of many objects with one loss after the other, all else equal, and compare them.

python examples/train.py                                       # drawn lesions in 2D, minutes on two cores
python examples/train.py --dims 3                              # in 3D, better on a GPU
python examples/train.py --data FOLDER --arms ce family log    # images/ and labels/, or nuclei.npz, ms_lesions.npz
python examples/train.py --data FOLDER --set nuclei --steps 250 --empty 0.8
python examples/train.py --table study/results.json

The same seed gives every arm the same initial weights and the same patches in the same order. Networks are compared on
test images that nothing was chosen by. docs/study.md has what came out on real images.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from instance_report import Parser, stdout_console
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss
from monai.networks.nets import UNet
from rich.progress import Progress
from torch import Tensor
from train_data import SETS, DataError, ImageSet, Part, Patches, load
from train_pictures import draw_curves, draw_examples, draw_scores
from train_report import Results, bars, curve, markdown, print_tables, score, surroundings

from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss, InstanceLoss, WeightedSum

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, instances

# Names for the command line, and for people. Weights are those of the losses' authors, or 1, and were not tuned.
ARMS = {
    "dice": "Dice",
    "ce": "Dice + CE",
    "focal": "Dice + focal",
    "family": "+ family",
    "log": "+ family, log",
    "published": "+ family, published gradients",
    "dice_log": "Dice + family, log",
    "blob": "+ blob loss",
    "cc": "+ CC-DiceCE",
    "bicc": "+ BiCC",
    "cat": "+ CAT",
    "false": "+ false components",
    "false_tenth": "+ false components, 0.1",
}
CHECKS = 5  # of a run by validation images
MOST_TO_CHECK = 40
BATCH = 8
RATE = 0.01  # the highest learning rate of the cycle


def loss_of(arm: str, dims: int) -> Loss:
    """The loss of an arm; "+" stands for what is added to Dice + CE."""
    # (Dice over the batch, as nnU-Net takes it: that of a patch without an object says next to nothing)
    plain: Loss | None = {
        "dice": DiceLoss(sigmoid=True, batch=True),
        "focal": DiceFocalLoss(sigmoid=True, batch=True),
    }.get(arm)
    if plain is not None:
        return lambda outputs, labels, instances: plain(outputs, labels)
    base = DiceLoss(sigmoid=True, batch=True) if arm == "dice_log" else DiceCELoss(sigmoid=True, batch=True)
    if arm == "ce":
        return lambda outputs, labels, instances: base(outputs, labels)
    if arm in ("family", "log", "published", "dice_log"):
        # As published, gradients are zero with logits; so that arm has probabilities.
        gradients = {"family": "surrogate", "published": "reference"}.get(arm, "log")
        activation = "none" if arm == "published" else "sigmoid"
        family = InstanceLoss(spatial_dims=dims, rate_instead_number=True, gradients=gradients, activation=activation)
        weight, added = 1.0, WeightedSum(family, pixel=0.0)
    else:
        weight, added = {
            "blob": (0.5, BlobLoss(spatial_dims=dims)),
            "cc": (1.0, CCLoss(spatial_dims=dims)),
            "bicc": (1.0, CCLoss(alpha=0.5, spatial_dims=dims)),
            "cat": (1.0, ComponentTverskyLoss(spatial_dims=dims)),
            "false": (1.0, FalseComponentLoss(spatial_dims=dims)),
            "false_tenth": (0.1, FalseComponentLoss(spatial_dims=dims)),
        }[arm]

    def both(outputs: Tensor, labels: Tensor, instances: Tensor) -> Tensor:
        seen = outputs.sigmoid() if arm == "published" else outputs
        result: Tensor = base(outputs, labels) + weight * added(seen, labels, instances)
        return result

    return both


@dataclass(frozen=True)
class Setting:
    """What the command line asks for."""

    data: str
    dims: int
    arms: tuple[str, ...]
    seeds: int
    steps: int
    empty: float | None  # share of patches without an object; None: as they come
    channels: tuple[int, ...]


def network_for(images: ImageSet, setting: Setting, seed: int) -> torch.nn.Module:
    """A U-Net whose weights follow from the seed."""
    torch.manual_seed(seed)
    strides = [2] * (len(setting.channels) - 1)
    return UNet(images.dims, images.train.images.shape[1], 1, setting.channels, strides, num_res_units=1)


def train(
    arm: str, seed: int, images: ImageSet, setting: Setting, progress: Progress
) -> tuple[torch.nn.Module, list[Results]]:
    """A network trained with the loss of an arm, and its scores on validation images on the way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_for(images, setting, seed).to(device)
    loss, patches = loss_of(arm, images.dims), Patches(images.train, images.patch, BATCH, setting.empty, seed)
    optimiser = torch.optim.Adam(network.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=setting.steps)
    looked_at = Part(images.validation.images[:MOST_TO_CHECK], images.validation.instances[:MOST_TO_CHECK])
    every, checked = max(setting.steps // CHECKS, 1), []
    task = progress.add_task(f"{ARMS[arm]}, seed {seed}", total=setting.steps)
    for step in range(1, setting.steps + 1):
        batch, instances = (tensor.to(device) for tensor in patches())
        optimiser.zero_grad()
        loss(network(batch), (instances > 0).float(), instances).backward()
        optimiser.step()
        cycle.step()
        progress.advance(task)
        if step % every == 0:
            found = probabilities(network, looked_at)
            checked.append({"step": step} | score(found, looked_at.instances, images.sizes))
    progress.remove_task(task)
    return network, checked


@torch.no_grad()
def probabilities(network: torch.nn.Module, part: Part) -> Tensor:
    """(n, 1, *spatial) on the CPU; the images are padded to what the network takes, and cut back."""
    network.eval()
    device = next(network.parameters()).device
    spatial = part.images.shape[2:]
    padding = [size for length in reversed(spatial) for size in (0, -length % 8)]
    where = (..., *(slice(0, length) for length in spatial))
    found = []
    for batch in part.images.split(10):
        padded = torch.nn.functional.pad(batch.to(device), padding)
        found.append(network(padded).sigmoid()[where].cpu())
    network.train()
    return torch.cat(found)


def cost(images: ImageSet, setting: Setting, rounds: int = 15) -> dict[str, float]:
    """How many times as long as with Dice + CE a whole training step takes, medians in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_for(images, setting, 0).to(device)
    batch, instances = (tensor.to(device) for tensor in Patches(images.train, images.patch, BATCH, setting.empty, 0)())
    losses = {arm: loss_of(arm, images.dims) for arm in dict.fromkeys(("ce", *setting.arms))}
    times: dict[str, list[float]] = {arm: [] for arm in losses}
    for _ in range(rounds + 2):
        for arm, loss in losses.items():
            begin = time.perf_counter()
            loss(network(batch), (instances > 0).float(), instances).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[arm].append(time.perf_counter() - begin)
    medians = {arm: sorted(values[2:])[rounds // 2] for arm, values in times.items()}
    return {arm: round(medians[arm] / medians["ce"], 3) for arm in setting.arms}


def study(images: ImageSet, setting: Setting) -> tuple[Results, dict[str, Tensor]]:
    """Train and test every arm with every seed; and the probabilities of the first seed on the test images."""
    where, begin, used = surroundings(), time.perf_counter(), time.process_time()
    runs: list[Results] = []
    first: dict[str, Tensor] = {}
    of_ce: list[Tensor] = []
    with bars() as progress:
        everything = progress.add_task("all runs", total=setting.seeds * len(setting.arms))
        for seed in range(setting.seeds):
            found = {}
            for arm in setting.arms:
                network, checked = train(arm, seed, images, setting, progress)
                found[arm] = probabilities(network, images.test)
                runs.append({"arm": ARMS[arm], "seed": seed, "checked": checked} | tested(found[arm], images))
                progress.advance(everything)
            if {"log", "bicc"} <= found.keys():
                mean = (found["log"] + found["bicc"]) / 2
                runs.append({"arm": "ensemble: log, bicc", "seed": seed, "checked": []} | tested(mean, images))
            of_ce += [found["ce"]] if "ce" in found else []
            first = first or found
    for seed in range(len(of_ce) if len(of_ce) > 1 else 0):
        mean = (of_ce[seed] + of_ce[seed - 1]) / 2
        runs.append({"arm": "ensemble: Dice + CE twice", "seed": seed, "checked": []} | tested(mean, images))
    results = {
        "setting": vars(setting) | {"set": images.name, "sizes": images.sizes, "at": images.at},
        "images": {name: len(getattr(images, name)) for name in ("train", "validation", "test")},
        **where,
        "cost": cost(images, setting),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "runs": runs,
    }
    return results, first


def tested(found: Tensor, images: ImageSet) -> Results:
    """Scores at a threshold of 0.5, and at others."""
    truth = images.test.instances
    return score(found, truth, images.sizes) | {"curve": curve(found, truth)}


def main(arguments: list[str] | None = None) -> None:
    """Train every arm with every seed, score it on test images, and write down what came out."""
    parser = Parser(description="Losses compared on images of many objects, all else equal.")
    parser.add_argument("--data", default="synthetic", metavar="synthetic | FOLDER", help="the images (synthetic)")
    parser.add_argument("--set", choices=list(SETS), help="which of the sets in the folder, if there are several")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="of synthetic images (2)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="what is compared (all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--steps", type=int, default=250, help="steps of each run (250)")
    parser.add_argument("--empty", type=float, metavar="SHARE", help="share of patches without objects (as they come)")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32], help="of the U-Net (8 16 32)")
    parser.add_argument("--out", type=Path, default=Path("study"), metavar="FOLDER", help="what is written (study)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print stored results as Markdown")
    given = parser.parse_args(arguments)
    if given.table:
        try:
            print(markdown(json.loads(given.table.read_text())))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--table: no results in {given.table}: {error!r}")
        return
    for name in ("seeds", "steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.empty is not None and not 0 <= given.empty < 1:
        parser.error(f"--empty must be at least 0 and below 1, got {given.empty}")
    if len(given.channels) < 2 or len(given.channels) > 4 or min(given.channels) < 1:
        parser.error(f"--channels must be two to four numbers of at least 1, got {given.channels}")
    try:
        images = load(given.data, given.set, given.dims)
        given.out.mkdir(exist_ok=True)
    except DataError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out: {error}")
    arms = tuple(arm for arm in ARMS if arm in given.arms)
    setting = Setting(
        Path(given.data).name, images.dims, arms, given.seeds, given.steps, given.empty, tuple(given.channels)
    )
    results, found = study(images, setting)
    (given.out / "results.json").write_text(json.dumps(results) + "\n")
    draw_scores(given.out / "scores.png", results)
    draw_curves(given.out / "curves.png", results)
    draw_examples(given.out / "examples.png", images, {ARMS[arm]: each for arm, each in found.items()})
    print_tables(stdout_console(width=140), results)


if __name__ == "__main__":
    main()
