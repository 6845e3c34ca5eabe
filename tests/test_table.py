"""One row an instance: drawn truths, what the table and the metrics have in common, and errors."""

import re

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_matching import MATCHINGS, numbered, sparse_batch
from test_metrics import LABELS, OUTPUTS, draw, random_batch

from triton_instance_loss.metrics import instance_metrics
from triton_instance_loss.table import FALSE, LABEL, MATCHED, MISSED, OUTPUT, SIDES, STATUSES, instance_table

DRAWN = {"activation": "none", "spatial_dims": 2}
COLUMNS = ["side", "sample", "class", "number", "size", "centre", "bounds", "status", "partner", "iou", "dice"]


def rows(table, *columns):
    return list(zip(*(table[name].tolist() for name in columns), strict=True))


def test_drawn(backend):
    table = instance_table(OUTPUTS.to(backend), LABELS.to(backend), **DRAWN)
    assert list(table) == COLUMNS
    assert {column.device.type for column in table.values()} == {"cpu"}
    assert rows(table, "side", "number", "size", "status", "partner") == [
        (LABEL, 1, 8, MATCHED, 1),
        (LABEL, 2, 4, MATCHED, 3),
        (LABEL, 3, 6, MATCHED, 4),
        (LABEL, 4, 2, MISSED, 0),
        (OUTPUT, 1, 6, MATCHED, 1),
        (OUTPUT, 2, 2, MATCHED, 3),
        (OUTPUT, 3, 2, MATCHED, 2),
        (OUTPUT, 4, 2, MATCHED, 3),
        (OUTPUT, 5, 4, FALSE, 0),
    ]
    # The third label with both of its outputs together; each of them with the label.
    assert table["iou"].tolist() == pytest.approx([6 / 8, 2 / 4, 3 / 7, 0, 6 / 8, 1 / 7, 2 / 4, 2 / 6, 0])
    assert table["dice"].tolist() == pytest.approx([12 / 14, 4 / 6, 6 / 10, 0, 12 / 14, 2 / 8, 4 / 6, 4 / 8, 0])
    assert table["centre"][:2].tolist() == [[0.5, 1.5], [3.5, 2.5]]
    assert table["bounds"][:2].tolist() == [[[0, 0], [1, 3]], [[3, 2], [4, 3]]]
    assert set(table["sample"].tolist()) == {0}
    assert set(table["class"].tolist()) == {1}


def test_names():
    assert (SIDES[LABEL], SIDES[OUTPUT]) == ("label", "output")
    assert (STATUSES[MATCHED], STATUSES[MISSED], STATUSES[FALSE]) == ("matched", "missed", "false")


def test_equal_partners(backend):
    """Of outputs that share as many voxels the first; a larger one before it."""
    labels = draw("####### ####### ....... .......")
    table = instance_table(draw("#..##.# ....... ....... .......").to(backend), labels.to(backend), **DRAWN)
    assert table["partner"].tolist() == [2, 1, 1, 1]
    table = instance_table(draw("#..#..# ....... ....... .......").to(backend), labels.to(backend), **DRAWN)
    assert table["partner"][0] == 1
    assert table["iou"][0] == 3 / 14


