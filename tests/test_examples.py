"""Each example as a user runs it: as a program, on small inputs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
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
    printed_by(run_here("gradients_figure.py", "figure.png"))
    assert_picture(tmp_path / "figure.png", least=700)


@pytest.mark.parametrize("dims", [2, 3])
def test_train_synthetic(run_here, tmp_path, dims):
    printed = printed_by(run_here("train_synthetic.py", "--quick", "--dims", dims, "--seeds", 2, "--out", "trained"))
    results = json.loads((tmp_path / "trained" / "results.json").read_text())
    for picture in ("training.png", "training_example.png"):
        assert_picture(tmp_path / "trained" / picture)
    setting, runs = results["setting"], results["runs"]
    assert (setting["dims"], setting["steps"]) == (dims, 4)
    assert {"torch", "monai"} <= set(results["versions"])
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    assert [run["arm"] for run in runs] == 2 * arms[:-1] + arms[-1:]  # two runs make one pair
    for run in runs:
        assert run["labels_by_size"] == runs[0]["labels_by_size"]
        assert run["recall"] == pytest.approx(sum(run["found_by_size"]) / sum(run["labels_by_size"]), abs=1e-4)
        assert run["false_per_image"] == pytest.approx(sum(run["false_by_size"]) / setting["test_images"], abs=1e-4)
    table = printed_by(run_here("train_synthetic.py", "--table", "trained/results.json"))
    for arm in arms:
        assert arm in printed
        assert table.count(f"\n| {arm} |") + table.startswith(f"| {arm} |") == 2


def test_train_synthetic_on_empty_images(run_here, tmp_path):
    """The share is in the stored setting and under the tables; arms are Dice + CE and the terms added to it."""
    arguments = ("--quick", "--seeds", 1, "--steps", 2, "--empty", 0.75, "--out", "trained")
    printed = printed_by(run_here("train_synthetic.py", *arguments))
    results = json.loads((tmp_path / "trained" / "results.json").read_text())
    assert results["setting"]["empty"] == 0.75
    arms = [run["arm"] for run in results["runs"]]
    assert arms[:3] == ["Dice + CE", "Dice + CE + terms", "Dice + CE + terms, log"]
    assert all(sum(run["labels_by_size"]) > 0 for run in results["runs"])
    assert "75 % of the training images empty" in " ".join(printed.split())
    assert all(arm in printed for arm in arms)
    for picture in ("training.png", "training_example.png"):
        assert_picture(tmp_path / "trained" / picture)


def test_the_share_of_empty_images(monkeypatch):
    """Of 10 images; one always has lesions, and without empty images they are those of before there was a choice."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_synthetic

    chosen = train_synthetic.setting(2, 1, None, True, 0.0)
    images, labels = train_synthetic.dataset(chosen, 10, seed=0)
    assert labels.flatten(1).any(1).all()
    assert labels[0].sum() == 221
    for share, without in ((0.5, 5), (0.8, 8), (0.99, 9)):
        background, drawn = train_synthetic.dataset(chosen, 10, seed=0, empty=share)
        assert (~drawn.flatten(1).any(1)).sum() == without
        assert background.shape == images.shape
        assert background[:without].amax() < images.amax()


@pytest.mark.parametrize("results", ["results.json", "steps_900/results.json", "empty/results.json"])
def test_the_page_quotes_the_stored_training(run_here, results):
    page = ROOT / "docs" / "training.md"
    stored = printed_by(run_here("train_synthetic.py", "--table", page.parent / "training" / results))
    assert stored in page.read_text()


def test_train_synthetic_errors(run_here, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for arguments, words in (
        (("--seeds", 0), ("--seeds", "at least 1", "0")),
        (("--dims", 4), ("--dims", "4")),
        (("--empty", 1), ("--empty", "at least 0 and below 1", "1.0")),
        (("--empty", -0.1), ("--empty", "at least 0 and below 1", "-0.1")),
        (("--empty", "nan"), ("--empty", "at least 0 and below 1", "nan")),
        (("--out", "nowhere/trained"), ("--out", "nowhere")),
        (("--table", "other.json"), ("--table", "no results", "other.json")),
    ):
        assert_fails(run_here("train_synthetic.py", *arguments), "train_synthetic.py", words)


def test_scores_of_a_drawn_image(monkeypatch):
    """Three lesions: one found well, one by a dot, one not; and one false output of 3 x 3."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from train_report import score

    truth, output = np.zeros((2, 1, 30, 30), dtype=bool)
    truth[0, 2:6, 2:6] = truth[0, 12:14, 12:14] = truth[0, 20:28, 20:28] = True
    output[0, 2:6, 3:7] = output[0, 20, 20] = output[0, 2:5, 20:23] = True
    scores = score(output, truth)
    assert scores["dice"] == pytest.approx(2 * 13 / (84 + 26), abs=1e-4)
    assert (scores["recall"], scores["false_per_image"]) == (pytest.approx(2 / 3, abs=1e-4), 1)
    assert scores["f1"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["strict_f1"] == pytest.approx(2 / 6, abs=1e-4)
    assert scores["labels_by_size"] == [1, 1, 0, 1]
    assert scores["found_by_size"] == [0, 1, 0, 1]
    assert scores["outputs_by_size"] == [1, 2, 0, 0]
    assert scores["false_by_size"] == [0, 1, 0, 0]


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
