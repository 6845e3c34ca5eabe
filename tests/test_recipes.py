"""Each recipe of docs/recipes.md as it stands."""

import csv
import re
from pathlib import Path

import pytest
import ranks
import torch
from reference import TERMS
from training import fell

from triton_instance_loss import InstanceLoss, WeightedSum
from triton_instance_loss.metrics import instance_metrics

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def blocks():
    """The code of the page: (heading, language) -> block."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```", section, re.M | re.S):
            assert (section.splitlines()[0], language) not in found, "one block of a language in each recipe"
            found[section.splitlines()[0], language] = block
    return found


BLOCKS = blocks()


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Run the Python block under a heading, in a folder of its own; its variables, and the lines that it printed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def run(heading):
        variables = {"__name__": "__main__"}
        exec(compile(BLOCKS[heading, "python"], f"docs/recipes.md, {heading}", "exec"), variables)
        return variables, capsys.readouterr().out.splitlines()

    return run


def test_every_block_is_tried_here():
    mine = Path(__file__).read_text()
    assert {heading for heading, _ in BLOCKS} == set(re.findall(r'(?:recipe\(|BLOCKS\[)"(.+?)"', mine))


def drawn(*objects):
    """(1, 1, 40, 40) with boxes of 1, each given by its corner and sides."""
    volume = torch.zeros(1, 1, 40, 40)
    for row, column, height, width in objects:
        volume[..., row : row + height, column : column + width] = 1
    return volume


LABELS = ((4, 4, 6, 6), (4, 12, 6, 6), (20, 20, 6, 6))
MISTAKES = {
    "objects missed": drawn(*LABELS[:2]),
    "objects invented": drawn(*LABELS, (30, 4, 6, 6)),
    "neighbours merged": drawn(*LABELS, (6, 10, 2, 2)),
    "objects broken into pieces": drawn(*LABELS[:2], (20, 20, 2, 6), (24, 20, 2, 6)),
}


def test_the_table_of_mistakes():
    table = dict(re.findall(r"^\| ([a-z ]+) \| ([a-z_, ]+) \|$", PAGE, re.M))
    table = {mistake: set(terms.split(", ")) for mistake, terms in table.items() if mistake != "what you see"}
    assert set(table) == set(MISTAKES)
    loss = InstanceLoss(spatial_dims=2, rate_instead_number=True)
    for mistake, outputs in MISTAKES.items():
        terms = loss(20 * outputs - 10, drawn(*LABELS))._asdict()
        rates = {name: terms[name].item() for name in TERMS if name not in ("pixel", "proximity")}
        others = [value for name, value in rates.items() if name not in table[mistake]]
        assert min(rates[name] for name in table[mistake]) > 1.1 * max(others), (mistake, rates)


def test_terms_and_weights(recipe):
    variables, printed = recipe("Which terms, with which weights")
    assert [line.split()[0] for line in printed] == list(TERMS)
    values = [float(line.split()[1]) for line in printed]
    assert all(0 <= value <= 1 for value in values[:-1])
    assert values[-1] > 1
    assert variables["proximity"] * variables["terms"].proximity.item() == pytest.approx(0.1)


def test_ramp_up(recipe):
    variables, printed = recipe("Ramp-up")
    loss, full = variables["loss"], variables["full"]
    half = {name: weight / (1 if name == "pixel" else 2) for name, weight in full.items()}
    assert loss.weights == variables["resumed"].weights == half
    assert "'center': 0.125" in printed[0]
    for epoch, names in ((4, {"pixel"}), (100, {name for name, weight in full.items() if weight})):
        variables["set_weights"](epoch)
        loss(torch.randn(1, 1, 6, 6, 6), torch.zeros(1, 1, 6, 6, 6))
        assert set(loss.terms) == names
    assert loss.weights == full


def test_threshold(recipe):
    """At 0.5 one output covers both labels, and no_tp leaves its value on each; at 0.8 each label has its own."""
    _, printed = recipe("Threshold")
    (low, _, joined), (high, *apart) = (map(float, line.split()) for line in printed)
    assert (low, high) == (0.5, 0.8)
    assert joined > 0.05
    assert apart == [0, 0]


def test_threshold_with_softmax():
    """A lesion of probability 0.6 is an output from 1/2 on, and none from 0.7 on; None is 1 / num_out_chn."""
    labels = torch.zeros(1, 1, 9, 9)
    labels[..., 3:6, 3:6] = 1
    logits = torch.cat([0 * labels, torch.where(labels == 1, torch.tensor(0.6).logit(), -6.0)], 1)
    missed = {}
    for threshold in (None, 0.5, 0.7):
        loss = InstanceLoss(activation="softmax", num_out_chn=2, spatial_dims=2, segmentation_threshold=threshold)
        missed[threshold] = loss(logits, labels).missed_instances.item()
    assert missed == {None: 0, 0.5: 0, 0.7: 1}


def test_absent_classes_do_not_disturb_the_others():
    """Of four classes one is there; the gradient is a third of what it is alone, and small."""
    numbers = torch.zeros(1, 1, 12, 12, dtype=torch.long)
    numbers[..., 3:6, 3:6] = 1
    logits = torch.zeros(1, 4, 12, 12)
    logits[:, 0] = 9.0
    grads = []
    for classes in ((1, 2, 3), (1,)):
        x = logits.clone().requires_grad_()
        options = {"activation": "softmax", "num_out_chn": 4, "object_chn": classes, "to_onehot_y": True}
        loss = WeightedSum(InstanceLoss(rate_instead_number=True, spatial_dims=2, **options), pixel=0)
        grads.append(torch.autograd.grad(loss(x, numbers), x)[0])
    torch.testing.assert_close(3 * grads[0], grads[1])
    assert 0 < grads[1].norm() < 1


def test_several_losses_at_once(recipe):
    variables, printed = recipe("Several losses at once")
    loss = variables["loss"]
    assert [line.split()[0] for line in printed] == list(loss.losses)
    weighted = sum(loss.weights[name] * part for name, part in loss.parts.items())
    again = loss(variables["outputs"], variables["labels"])
    torch.testing.assert_close(again.detach(), weighted)
    assert variables["outputs"].grad.any()


def test_fine_tuning(recipe):
    variables, printed = recipe("Fine-tuning")
    assert printed[0] == printed[0].split(", 'cells'")[0]  # which has no weight at first, and is not computed
    assert "'cells'" in printed[1]
    assert variables["loss"].weights == {"whole": 1.0, "cells": 0.2}


def test_anisotropic_images(recipe):
    _, printed = recipe("Anisotropic images")
    values = [float(line.split()[-1]) for line in printed]
    assert values[0] > 1.05 * values[1]  # what is false costs a small object more


def test_deep_supervision(recipe):
    variables, _ = recipe("Deep supervision")
    outputs, labels, loss = variables["outputs"], variables["labels"], variables["instances"]
    assert all(level.grad.any() for level in outputs)
    at_the_end = dict(loss.terms)
    loss(outputs[0], labels)
    assert loss.terms == at_the_end
    variables["everywhere"](outputs, labels)
    assert loss.terms != at_the_end


def test_precomputed_components(recipe):
    _, printed = recipe("Precomputed components")
    assert printed == ["2.0 1.0", "[1]"]


def test_several_classes(recipe):
    variables, _ = recipe("Several classes")
    logits, numbers, options = variables["logits"], variables["numbers"], variables["options"]
    assert (logits.grad.flatten(2).abs().sum(2) > 0).all()
    options.pop("object_chn")
    of_classes = [
        InstanceLoss(rate_instead_number=True, object_chn=number, **options)(logits, numbers) for number in (1, 2)
    ]
    for name, value in variables["instances"].terms.items():
        torch.testing.assert_close(value, sum(getattr(terms, name).detach() for terms in of_classes) / 2)


def test_voxels_to_ignore(recipe):
    variables, printed = recipe("Voxels to ignore")
    assert printed == ["False False"]
    assert variables["logits"].grad.any()


def test_mixed_precision(recipe):
    variables, _ = recipe("Mixed precision")
    assert variables["value"].dtype == torch.float32
    assert variables["scaler"].get_scale() == 65536  # no step was skipped
    assert all(p.grad.isfinite().all() and p.grad.any() for p in variables["network"].parameters())


def test_several_processes(tmp_path):
    (grads, empty), (same, lesions) = ranks.run_ranks(ranks.run_recipe, tmp_path, BLOCKS["Several processes", "python"])
    torch.testing.assert_close(grads, same, rtol=0, atol=0)
    assert all(grad.any() for grad in grads)
    assert empty == 0
    assert lesions > 0


def test_metrics_and_pictures(recipe, tmp_path):
    pytest.importorskip("torchmetrics", reason="its metric needs torchmetrics")
    variables, printed = recipe("Metrics and pictures of a validation")
    assert printed[0].startswith("{'num_outputs': ")
    by_size = instance_metrics(variables["images"] * 0 - 1, variables["labels"], **variables["options"], sizes=(5, 20))
    assert variables["by_size"].compute()["num_labels"].tolist() == by_size.num_labels.sum(0).tolist()
    assert by_size.num_labels.sum() > 20
    assert (tmp_path / "instances.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:.*(GradScaler|metadata)")
def test_bundle(recipe, tmp_path, monkeypatch):
    pytest.importorskip("ignite", reason="MONAI's trainers need pytorch-ignite")
    losses, forward = [], WeightedSum.forward

    def noted(self, outputs, labels):
        losses.append(forward(self, outputs, labels))
        assert type(losses[-1]) is torch.Tensor
        assert (self.weights["missed_instances"], self.loss.max_cc_out) == (0.5, 100)
        return losses[-1]

    monkeypatch.setattr(WeightedSum, "forward", noted)
    (tmp_path / "train.json").write_text(BLOCKS["A MONAI bundle", "json"])
    recipe("A MONAI bundle")
    assert len(losses) == 10 * 2
    assert fell([value.item() for value in losses[::2]])
    assert len(torch.load(tmp_path / "network.pt")) > 0


def test_lightning(recipe, tmp_path):
    pytest.importorskip("lightning", reason="the recipe for Lightning needs lightning")
    variables, _ = recipe("Lightning")
    assert variables["trainer"].global_step == 4
    (path,) = tmp_path.rglob("metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3"]
    assert set(TERMS) - {"proximity"} <= set(rows[0])