def test_iou(backend):
    table = instance_table(OUTPUTS.to(backend), LABELS.to(backend), matching="iou", iou_threshold=0.5, **DRAWN)
    assert table["status"].tolist() == [MATCHED, MISSED, MISSED, MISSED, MATCHED, FALSE, FALSE, FALSE, FALSE]
    assert table["partner"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert table["iou"].tolist() == pytest.approx([6 / 8, 0, 0, 0, 6 / 8, 0, 0, 0, 0])


def test_dilated(backend):
    """Two labels that are one, and an output near them that shares nothing."""
    labels, outputs = draw("##.#....# ......... ........."), draw("......... ......... #....#...")
    options = {**DRAWN, "matching": "dilated", "dilation": 2}
    table = instance_table(outputs.to(backend), labels.to(backend), **options)
    assert rows(table, "side", "size", "status", "partner", "iou") == [
        (LABEL, 4, MATCHED, 1, 0),
        (OUTPUT, 1, MATCHED, 1, 0),
        (OUTPUT, 1, MATCHED, 1, 0),
    ]
    assert table["bounds"][0].tolist() == [[0, 0], [0, 8]]
    assert table["centre"][0].tolist() == [0, 3]


def test_spacing_and_numbers(device):
    """Anisotropic voxels of 3 mm^2; label maps that touch; a voxel at the border."""
    (outputs, of_outputs), (labels, of_labels) = numbered("1122. 1122. ....3"), numbered("1122. 11.2. .....")
    options = {**DRAWN, "spacing": (2, 1.5), "cc_output_batch": of_outputs.to(device)}
    table = instance_table(outputs.to(device), labels.to(device), of_labels.to(device), **options)
    assert rows(table, "side", "number", "size", "partner") == [
        (LABEL, 1, 12, 1),
        (LABEL, 2, 9, 2),
        (OUTPUT, 1, 12, 1),
        (OUTPUT, 2, 12, 2),
        (OUTPUT, 3, 3, 0),
    ]
    assert table["centre"][0].tolist() == [1.0, 0.75]
    assert table["centre"][1].tolist() == pytest.approx([2 / 3, 8 / 3 * 1.5])
    assert table["bounds"][4].tolist() == [[2, 4], [2, 4]]
    large = instance_table(outputs.to(device), labels.to(device), min_instance_size=3, **options)
    assert large["side"].tolist() == [LABEL, OUTPUT, OUTPUT]


def test_nothing_and_everything(device):
    nothing, everything = torch.zeros(2, 1, 4, 5, 3, device=device), torch.ones(2, 1, 4, 5, 3, device=device)
    table = instance_table(nothing, nothing, activation="none")
    assert all(len(column) == 0 for column in table.values())
    assert table["centre"].shape == (0, 3)
    assert table["bounds"].shape == (0, 2, 3)
    table = instance_table(everything, nothing, activation="none")
    assert rows(table, "side", "sample", "size", "status") == [(OUTPUT, 0, 60, FALSE), (OUTPUT, 1, 60, FALSE)]
    assert table["bounds"][0].tolist() == [[0, 0, 0], [3, 4, 2]]
    table = instance_table(everything, everything, activation="none")
    assert table["iou"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("shape", [(13, 11, 12), (1, 19, 33)])
def test_adds_up_to_the_metrics(device, matching, shape):
    for batch in (random_batch(shape), sparse_batch(shape)):
        outputs, labels = (volume.to(device) for volume in batch)
        options = {"matching": matching, "dilation": 1, "min_instance_size": 1}
        found, table = instance_metrics(outputs, labels, **options), instance_table(outputs, labels, **options)
        for n in range(len(outputs)):
            mine = table["sample"] == n
            of_labels, of_outputs = mine & (table["side"] == LABEL), mine & (table["side"] == OUTPUT)
            matched = of_labels & (table["status"] == MATCHED)
            assert of_outputs.sum() == found.num_outputs[n]
            assert of_labels.sum() == found.num_labels[n]
            assert matched.sum() == found.matched[n]
            assert (mine & (table["status"] == MISSED)).sum() == found.missed[n]
            assert (mine & (table["status"] == FALSE)).sum() == found.false[n]
            if matched.any():
                assert table["iou"][matched].mean().item() == pytest.approx(found.segmentation_quality[n].item())
                assert table["dice"][matched].mean().item() == pytest.approx(found.dice[n].item())
            assert (table["partner"][mine] > 0).tolist() == (table["status"][mine] == MATCHED).tolist()


def test_geometry_equals_scipy(backend, poison):
    outputs, labels = random_batch((5, 6, 4))
    table = instance_table(outputs.to(backend), labels.to(backend), spacing=(3, 1, 0.5))
    for n, sample in enumerate(labels[:, 0].numpy()):
        mine = (table["sample"] == n) & (table["side"] == LABEL)
        numbers, count = ndimage.label(sample, np.ones((3, 3, 3)))
        centres = np.array(ndimage.center_of_mass(sample, numbers, range(1, count + 1))).reshape(count, 3) * (3, 1, 0.5)
        sizes = ndimage.sum(sample, numbers, range(1, count + 1)) * 1.5
        expected = sorted(zip(sizes.tolist(), centres.tolist(), strict=True))
        ours = sorted(zip(table["size"][mine].tolist(), table["centre"][mine].tolist(), strict=True))
        assert [size for size, _ in ours] == pytest.approx([size for size, _ in expected])
        np.testing.assert_allclose(sorted(c for _, c in ours), sorted(c for _, c in expected))


def test_classes(device):
    outputs, labels = (volume.to(device).repeat(1, 2, 1, 1) for volume in random_batch((9, 11)))
    outputs[:, 1] = -outputs[:, 1]
    options = {"num_out_chn": 2, "spatial_dims": 2}
    both = instance_table(outputs, labels, object_chn=(1, 0), **options)
    assert (both["sample"].diff() >= 0).all()
    for channel in (0, 1):
        one = instance_table(outputs, labels, object_chn=channel, **options)
        for name, column in one.items():
            torch.testing.assert_close(both[name][both["class"] == channel], column, rtol=0, atol=0)


def test_ignored_voxels(device):
    outputs, labels = (draw("##..##. ##..... .......").to(device) for _ in range(2))
    ignored = draw("....### ....... .......").to(device) == 1
    table = instance_table(outputs.masked_fill(ignored, torch.nan), labels, ignore_mask=ignored, **DRAWN)
    assert rows(table, "side", "size", "status") == [(LABEL, 4, MATCHED), (OUTPUT, 4, MATCHED)]


WRONG = [
    ({"sizes": (3,)}, TypeError, "unexpected keyword argument 'sizes'"),
    ({"gradients": "log"}, TypeError, "unexpected keyword argument 'gradients'"),
    (
        {"outputs": OUTPUTS * torch.inf},
        ValueError,
        "outputs must be finite, and labels 0 or 1, got NaN, infinity or an",
    ),
    ({"outputs": [0.0]}, TypeError, "outputs must be a torch.Tensor, got list"),
    ({"spacing": (1, 1, 1)}, ValueError, "spacing must be a positive number for each of 2 axes"),
    ({"matching": "dice"}, ValueError, "matching must be one of 'overlap', 'iou', 'dilated', got 'dice'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_errors(wrong, error, message):
    right = {"outputs": OUTPUTS, "labels": LABELS, **DRAWN}
    with pytest.raises(error, match=re.escape(message)):
        instance_table(**(right | wrong))
