"""Plan, preprocess and train with nnU-Net itself on a drawn dataset, as a user would from the command line.

`make test-nnunet` runs it, in an environment with nnU-Net; the name keeps it out of the other tests. Training runs
twice: in 2D with labels, and in 3D with regions and an ignore label.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

LOSSES = ("InstanceLoss", "InstanceCenterLoss", "BlobLoss", "CCLoss", "BiCCLoss")
TRAINERS = [f"nnUNetTrainer{loss}{levels}" for loss in LOSSES for levels in ("", "AllLevels")]
MIXED = "nnUNetTrainerMixedShort"  # of the trainer on the page
PAGE = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "nnunet.md").read_text(), re.S)[1]
TERMS = ["instance_label", "instance_output", "center", "false_instances", "missed_instances"]
DATASET = "Dataset901_Drawn"
CASES, SIZE = 5, 32
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
LABELS = {"labels": {"background": 0, "lesion": 1, "cyst": 2}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
SHORT_TRAINERS = """
import torch
from triton_instance_loss.nnunet.trainer import {bases}

{page}


class Short:
    instance_ramp_epochs = 2

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1


class {mixed}(Short, MyTrainer):
    pass
"""


def drawn_case(generator, ignore):
    """An image (32, 32, 32) with boxes of two classes, and its labels, perhaps with a slab to be ignored."""
    labels = np.zeros((SIZE,) * 3, dtype=np.uint8)
    for label in (1, 2) * 4:
        start, size = generator.integers(2, SIZE - 8, 3), generator.integers(3, 6, 3)
        labels[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = label
    image = labels + generator.normal(0, 0.2, labels.shape)
    if ignore:
        labels[: SIZE // 4] = 3
    return image.astype(np.float32), labels


def draw_dataset(folder, dataset):
    """A dataset as nnU-Net wants it."""
    generator = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(CASES):
        image, labels = drawn_case(generator, "ignore" in dataset["labels"])
        nibabel.save(nibabel.Nifti1Image(image, AFFINE), folder / "imagesTr" / f"case_{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, AFFINE), folder / "labelsTr" / f"case_{case}.nii.gz")
    description = {"channel_names": {"0": "MRI"}, "numTraining": CASES, "file_ending": ".nii.gz", **dataset}
    (folder / "dataset.json").write_text(json.dumps(description))


def shrink(plans_file, configuration):
    """Plans with a network that trains in seconds."""
    plans = json.loads(plans_file.read_text())
    plans["configurations"][configuration]["batch_size"] = 2
    network = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4] * network["n_stages"]
    plans_file.write_text(json.dumps(plans))


def run(*command):
    """Run a command of the environment; what it prints."""
    path = Path(sys.executable).parent / command[0]
    result = subprocess.run([path, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("2d", LABELS, "nnUNetTrainerInstanceCenterLossAllLevels"), id="2d"),
        pytest.param(("3d_fullres", REGIONS, "nnUNetTrainerInstanceLoss"), id="3d"),
    ],
)
def nnunet(request, tmp_path_factory):
    """A dataset planned and preprocessed, and the variables of nnU-Net set: (results, configuration, trainer)."""
    configuration, dataset, name = request.param
    folder = tmp_path_factory.mktemp("nnunet")
    (folder / "trainers").mkdir()
    source = SHORT_TRAINERS.format(bases=", ".join(TRAINERS), mixed=MIXED, page=PAGE)
    source += "".join(f"\n\nclass {name}Short(Short, {name}):\n    pass\n" for name in TRAINERS)
    (folder / "trainers" / "short_trainers_of_the_test.py").write_text(source)
    printed = run("python", "-m", "triton_instance_loss.nnunet").strip()
    variables = {
        "nnUNet_raw": folder / "raw",
        "nnUNet_preprocessed": folder / "preprocessed",
        "nnUNet_results": folder / "results",
        "nnUNet_extTrainer": os.pathsep.join((printed, str(folder / "trainers"))),
        "nnUNet_def_n_proc": 1,
        "nnUNet_n_proc_DA": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setenv(variable, str(value))
        draw_dataset(folder / "raw" / DATASET, dataset)
        one_process = "-npfp", "1", "-np", "1"
        run(
            "nnUNetv2_plan_and_preprocess", "-d", "901", "-c", configuration, *one_process, "--verify_dataset_integrity"
        )
        shrink(folder / "preprocessed" / DATASET / "nnUNetPlans.json", configuration)
        yield folder / "results", configuration, name


def logged(results, configuration, name):
    """Train two epochs from the command line: the folder of the fold, and its log."""
    run("nnUNetv2_train", DATASET, configuration, "0", "-tr", name, "-device", "cpu")
    fold = results / DATASET / f"{name}__nnUNetPlans__{configuration}" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists()
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    return next(fold.glob("training_log_*.txt")).read_text().splitlines()


def assert_logged(log, terms, factors):
    """Each term, in each epoch, and the factor of the epochs."""
    for steps in ("train_terms", "val_terms"):
        lines = [line for line in log if steps in line]
        assert len(lines) == 2
        for line in lines:
            assert all(f"'{term}': " in line for term in terms)
            assert "nan" not in line
    assert [line.split()[-1] for line in log if "Factor" in line] == factors


def test_trains_from_the_command_line(nnunet):
    results, configuration, name = nnunet
    terms = TERMS if "Center" in name else [*TERMS, "proximity"]
    assert_logged(logged(results, configuration, f"{name}Short"), terms, ["0.0000", "0.5000"])


@pytest.mark.parametrize(
    ("wanted", "name", "term", "factor"),
    [
        ("2d", "nnUNetTrainerBlobLossShort", "BlobLoss", "0.2500"),
        ("3d_fullres", "nnUNetTrainerCCLossAllLevelsShort", "CCLoss", "0.5000"),
        ("2d", "nnUNetTrainerBiCCLossAllLevelsShort", "CCLoss", "0.5000"),
        ("3d_fullres", MIXED, "ComponentTverskyLoss", "0.1250"),
    ],
)
def test_trains_with_losses_of_components(nnunet, wanted, name, term, factor):
    results, configuration, _ = nnunet
    if configuration != wanted:
        pytest.skip(f"it is tried in {wanted}")
    assert_logged(logged(results, configuration, name), [term], ["0.0000", factor])


def test_spacing_is_that_of_the_plans(nnunet):
    """Of each level its own; labels were drawn in voxels of 1 x 2 x 3 mm."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(DATASET, nnunet[1], 0, "nnUNetTrainerCCLossAllLevels", device=torch.device("cpu"))
    trainer.initialize()
    full, scales = trainer.configuration_manager.spacing, trainer._get_deep_supervision_scales()
    assert len(set(full)) > 1
    losses = [trainer.loss.instance, *trainer.loss.coarser]
    assert [loss.loss.spacing for loss in losses] == [
        tuple(step / scale for step, scale in zip(full, of_level, strict=True)) for of_level in scales
    ]
    assert trainer.loss.level_weights == pytest.approx(trainer.loss.own.weight_factors)


