"""Each example as a user runs it: as a program, on small inputs."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from reference import TERMS

ROOT = Path(__file__).parent.parent
PUBLISHED = os.environ.get("INSTANCE_LOSS_EXAMPLE")


def run_program(example, *arguments, cwd):
    """Exit code, stdout and stderr of `python examples/<example> ...` in `cwd`, with this checkout's library."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """The same in `tmp_path` and in this process, which has imported torch already."""

    def run(example, *arguments):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / example), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def printed_by(done):
    """What a run printed, which must have ended well and left stderr empty."""
    code, out, err = done
    assert (code, err) == (0, "")
    return out


def assert_fails(done, example, words):
    """One line on stderr that holds `words`, nothing on stdout, exit code 2."""
    code, out, err = done
    assert (code, out) == (2, ""), err
    assert err.startswith(f"{example}: error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def assert_picture(path, least=300):
    """A PNG of sensible size that is not blank."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert all(least <= side <= 4000 for side in pixels.shape[:2])
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def save(path, voxels, dtype=np.float32):
    """A NIfTI file."""
    nibabel.save(nibabel.Nifti1Image(np.asarray(voxels).astype(dtype), np.eye(4)), path)
    return path


@pytest.fixture
def drawn(tmp_path):
    """Two labels and three outputs, worked out by hand: label 2 is found in part, label 1 missed, two outputs false."""
    label, output = np.zeros((20, 18, 9)), np.zeros((20, 18, 9))
    label[1:3, 1:3, 1:3] = 1
    label[10:14, 10:12, 4:6] = 1
    output[12:16, 10:12, 4:6] = 0.8
    output[5, 5, 5] = 1
    output[0:2, 14:16, 0:2] = 0.5
    return save(tmp_path / "output.nii.gz", output), save(tmp_path / "label.nii.gz", label, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """One file for each thing that can be wrong, and a good label and output, (8, 7, 6)."""
    good = np.zeros((8, 7, 6))
    good[2:4, 2:4, 2:4] = 1
    save(tmp_path / "good.nii.gz", good)
    save(tmp_path / "other_shape.nii", np.zeros((8, 7, 5)))
    save(tmp_path / "line.nii.gz", np.zeros(8))
    save(tmp_path / "series.nii.gz", np.zeros((8, 7, 6, 2)))
    save(tmp_path / "classes.nii.gz", good * 3)
    save(tmp_path / "nan.nii.gz", np.where(good == 1, np.nan, 0))
    nibabel.save(nibabel.MGHImage(good.astype(np.float32), np.eye(4)), tmp_path / "good.mgz")
    (tmp_path / "text.nii.gz").write_text("not a picture")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:-40])
    return tmp_path


def test_quickstart(tmp_path):
    done = run_program("quickstart.py", "--size", 24, "--seed", 3, "--out", tmp_path / "drawn.png", cwd=tmp_path)
    printed = printed_by(done)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    for term in TERMS:
        numbers = [float(word) for word in rows[term] if word[0].isdigit()]
        value, *_, surrogate, published = numbers
        assert value >= 0
        assert surrogate > 0
        assert (published > 0) == (term == "pixel")
    assert "label 1" in printed
    assert "output 1" in printed
    assert_picture(tmp_path / "drawn.png")


def test_quickstart_writes_beside_the_caller_by_default(run_here, tmp_path):
    printed_by(run_here("quickstart.py", "--size", 16))
    assert_picture(tmp_path / "quickstart.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", 8), ("--size", "at least 16", "8")),
        (("--size", "big"), ("--size", "big")),
        (("--seed", -1), ("--seed", "-1")),
        (("--out", "nowhere/drawn.png"), ("--out", "no folder", "nowhere")),
    ],
)
def test_quickstart_errors(run_here, arguments, words):
    assert_fails(run_here("quickstart.py", *arguments), "quickstart.py", words)


def test_readme_figure(tmp_path):
    printed_by(run_program("readme_figure.py", "figure.png", cwd=tmp_path))
    assert_picture(tmp_path / "figure.png", least=700)
    assert matplotlib.image.imread(tmp_path / "figure.png").shape[1] >= 1200


def test_gradients_figure(run_here, tmp_path):
    printed_by(run_here("gradients_figure.py", "figure.png", "losses.png"))
    assert_picture(tmp_path / "figure.png", least=700)
    assert_picture(tmp_path / "losses.png", least=700)


FEW = ("--steps", 5, "--channels", 4, 8, "--arms")


@pytest.fixture
def tiny_data(monkeypatch):
    """Drawn images that are small and few."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_data

    drawn = train_data.synthetic
    monkeypatch.setattr(train_data, "synthetic", lambda dims: drawn(dims, {2: 48, 3: 24}[dims], (8, 3, 6)))
    return train_data


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.usefixtures("tiny_data")
def test_train(run_here, tmp_path, dims):
    arms = ["Dice + CE", "+ family, log", "+ BiCC", "ensemble: log, bicc", "ensemble: Dice + CE twice"]
    printed = printed_by(run_here("train.py", "--dims", dims, "--seeds", 2, *FEW, "ce", "log", "bicc", "--out", "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for picture in ("scores.png", "curves.png", "examples.png"):
        assert_picture(tmp_path / "out" / picture, least=250)
    assert (results["setting"]["dims"], results["setting"]["steps"], results["setting"]["empty"]) == (dims, 5, None)
    assert {"torch", "monai"} <= set(results["versions"])
    runs = results["runs"]
    assert [run["arm"] for run in runs] == 2 * arms[:-1] + 2 * arms[-1:]
    assert set(results["cost"]) == {"ce", "log", "bicc"}
    assert results["cost"]["ce"] == 1.0
    for run in runs:
        assert run["labels_by_size"] == runs[0]["labels_by_size"]
        assert run["recall"] == pytest.approx(sum(run["found_by_size"]) / sum(run["labels_by_size"]), abs=1e-4)
        assert run["false"] == pytest.approx(sum(run["false_by_size"]) / results["images"]["test"], abs=1e-4)
        assert [check["step"] for check in run["checked"]] in ([1, 2, 3, 4, 5], [])
    table = printed_by(run_here("train.py", "--table", "out/results.json"))
    for arm in arms:
        assert arm in printed
        assert table.count(f"\n| {arm} |") + table.startswith(f"| {arm} |") == 2


@pytest.mark.usefixtures("tiny_data")
def test_every_arm_trains(run_here, tmp_path):
    """One step each; the share of empty patches stands under the tables."""
    every = run_here("train.py", "--steps", 1, "--channels", 4, 8, "--seeds", 1, "--empty", 0.75, "--out", "out")
    printed = printed_by(every)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == len(results["setting"]["arms"]) + 1  # the ensemble
    assert "75 % of the patches empty" in " ".join(printed.split())


@pytest.mark.parametrize("kind", ["png", "tif", "nii.gz"])
def test_train_on_files(run_here, tmp_path, tiny_data, kind):
    """Images and labels under the same names; a label map may hold numbers of instances, or ones alone."""
    part = tiny_data.drawn_part(2 if kind != "nii.gz" else 3, 24, 10, seed=0)
    for side, volumes in (("images", part.images), ("labels", part.instances)):
        (tmp_path / "data" / side).mkdir(parents=True)
        for number, volume in enumerate(volumes[:, 0].numpy()):
            volume = (50 * (volume - volume.min())).astype(np.uint8) if side == "images" else volume.astype(np.uint8)
            volume = volume.clip(max=1) if side == "labels" and number == 0 else volume
            path = tmp_path / "data" / side / f"case{number}.{kind}"
            if kind == "nii.gz":
                nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
            else:
                Image.fromarray(volume).save(path)
    read = tiny_data.load(str(tmp_path / "data"), None, 2)
    assert [len(each) for each in (read.train, read.validation, read.test)] == [6, 1, 3]
    assert torch.equal((read.train.instances > 0), part.instances[:6] > 0)
    assert torch.equal(read.train.instances[1:], part.instances[1:6])
    assert len(read.train.instances[0].unique()) == len(part.instances[0].unique())
    printed = printed_by(run_here("train.py", "--data", "data", "--seeds", 1, *FEW, "ce", "cat", "--out", "out"))
    assert "data, " in printed


def test_train_on_the_public_sets(tmp_path, tiny_data):
    """Small ones in their form: which images train, which test, and that no brain is in both halves."""
    generator = np.random.default_rng(0)
    images, instances = generator.integers(0, 99, (334, 8, 8), np.uint8), generator.integers(0, 3, (334, 8, 8))
    np.savez(tmp_path / "nuclei.npz", images=images, instances=instances.astype(np.uint16))
    nuclei = tiny_data.load(str(tmp_path), None, 2)
    assert [len(each) for each in (nuclei.train, nuclei.validation, nuclei.test)] == [200, 34, 100]
    assert torch.equal(nuclei.test.instances[:, 0], torch.from_numpy(instances[234:]).int())
    shape = (90, 40, 16)
    masks = generator.random((30, *shape)) < 0.01
    brains = generator.integers(1, 255, (3, *shape), np.uint8)
    brains[:, :45] //= 2  # the left half is darker
    np.savez(
        tmp_path / "ms_lesions.npz",
        labels=np.stack([np.packbits(mask) for mask in masks]),
        shape=np.array(shape),
        patients=np.arange(1, 31),
        image_patients=np.array([7, 19, 26]),
        **dict.fromkeys(("flair", "t1", "t2"), brains),
    )
    with pytest.raises(tiny_data.DataError, match="--set must say which of the sets"):
        tiny_data.load(str(tmp_path), None, 2)
    halves = tiny_data.load(str(tmp_path), "ms_lesions", 2)
    assert halves.train.images.amax() <= 0.5 < halves.test.images.amax()
    assert len(halves.train) + len(halves.validation) == len(halves.test) == 24
    assert halves.test.images.shape[1:] == (3, 45, 40)
    right = torch.from_numpy(masks[6, 45:, :, 2][::-1].copy())
    assert torch.equal(halves.test.instances[1, 0] > 0, right)
    simulated = tiny_data.load(str(tmp_path), "ms_lesions_simulated", 2)
    assert [len(each) for each in (simulated.train, simulated.validation, simulated.test)] == [160, 32, 48]
    assert torch.equal(simulated.train.instances[9, 0] > 0, torch.from_numpy(masks[1, :, :, 2]))


def test_the_share_of_empty_patches(tiny_data):
    part = tiny_data.drawn_part(2, 96, 5, seed=0)
    for share in (0.0, 0.3, 0.9):
        patches = tiny_data.Patches(part, 24, 20, share, seed=1)
        found = torch.cat([patches()[1] for _ in range(20)])
        assert (~found.flatten(1).any(1)).float().mean() == pytest.approx(share, abs=0.07)
    again = tiny_data.Patches(part, 24, 20, 0.9, seed=1)
    assert torch.equal(again()[0], tiny_data.Patches(part, 24, 20, 0.9, seed=1)()[0])


STUDY = ROOT / "docs" / "study"


@pytest.mark.parametrize("results", sorted(path.parent.name for path in STUDY.glob("*/results.json")))
def test_the_page_quotes_the_stored_study(run_here, results):
    stored = printed_by(run_here("train.py", "--table", STUDY / results / "results.json"))
    assert stored.strip() in (ROOT / "docs" / "study.md").read_text()


def test_train_errors(run_here, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for folder in ("empty", "odd/images", "odd/labels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "odd/images/a.png").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/nuclei.npz").write_text("no numbers")
    for arguments, words in (
        (("--seeds", 0), ("--seeds", "at least 1", "0")),
        (("--dims", 4), ("--dims", "4")),
        (("--arms", "ce", "blobs"), ("--arms", "blobs", "blob")),
        (("--empty", 1), ("--empty", "at least 0 and below 1", "1.0")),
        (("--empty", "nan"), ("--empty", "at least 0 and below 1", "nan")),
        (("--channels", 8), ("--channels", "two to four", "8")),
        (("--data", "nowhere"), ("--data", "nowhere")),
        (("--data", "empty"), ("--data", "empty", "images/ and labels/")),
        (("--data", "odd"), ("--data", "a.png", "one of them alone")),
        (("--data", "broken"), ("--data", "nuclei.npz")),
        (("--data", "empty", "--set", "nuclei"), ("--set", "nuclei")),
        (("--out", "nowhere/trained"), ("--out", "nowhere")),
        (("--table", "other.json"), ("--table", "no results", "other.json")),
    ):
        assert_fails(run_here("train.py", *arguments), "train.py", words)


def test_scores_of_a_drawn_image(monkeypatch):
    """Three lesions: one found well, one by a dot, one not; and one false output of 3 x 3. And an empty image."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from train_report import curve, score

    truth, output = torch.zeros(2, 1, 30, 30, dtype=torch.int32), torch.zeros(2, 1, 30, 30)
    truth[0, 0, 2:6, 2:6], truth[0, 0, 12:14, 12:14], truth[0, 0, 20:28, 20:28] = 1, 2, 3
    output[0, 0, 2:6, 3:7] = output[0, 0, 20, 20] = 0.9
    output[0, 0, 2:5, 20:23] = 0.6
    scores = score(output, truth, (4, 20, 50))
    assert scores["dice"] == pytest.approx(2 * 13 / (84 + 26), abs=1e-4)
    assert (scores["recall"], scores["false"]) == (pytest.approx(2 / 3, abs=1e-4), 0.5)
    assert scores["f1"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["strict_f1"] == pytest.approx(2 / 6, abs=1e-4)
    assert scores["pq"] == pytest.approx(12 / 20 * 2 / 6, abs=1e-4)
    assert scores["labels_by_size"] == [0, 2, 0, 1]
    assert scores["found_by_size"] == [0, 1, 0, 1]
    assert scores["false_by_size"] == [0, 1, 0, 0]
    points = {point["threshold"]: point for point in curve(output, truth)}
    assert (points[0.5]["false"], points[0.8]["false"], points[0.8]["f1"]) == (0.5, 0.0, pytest.approx(0.8, abs=1e-4))


def test_inspect_json_holds_terms_and_instances(drawn, tmp_path):
    document = json.loads(
        printed_by(run_program("inspect_nifti.py", *drawn, "--json", "--png", "slices.png", cwd=tmp_path))
    )
    assert_picture(tmp_path / "slices.png")
    terms, instances = document["terms"], document["instances"]
    assert tuple(terms) == TERMS
    assert document["shape"] == [20, 18, 9]
    assert (terms["false_instances"], terms["missed_instances"]) == (2, 1)

    by_name = {(one["side"], one["number"]): one for one in instances}
    assert len(by_name) == len(instances) == 5
    found, false = by_name["label", 2], by_name["output", 1]
    assert (found["status"], found["size"], found["center"]) == ("matched", 16, [11.5, 10.5, 4.5])
    assert found["matched_with"] == [3]
    assert by_name["output", 3]["matched_with"] == [2]
    assert (false["status"], false["size"], false["matched_with"], false["dice"]) == (
        "false",
        8,
        [],
        pytest.approx(0, abs=1e-5),
    )
    assert by_name["label", 1]["status"] == "missed"
    # 8 voxels of 0.8 on the label; beside it they enter as 0.8 * 0.8 in the label's value, as 0.8 in the output's.
    assert found["dice"] == pytest.approx(2 * 6.4 / (6.4 + 5.12 + 16), abs=1e-6)
    assert by_name["output", 3]["dice"] == pytest.approx(2 * 6.4 / (12.8 + 16), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ("--max-outputs", 20, "--iterations", 3, "--rates", "--centroid-offset", 1),
        ("--activation", "sigmoid", "--threshold", 0.6, "--min-size", 2),
    ],
)
def test_the_instances_make_up_the_terms(run_here, tmp_path, options):
    generator = np.random.default_rng(5)
    output = generator.normal(size=(13, 11, 9)) * 2 - 1.5
    label = generator.random((13, 11, 9)) > 0.88
    files = save(tmp_path / "output.nii", output), save(tmp_path / "label.nii", label, np.int16)
    document = json.loads(printed_by(run_here("inspect_nifti.py", *files, "--json", *options)))
    instances, terms = document["instances"], document["terms"]
    for side in ("label", "output"):
        values = [1 - one["dice"] for one in instances if one["side"] == side and one["dice"] is not None]
        assert len(values) > 5
        assert np.mean(values) == pytest.approx(terms[f"instance_{side}"], abs=1e-9)

    def share(side, *status):
        mine = [one["status"] in status for one in instances if one["side"] == side]
        return np.mean(mine) if document["options"]["rates"] else sum(mine)

    assert share("output", "false", "not used") == pytest.approx(terms["false_instances"], rel=1e-6)
    assert share("label", "missed") == pytest.approx(terms["missed_instances"], rel=1e-6)


def test_inspect_prints_tables_and_says_what_is_not_used(drawn, run_here):
    printed = printed_by(run_here("inspect_nifti.py", *drawn, "--max-outputs", 1))
    for term in TERMS:
        assert term in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "label 1 missed 8 1.5, 1.5, 1.5 - 0.0000" in lines
    assert "output 2 not used 1 5.0, 5.0, 5.0 - -" in lines
    assert lines[-1].startswith("2 outputs are not used individually (beyond the cap)")


def test_inspect_images_and_empty_files(run_here, tmp_path):
    image = np.zeros((30, 20, 1))
    empty = save(tmp_path / "empty.nii.gz", image)
    image[3:9, 4:8] = 1
    filled = save(tmp_path / "filled.nii.gz", image)
    document = json.loads(printed_by(run_here("inspect_nifti.py", empty, filled, "--json", "--png", "2d.png")))
    assert document["shape"] == [30, 20]
    assert document["terms"]["missed_instances"] == 1
    assert_picture(tmp_path / "2d.png")
    document = json.loads(printed_by(run_here("inspect_nifti.py", empty, empty, "--json", "--png", "none.png")))
    assert (document["instances"], set(document["terms"].values())) == ([], {0.0})
    assert_picture(tmp_path / "none.png")


def test_inspect_warns_of_files_in_different_spaces(drawn, run_here):
    image = nibabel.load(drawn[0])
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), np.diag((1, 1, 2, 1))), drawn[0].parent / "moved.nii")
    code, out, err = run_here("inspect_nifti.py", "moved.nii", drawn[1], "--json")
    assert code == 0
    assert tuple(json.loads(out)["terms"]) == TERMS
    assert err == "inspect_nifti.py: warning: the affines differ; voxels are compared by their index\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.nii.gz", "good.nii.gz"), ("output", "no file", "absent.nii.gz")),
        (("good.nii.gz", "absent.nii.gz"), ("label", "no file", "absent.nii.gz")),
        (("text.nii.gz", "good.nii.gz"), ("output", "not a readable NIfTI file", "text.nii.gz")),
        (("cut.nii.gz", "good.nii.gz"), ("output", "not a readable NIfTI file", "cut.nii.gz")),
        (("good.nii.gz", "good.mgz"), ("label", "not NIfTI", "MGHImage")),
        (("good.nii.gz", "other_shape.nii"), ("one shape", "(8, 7, 6)", "(8, 7, 5)")),
        (("series.nii.gz", "good.nii.gz"), ("output", "2D or 3D", "(8, 7, 6, 2)")),
        (("line.nii.gz", "good.nii.gz"), ("output", "2D or 3D", "(8,)")),
        (("good.nii.gz", "classes.nii.gz"), ("label", "only 0 (background) and 1 (foreground)", "got 3")),
        (("nan.nii.gz", "good.nii.gz"), ("output", "finite", "NaN", "8 voxels")),
        (("good.nii.gz", "good.nii.gz", "--iterations", 0), ("--iterations", "at least 1", "0")),
        (("good.nii.gz", "good.nii.gz", "--png", "nowhere/a.png"), ("--png", "no folder", "nowhere")),
        (("good.nii.gz",), ("required", "label")),
    ],
)
def test_inspect_errors(folder, run_here, arguments, words):
    assert_fails(run_here("inspect_nifti.py", *arguments), "inspect_nifti.py", words)


def test_inspect_errors_as_a_program(folder):
    done = run_program("inspect_nifti.py", "good.nii.gz", "other_shape.nii", "--json", cwd=folder)
    assert_fails(done, "inspect_nifti.py", ("one shape", "(8, 7, 6)", "(8, 7, 5)"))


@pytest.mark.skipif(
    not PUBLISHED,
    reason="the environment variable INSTANCE_LOSS_EXAMPLE names no folder with output-0.nii.gz and label-0.nii.gz",
)
def test_published_example(run_here):
    """The table that the authors' notebook prints for their example."""
    data = Path(PUBLISHED).resolve()
    files = data / "output-0.nii.gz", data / "label-0.nii.gz"
    options = ("--activation", "none", "--iterations", 250, "--rates", "--json")
    terms = json.loads(printed_by(run_here("inspect_nifti.py", *files, *options)))["terms"]
    published = (0.4587, 0.4786, 0.6545, 0.5793, 0.2500, 0.2000, 6.9283)
    assert [round(value, 4) for value in terms.values()] == list(published)


@pytest.mark.skipif(
    not PUBLISHED,
    reason="the environment variable INSTANCE_LOSS_EXAMPLE names no folder with output-0.nii.gz and label-0.nii.gz",
)
def test_the_page_of_two_files(run_here, tmp_path):
    """The command of docs/files.md prints what stands there."""
    command, shown = re.findall(r"^```(?:bash)?\n(.*?)^```", (ROOT / "docs" / "files.md").read_text(), re.M | re.S)
    for name in ("output-0.nii.gz", "label-0.nii.gz"):
        shutil.copy(Path(PUBLISHED) / name, tmp_path / name)
    _, program, *arguments = command.split()
    printed = printed_by(run_here(Path(program).name, *arguments))
    assert [line.strip() for line in shown.splitlines() if line] == [
        line.strip() for line in printed.splitlines() if line.strip()
    ][: len([line for line in shown.splitlines() if line])]
    assert_picture(tmp_path / "slices.png")
