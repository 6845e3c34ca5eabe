"""`InstanceMetric`: what it accumulates over batches and processes, and inside torchmetrics."""

import pickle

import pytest
import ranks
import torch
from test_metrics import LABELS, OUTPUTS, draw, random_batch

from triton_instance_loss.metrics import InstanceMetrics, instance_metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="its metric needs torchmetrics")
from triton_instance_loss.torchmetrics import InstanceMetric  # noqa: E402

DRAWN = {"activation": "none", "spatial_dims": 2}
both_averages = pytest.mark.parametrize("average", ["instances", "samples"])


def close(found, expected, **close):
    torch.testing.assert_close(found, expected, check_dtype=False, **close)


def test_drawn_pooled():
    """Three of four labels and four of five outputs match; then one of one, and one output of two."""
    metric = InstanceMetric(**DRAWN)
    metric.update(OUTPUTS, LABELS)
    metric.update(draw("##.# ...."), draw("##.. ...."))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert list(found) == list(InstanceMetrics._fields)
    assert list(found.values())[:5] == [7, 5, 4, 1, 2]
    assert (found["sensitivity"], found["precision"]) == pytest.approx((4 / 5, 5 / 7))
    assert found["f1"] == pytest.approx(2 * (4 / 5) * (5 / 7) / (4 / 5 + 5 / 7))
    assert found["segmentation_quality"] == pytest.approx((6 / 8 + 2 / 4 + 3 / 7 + 1) / 4)
    assert found["panoptic_quality"] == pytest.approx(found["segmentation_quality"] * 4 / (4 + 3 / 2))


def test_a_sample_is_what_instance_metrics_says(device):
    outputs, labels = (volume.to(device) for volume in random_batch((19, 23)))
    for n in range(4):
        for average in ("instances", "samples"):
            metric = InstanceMetric(spatial_dims=2, matching="iou", average=average).to(device)
            metric.update(outputs[n : n + 1], labels[n : n + 1])
            expected = instance_metrics(outputs[n : n + 1], labels[n : n + 1], spatial_dims=2, matching="iou")
            close(metric.compute(), {name: value[0] for name, value in expected._asdict().items()})


def test_mean_over_samples(device):
    outputs, labels = (volume.to(device) for volume in random_batch((19, 23)))
    metric = InstanceMetric(spatial_dims=2, average="samples").to(device)
    for samples in (slice(0, 3), slice(3, 4)):
        metric.update(outputs[samples], labels[samples])
    expected = instance_metrics(outputs, labels, spatial_dims=2)
    close(metric.compute(), {name: value.mean() for name, value in expected._asdict().items()})


@both_averages
def test_classes_and_strata_keep_their_axes(average):
    outputs, labels = (volume.repeat(1, 2, 1, 1) for volume in random_batch((9, 11)))
    options = {"num_out_chn": 2, "object_chn": (1, 0), "spatial_dims": 2, "sizes": (3,), "average": average}
    whole, halves = InstanceMetric(**options), InstanceMetric(**options)
    whole.update(outputs, labels)
    for samples in (slice(0, 1), slice(1, 4)):
        batch = halves(outputs[samples], labels[samples])  # of this batch alone
        assert batch["f1"].shape == (2, 2)
    close(halves.compute(), whole.compute())
    first = InstanceMetric(num_out_chn=2, object_chn=1, spatial_dims=2, average=average, sizes=(3,))
    first.update(outputs, labels)
    close({name: value[0] for name, value in whole.compute().items()}, first.compute())
    halves.reset()
    assert halves.compute()["num_labels"].nan_to_num().sum() == 0


@both_averages
def test_two_processes(average, tmp_path):
    images, labels = ranks.joint_batch("cpu")
    metric = InstanceMetric(average=average, sizes=(20,))
    metric.update(images, labels)
    assert metric.compute()["matched"].sum() > 0
    for found in ranks.run_ranks(ranks.metrics_of_halves, tmp_path, average):
        close(found, metric.compute())


@both_averages
def test_what_is_broken_shows(average):
    metric = InstanceMetric(average=average, **DRAWN)
    metric.update(OUTPUTS, LABELS)
    metric.update(OUTPUTS * torch.nan, LABELS)
    metric.update(OUTPUTS, LABELS)
    assert all(value.isnan() for value in metric.compute().values())


def test_given_numbers_and_ignored_voxels():
    outputs, labels = draw("##..##. ##....."), draw("##..##. ##.....")
    numbers = torch.tensor([[[[1, 2, 0, 0, 5, 5, 0], [1, 2, 0, 0, 0, 0, 0]]]])
    metric = InstanceMetric(**DRAWN)
    metric.update(outputs, labels, numbers, cc_output_batch=numbers, ignore_mask=draw("....### .......") == 1)
    assert [metric.compute()[name].item() for name in ("num_outputs", "num_labels", "matched")] == [2, 2, 2]


def test_inside_torchmetrics():
    collection = torchmetrics.MetricCollection(
        {"lesion": InstanceMetric(**DRAWN), "panoptic": InstanceMetric(matching="iou", **DRAWN)}
    )
    collection.update(OUTPUTS, LABELS)
    assert collection.compute()["lesion_matched"] == 3
    assert collection.compute()["panoptic_matched"] == 1
    again = pickle.loads(pickle.dumps(collection))
    again.update(OUTPUTS, LABELS)
    assert again.compute()["lesion_matched"] == 6


def test_a_collection_does_not_take_two_for_one():
    """As it does with metrics whose states are equal after the first batch."""
    metrics = {matching: InstanceMetric(matching=matching, **DRAWN) for matching in ("overlap", "iou")}
    collection = torchmetrics.MetricCollection(metrics)
    collection.update(LABELS, LABELS)
    collection.update(OUTPUTS, LABELS)
    assert (collection.compute()["overlap_matched"], collection.compute()["iou_matched"]) == (7, 5)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"average": "macro"}, ValueError, "average must be one of 'instances', 'samples', got 'macro'"),
        ({"sizes": 3}, TypeError, "sizes must be a sequence of ascending numbers, one at least, got 3"),
        ({"matching": "dice"}, ValueError, "matching must be one of 'overlap', 'iou', 'dilated', got 'dice'"),
        ({"gradients": "log"}, TypeError, "unexpected keyword argument 'gradients'"),
    ],
    ids=str,
)
def test_errors(wrong, error, message):
    with pytest.raises(error, match=message):
        InstanceMetric(**wrong)


def test_without_torchmetrics(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "triton_instance_loss.torchmetrics")
    with pytest.raises(ImportError, match=r"pip install 'triton_instance_loss\[torchmetrics\]'"):
        importlib.import_module("triton_instance_loss.torchmetrics")
