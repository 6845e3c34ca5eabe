"""A LightningModule that trains with `WeightedSum` and logs its terms, without reading more than what is logged."""

import csv
from collections import Counter

import pytest
import torch
from reference import TERMS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from training import fell, patches, tiny_network

from triton_instance_loss import InstanceLoss, WeightedSum

lightning = pytest.importorskip("lightning", reason="the tests of Lightning's loop need lightning")

STEPS, EVERY = 16, 5  # steps of a training, and how often Lightning writes what was logged


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = tiny_network()
        self.loss = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=1e-4)
        self.seen = []

    def training_step(self, batch, _):
        image, label = batch
        outputs = self.network(image)
        value = self.loss(outputs, label)
        self.log_dict(self.loss.terms)
        self.seen.append((outputs.dtype, value.detach(), dict(self.loss.terms)))
        return value

    def validation_step(self, batch, _):
        image, label = batch
        value = self.loss(self.network(image), label)
        self.log_dict({f"val_{name}": term for name, term in self.loss.terms.items()}, batch_size=len(image))
        self.log("val_loss", value, batch_size=len(image))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Reads(TorchDispatchMode, lightning.Callback):
    """What each step of a training reads from the device, and how often it looks for instances."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.at_start = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, *_):
        self.at_start.append((self.counts["_local_scalar_dense"], self.counts["find_and_evaluate"]))

    def on_train_end(self, *_):
        self.on_train_batch_start()

    def a_step(self):
        """(reads, searches) from the start of each step to that of the next."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.at_start, self.at_start[1:], strict=False)]


def fit(device, folder, module, callbacks=(), validate=False, **options):
    """Train on the same two patches in each step; rows of the file that Lightning writes, without empty cells."""
    images, labels = patches(2, (12, 12, 12))
    data = TensorDataset(images.repeat(STEPS, 1, 1, 1, 1), labels.repeat(STEPS, 1, 1, 1, 1))
    logger = lightning.pytorch.loggers.CSVLogger(folder)
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=EVERY,
        num_sanity_val_steps=0,
        limit_val_batches=2 if validate else 0,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data, batch_size=1) if validate else None)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_and_logs_the_terms(device, tmp_path, precision):
    module = Module()
    rows = fit(device, tmp_path, module, precision=precision)
    assert {dtype for dtype, *_ in module.seen} == {torch.bfloat16 if "16" in precision else torch.float32}
    assert fell([value.item() for _, value, _ in module.seen])
    assert [row["step"] for row in rows] == list(range(EVERY - 1, STEPS, EVERY))
    for row in rows:
        *_, terms = module.seen[int(row["step"])]
        assert {name: row[name] for name in TERMS} == {name: pytest.approx(terms[name].item()) for name in TERMS}


def test_validation_logs_the_mean_over_batches(device, tmp_path):
    module = Module()
    *_, row = fit(device, tmp_path, module, validate=True)
    expected = Counter()
    images, labels = (volume.to(device) for volume in patches(2, (12, 12, 12)))
    module.to(device)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        with torch.no_grad():
            value = module.loss(module.network(image), label)
        expected.update({f"val_{name}": term.item() / 2 for name, term in module.loss.terms.items()})
        expected["val_loss"] += value.item() / 2
    assert {name: row[name] for name in expected} == {name: pytest.approx(v) for name, v in expected.items()}


def test_terms_are_read_only_when_they_are_written(device, tmp_path):
    """A step looks for instances once, and reads nothing; terms are read when Lightning writes them, once each."""
    reads = Reads()
    with reads:
        fit(device, tmp_path, Module(), [reads])
    written = [len(TERMS) if (step + 1) % EVERY == 0 else 0 for step in range(STEPS)]
    assert reads.a_step() == [(count, 1) for count in written]