def test_every_trainer_is_found(nnunet):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name in TRAINERS:
        assert recursive_find_trainer_class_by_name(name).__name__ == name


class Recorder:
    """A logger of experiments."""

    def __init__(self):
        self.seen = {}

    def log(self, key, value, step):
        self.seen[key] = value

    def update_config(self, config):
        pass


def short_epoch(configuration, name, **attributes):
    """A trainer made by nnU-Net, after a step of training and one of validation; what it logged."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(DATASET, configuration, 0, f"{name}Short", device=torch.device("cpu"))
    for attribute, value in attributes.items():
        setattr(trainer, attribute, value)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    recorder = Recorder()
    trainer.logger.loggers.append(recorder)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader._finish()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.network.parameters(), strict=True))
    assert set(recorder.seen) >= {f"{steps}_terms/{term}" for steps in ("train", "val") for term in TERMS}
    return trainer


def test_without_deep_supervision(nnunet):
    if nnunet[1] == "2d":
        pytest.skip("nothing in it depends on the dimensions; it is tried in 3D")
    trainer = short_epoch(nnunet[1], nnunet[2], enable_deep_supervision=False, instance_ramp_epochs=0)
    assert trainer.loss.level_weights is None


def test_network_may_be_compiled(nnunet, monkeypatch):
    """As on a GPU; nnU-Net never compiles on a CPU. Its loss, compiled too, runs with ours; code is not generated."""
    if nnunet[1] != "2d":
        pytest.skip("nothing in it depends on the dimensions; it is tried in 2D")
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trainer = short_epoch(nnunet[1], nnunet[2], instance_ramp_epochs=0)
    assert isinstance(trainer.network, torch._dynamo.OptimizedModule)
