"""What the benchmark itself promises: seeds, gates, rows, stages and pictures."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from triton_instance_loss import InstanceLoss, connected_components

from . import cases, labelling, measure, plot, run, stages, steps
from .entry import Case, Provider, Setup, difference
from .registry import ENTRIES, TINY_3D

CPU = Setup(torch.device("cpu"))
ROW_FIELDS = {
    *("entry", "case", "shape", "provider", "status", "detail", "rounds", "median_ms", "p20_ms", "p80_ms", "ratio_to"),
    *("ratio", "ratio_p20", "ratio_p80", "bytes", "gb_per_s", "peak_bytes", "device", "device_name", "threads", "load"),
    *("versions", "commit", "date"),
}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_seed_decides(entry):
    for case in entry.cases:
        first, again = (case.draw(case.tiny, 1) for _ in range(2))
        assert torch.equal(first.outputs, again.outputs)
        assert torch.equal(first.labels, again.labels)
        assert first.outputs.shape == first.labels.shape == case.tiny


def test_lesions_match_miss_and_invent():
    inputs = cases.lesions((1, 1, 128, 128, 128), 0)
    terms = InstanceLoss()(inputs.outputs, inputs.labels)
    assert terms.false_instances > 0
    assert terms.missed_instances > 0
    _, counts = connected_components(inputs.labels, relabel=True)
    assert counts.min() > 20  # of 30; some overlap
    assert terms.missed_instances < counts.min() / 2


def test_drawn_spiral():
    rows = ["".join(".#"[int(voxel)] for voxel in row) for row in cases.spiral(5)]
    assert rows == ["#####", "....#", "###.#", "#...#", "#####"]


@pytest.mark.parametrize("shape", [(2, 1, 9, 10), (1, 1, 6, 9, 10)])
@pytest.mark.parametrize(("draw", "components"), [(cases.comb, 1), (cases.checkerboard, 1), (cases.giant, 1)])
def test_one_component(draw, components, shape):
    mask = draw(shape, 0).outputs
    _, counts = connected_components(mask, relabel=True)
    assert counts.tolist() == [components] * shape[0]


def test_small_and_large_instances():
    small = cases.small_instances((1, 1, 128, 128, 128), 0)
    _, counts = connected_components(small.labels, relabel=True)
    assert counts.tolist() == [5000]
    assert small.labels.sum() == 25_000
    large = cases.one_instance((1, 1, 128, 128, 128), 0)
    assert large.labels.sum() == 10**6
    # Everything is predicted exactly: what the terms are can be said without computing them.
    terms = InstanceLoss()(large.outputs, large.labels)
    assert [round(term.item(), 6) for term in terms[1:]] == [0, 0, 0, 0, 0, 0]
    terms = InstanceLoss()(small.outputs, small.labels)
    assert terms.false_instances == terms.missed_instances == 5000 - 4096
    torch.testing.assert_close(terms.instance_label, torch.tensor(904 / 5000 * (1 - 1e-5 / (5 + 1e-5))))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_canonical_labels():
    labels = torch.tensor([[7, 7, 0], [0, 0, 3]])[None, None]
    assert labelling.canonical(labels)[0].tolist() == [[[[2, 2, 0], [0, 0, 6]]]]


def test_plain_dice_is_monais():
    dice = pytest.importorskip("monai.losses").DiceLoss()
    inputs = cases.lesions(TINY_3D, 0)
    counts = []
    for criterion in (dice, steps.PlainDice()):
        outputs = inputs.outputs.clone().requires_grad_()
        with stages.Counting() as counting:
            value = criterion(outputs, inputs.labels)
            value.backward()
        counts.append((value.item(), outputs.grad.sum().item(), counting.now.torch_operations))
    monais, plain = counts
    monais[2].pop("arange", None)  # MONAI makes its list of axes with one
    assert plain == monais


def test_scatter_terms_are_ours_where_nothing_is_found():
    empty = torch.full(TINY_3D, -3.0)
    some = cases.lesions(TINY_3D, 0)
    for outputs, labels in [(empty, some.labels), (some.outputs, empty * 0), (empty, empty * 0)]:
        theirs = steps.instance_terms_by_scatter(outputs, labels, labelling.by_scipy)
        ours = InstanceLoss()(outputs, labels)
        torch.testing.assert_close(theirs, (ours.instance_label, ours.instance_output))


def test_difference():
    one = torch.tensor(1.0)
    assert difference([one], [one + 1e-6]) == ""
    assert "off by" in difference([one], [one + 1e-2])
    assert "off by" in difference([one * float("nan")], [one])
    assert "wrong at 1 of 2" in difference([torch.tensor([1, 2])], [torch.tensor([1, 3])])
    assert "shape" in difference([one], [one[None]])
    assert "results" in difference([one], [one, one])


# --- rows -------------------------------------------------------------------------------------------------------------


def fake(name, value, **options):
    return Provider(name, lambda inputs, setup: lambda: value, lambda inputs, setup: [torch.ones(2)], **options)


def test_only_right_answers_are_timed():
    def crash(inputs, setup):
        raise RuntimeError("no such device")

    providers = (
        fake("right", [torch.ones(2)]),
        fake("wrong", [torch.zeros(2)]),
        fake("absent", [torch.ones(2)], needs=("no_such_module",)),
        fake("elsewhere", [torch.ones(2)], devices=("cuda",)),
        fake("slow", [torch.ones(2)], most_voxels={"cpu": 1}),
        Provider("crash", crash, None),
    )
    entry = replace(ENTRIES["step"], providers=providers, read=lambda result: result, yardsticks=("right",))
    rows = run.measure_case(entry, Case("x", TINY_3D, cases.lesions, TINY_3D), CPU, seconds=0)
    statuses = {row["provider"]: row["status"] for row in rows}
    assert list(statuses) == ["right", "wrong", "absent", "elsewhere", "slow", "crash"]
    assert list(statuses.values()) == ["timed", "differs", "absent", "absent", "too large", "failed"]
    assert all(("median_ms" in row) == (row["status"] == "timed") for row in rows)
    assert rows[1]["detail"] == "result 0 is off by 1, allowed 0.0001"
    assert rows[5]["detail"] == "RuntimeError: no such device"


def test_turns_are_fair():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.in_turns(functions, CPU.device, 0)
    assert {len(values) for values in times.values()} == {measure.LEAST_ROUNDS}
    rounds = np.array(calls[3 * measure.WARM_UP :]).reshape(-1, 3).tolist()
    assert rounds[:4] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_summary():
    times = {"yardstick": [1.0, 2.0, 4.0], "other": [3.0, 6.0, 12.0]}
    row = measure.summary(times, "yardstick")["other"]
    assert (row["median_ms"], row["ratio"], row["ratio_p20"], row["ratio_p80"]) == (6, 3, 3, 3)
    assert "ratio" not in measure.summary(times, None)["other"]


def test_peak_memory_sees_numpy_and_torch():
    def both():
        np.ones(2**22)
        torch.ones(2**23)

    peak = measure.peak_bytes(both, CPU.device)
    if peak is None:
        pytest.skip("needs Linux")
    assert 2**24 < peak < 2**27


def test_stored_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    given = ["--tiny", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    run.main(["--entry", "step_cpu", "--case", "192", *given])
    run.main(["--entry", "labelling", "--case", "spirals, 16", *given])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["entry"] for row in rows} == {"step_cpu", "labelling"}
    ours = next(row for row in rows if row["provider"] == "ours, defaults")
    assert set(ours) == ROW_FIELDS
    assert ours["status"] == "timed", ours["detail"]
    assert "ours, defaults" in capsys.readouterr().out


def test_large_cases_must_be_named(capsys):
    labelling_entry = ENTRIES["labelling"]
    names = {case.name for case in run.chosen_cases(labelling_entry, None, CPU.device, False)}
    assert "blobs, 2 x 128^3" in names
    assert "blobs, 1 x 512^3" not in names
    assert "512^3" in capsys.readouterr().err
    named = run.chosen_cases(labelling_entry, "blobs, 1 x 512", CPU.device, False)
    assert [case.name for case in named] == ["blobs, 1 x 512^3"]


def test_no_such_checkout(tmp_path):
    for name, file in (("instance_loss", "losses/InstanceLoss.py"), ("blob_loss", "blob_loss.py")):
        with pytest.raises(FileNotFoundError, match=re.escape(file)):
            run.main(["--tiny", "--device", "cpu", "--reference", f"{name}={tmp_path}"])
    with pytest.raises(ValueError, match=r"--reference must be one of instance_loss=CHECKOUT, .*, got 'blob=here'"):
        run.main(["--tiny", "--device", "cpu", "--reference", "blob=here"])


# --- stages and pictures ----------------------------------------------------------------------------------------------


def test_stages_are_counted():
    pytest.importorskip("triton")
    rows = {row["stage"]: row for row in stages.table(CPU.device, 12, 1, rounds=1, counted_side=10, held_side=10)}
    assert tuple(rows) == stages.STAGES
    assert rows["find"]["kernels"]["_activate_kernel"] == 1
    assert sum(rows["find"]["kernels"].values()) >= 4
    assert rows["sums"]["kernels"]["_sum_instances_kernel"] == 1
    assert rows["backward"]["kernels"]["_sum_instances_backward_kernel"] == 1
    assert all(row["launches"] > 0 and row["bytes_per_voxel"] > 0 for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=1e-3)


def test_host_time_is_measured_without_a_gpu(tmp_path):
    pytest.importorskip("triton", minversion="3.4")
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.host", "--seconds", "0", "--out", str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])  # a process that does not interpret kernels
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["MONAI DiceLoss"]["launches"] == 0
    assert rows["MONAI DiceLoss"]["ratio"] == 1
    assert 0 < rows["connected_components"]["launches"] < rows["WeightedSum"]["launches"]
    assert rows["WeightedSum"]["launches"] == rows["InstanceLoss, defaults"]["launches"]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.jsonl"
    run.main(["--entry", "memory", "--tiny", "--device", "cpu", "--seconds", "0", "--out", str(out)])
    run.main(
        ["--entry", "labelling", "--case", "1 %", "--tiny", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    )
    stored = [{**row, **measure.surroundings(CPU.device)} for row in stages.table(CPU.device, 12, 1, 1, 10, 10)]
    run.store(stored, out)
    plot.main([str(out), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed.png", "stages.png", "memory.png"}


def test_the_latest_run_is_drawn(tmp_path):
    rows = [{"entry": "step", "case": "x", "device": "cpu", "date": date} for date in ("2026-01-02", "2026-01-01")]
    run.store(rows, tmp_path / "rows.jsonl")
    assert plot.load([tmp_path / "rows.jsonl"]) == rows[:1]


# --- the scripts for a GPU, as far as they go without one -------------------------------------------------------------


def test_hard_masks_are_labelled_alike():
    from . import gpu_races

    for name, mask in gpu_races.masks(small=True):
        expected = gpu_races.expected_ids(mask)
        for volume, ids in zip(mask[:, 0].numpy(), expected[:, 0].numpy(), strict=True):
            labelled, count = ndimage.label(volume, np.ones((3,) * volume.ndim))
            assert len(np.unique(ids)) - (0 in ids) == count, name
            assert ((ids > 0) == (labelled > 0)).all()


def test_every_operator_on_a_small_volume():
    pytest.importorskip("triton")
    from . import gpu_small

    compared = dict(gpu_small.compare(CPU.device, "triton", ("defaults", "components given"), (1,)))
    assert list(compared.values()) == [""] * 4


def test_launches_and_bytes_do_not_grow():
    """The stored rows are the ceiling: a change that lowers them stores new ones."""
    stored = plot.load([Path(__file__).parents[1] / "bench/results/cpu.jsonl"])
    ceiling = {row["stage"]: row for row in stored if row["entry"] == "stages"}
    here, there = measure.surroundings(CPU.device)["versions"], ceiling["terms"]["versions"]
    for name in ("torch", "monai"):  # they choose the operations that their own functions are made of
        if here.get(name) != there[name]:
            pytest.skip(f"the counts are stored for {name} {there[name]}, this is {here.get(name)}")
    for row in stages.table(CPU.device, 12, 1, rounds=1, counted_side=stages.COUNTED_SIDE):
        most = ceiling[row["stage"]]
        assert row["launches"] <= most["launches"], row["stage"]
        assert row["bytes_per_voxel"] <= most["bytes_per_voxel"] + 0.1, row["stage"]
        assert row["held_bytes_per_voxel"] <= min(24, most["held_bytes_per_voxel"] + 0.1)


def test_the_pages_quote_the_stored_rows():
    """Tables of docs/performance.md as they are made, and the ratios of the README."""
    root = Path(__file__).parents[1]
    stored = plot.load([root / "bench/results/cpu.jsonl"])
    page, readme = (root / "docs/performance.md").read_text(), (root / "README.md").read_text()
    for entry in ("step_cpu", "component_losses", "step_small"):
        assert plot.table(stored, entry) in page, entry
    assert plot.counters(stored) in page
    for row in (row for row in stored if row["entry"] == "host" and row["launches"] > 0):
        name = re.escape(row["provider"].split(",")[0])
        spread = f"{row['ratio']:.2f} [{row['ratio_p20']:.2f} .. {row['ratio_p80']:.2f}]"
        assert re.search(rf"\| `{name}`[^|]* \| {row['launches']} \| {re.escape(spread)} \|", page), row["provider"]
    ratios = {}
    for row in stored:  # the latest is the last
        if row.get("case") in ("lesions 1 x 128^3", "2 x 8^3") and "ratio" in row:
            ratios[row["entry"], row["provider"]] = row["ratio"]
    shown = {
        "`WeightedSum(InstanceLoss())`": (ratios["step_cpu", "ours, defaults"], ratios["host", "WeightedSum"]),
        "`CCLoss(alpha=0.5)`": [ratios[entry, "CCLoss(alpha=0.5), BiCC"] for entry in ("component_losses", "host")],
    }
    for name in ("BlobLoss", "CCLoss", "ComponentTverskyLoss", "FalseComponentLoss"):
        shown[f"`{name}`"] = [ratios[entry, name] for entry in ("component_losses", "host")]
    for name, (on_cpu, on_host) in shown.items():
        cells = f"{on_cpu:.0f}" if on_cpu >= 10 else f"{on_cpu:.1f}", f"{on_host:.1f}"
        pattern = rf"\| {re.escape(name)}[^|]* \| {re.escape(cells[0])}[^|]* \| {re.escape(cells[1])} \|"
        assert re.search(pattern, readme), (name, cells)
