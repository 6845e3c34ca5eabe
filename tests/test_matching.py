"""What metrics can be asked beyond the defaults: numbers of output instances, strata, spacing, dilation, label maps."""

import math
import re

import numpy as np
import pytest
import stardist_answers
import torch
from scipy import ndimage
from test_metrics import LABELS, OUTPUTS, draw, instances, metrics_of, plain_metrics, random_batch

from triton_instance_loss.metrics import (
    THRESHOLDS,
    InstanceMetrics,
    aggregated_jaccard_index,
    average_precision,
    instance_metrics,
)

MATCHINGS = ("overlap", "iou", "dilated")
every_matching = pytest.mark.parametrize("matching", MATCHINGS)


def numbered(text):
    """A drawn label map as its foreground and its numbers, both (1, 1, H, W): digits, and . for the background."""
    numbers = torch.tensor([[[[int(c) if c != "." else 0 for c in row] for row in text.split()]]])
    return (numbers > 0).double(), numbers


# --- numbers of output instances

TOUCHING = numbered("1122..... 1122..... ........3")
BESIDE = numbered("1122..... 112...... .....3...")


def test_drawn_touching_outputs(backend):
    """Two nuclei that touch: one component, two instances."""
    (outputs, of_outputs), (labels, of_labels) = TOUCHING, BESIDE
    one = metrics_of(outputs, labels, backend, matching="iou")
    assert one[:5] == (2, 2, 1, 1, 1)
    ids = {"cc_output_batch": of_outputs.to(backend), "cc_label_batch": of_labels.to(backend)}
    found = metrics_of(outputs, labels, backend, matching="iou", **ids)
    assert found[:5] == (3, 3, 2, 1, 1)
    assert found.segmentation_quality == pytest.approx((1 + 3 / 4) / 2)
    found = metrics_of(outputs, labels, backend, **ids)
    assert found[:5] == (3, 3, 2, 1, 1)
    assert found.dice == pytest.approx((1 + 6 / 7) / 2)
    # Components of the labels, numbers of the outputs: both outputs together are compared with the one label.
    found = metrics_of(outputs, labels, backend, cc_output_batch=of_outputs.to(backend))
    assert found[:5] == (3, 2, 1, 1, 1)
    assert found.segmentation_quality == pytest.approx(7 / 8)


def test_output_numbers_count_where_there_is_an_output(device):
    """A number in the background is not looked at, an output without a number is in no instance."""
    outputs, labels = draw("##.## ....."), draw("##.## .....")
    numbers = torch.tensor([[[[2, 2, 9, 0, 0], [5, 5, 5, 5, 5]]]])
    found = metrics_of(outputs, labels, device, cc_output_batch=numbers.to(device))
    assert found[:5] == (1, 2, 1, 1, 0)


def test_given_components_change_nothing(backend, poison):
    outputs, labels = random_batch((5, 6, 4))
    ids = np.stack([ndimage.label(o[0] >= 0, structure=np.ones((3, 3, 3)))[0] for o in outputs.numpy()])
    given = torch.from_numpy(ids)[:, None].long() * 2**33
    for matching in MATCHINGS:
        options = {"matching": matching, "min_instance_size": 1}
        expected = instance_metrics(outputs.to(backend), labels.to(backend), **options)
        found = instance_metrics(outputs.to(backend), labels.to(backend), cc_output_batch=given.to(backend), **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_output_numbers_of_several_classes(device):
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 3, 9, 8, generator=generator).to(device)
    numbers = torch.randint(0, 3, (2, 1, 9, 8), generator=generator).to(device)
    ids = torch.randint(0, 5, (2, 1, 9, 8), generator=generator).to(device)
    options = {"num_out_chn": 3, "activation": "softmax", "spatial_dims": 2, "to_onehot_y": True}
    both = instance_metrics(outputs, numbers, object_chn=[2, 1], cc_output_batch=ids, **options)
    for column, number in enumerate((2, 1)):
        one = instance_metrics(outputs, numbers, object_chn=number, cc_output_batch=ids, **options)
        torch.testing.assert_close([value[:, column] for value in both], list(one), rtol=0, atol=0)


# --- strata of sizes, and spacing


def test_drawn_strata(backend):
    """Labels of 8, 4, 6 and 2 voxels, of which the last is missed; outputs of 6, 2, 2, 2 and 4, the last false."""
    options = {"activation": "none", "spatial_dims": 2, "sizes": (3, 6)}
    found = instance_metrics(OUTPUTS.to(backend), LABELS.to(backend), **options)
    assert all(value.shape == (1, 3) for value in found)
    strata = {name: value[0].tolist() for name, value in found._asdict().items()}
    assert strata["num_labels"] == [1, 1, 2]
    assert strata["matched"] == [0, 1, 2]
    assert strata["missed"] == [1, 0, 0]
    assert strata["sensitivity"] == [0, 1, 1]
    assert strata["num_outputs"] == [3, 1, 1]
    assert strata["false"] == [0, 1, 0]
    assert strata["precision"] == [1, 0, 1]
    assert strata["f1"] == [0, 0, 1]
    assert strata["segmentation_quality"] == pytest.approx([0, 2 / 4, (6 / 8 + 3 / 7) / 2])


@every_matching
def test_strata_add_up(backend, matching):
    outputs, labels = (volume.to(backend) for volume in random_batch((5, 6, 4)))
    whole = instance_metrics(outputs, labels, matching=matching)
    strata = instance_metrics(outputs, labels, matching=matching, sizes=[2, 4, 1e9])
    for name in InstanceMetrics._fields[:5]:
        torch.testing.assert_close(getattr(strata, name).sum(1), getattr(whole, name))
    assert not strata.num_labels[:, -1].any()
    assert (strata.num_outputs + strata.num_labels).sum(0)[:-1].count_nonzero() >= 2
    alone = instance_metrics(outputs, labels, matching=matching, sizes=[1e9])
    torch.testing.assert_close([value[:, 0] for value in alone], list(whole))


def test_strata_of_classes(device):
    outputs, labels = (volume.to(device).repeat(1, 2, 1, 1) for volume in random_batch((9, 11)))
    options = {"num_out_chn": 2, "object_chn": (0, 1), "spatial_dims": 2, "sizes": [3]}
    found = instance_metrics(outputs, labels, **options)
    assert all(value.shape == (4, 2, 2) for value in found)
    outputs[2, 1, 0, 0] = torch.nan
    found = instance_metrics(outputs, labels, **options)
    assert found.f1.isnan().any(2).tolist() == [[False, False], [False, False], [False, True], [False, False]]


def test_spacing(device):
    """Voxels of 0.5 x 0.1 x 0.1 mm: 0.005 mm^3."""
    outputs, labels = (volume.to(device) for volume in random_batch((9, 10, 8)))
    spacing = (0.5, 0.1, 0.1)
    for voxels, size in ((0, 0), (0, 0.004), (1, 0.005), (1, 0.0099), (3, 0.015)):
        expected = instance_metrics(outputs, labels, min_instance_size=voxels, sizes=(3, 7))
        found = instance_metrics(outputs, labels, spacing=spacing, min_instance_size=size, sizes=(0.015, 0.035))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    two = {"spatial_dims": 2, "activation": "none", "device": device}
    assert metrics_of(OUTPUTS, LABELS, **two, spacing=np.array([2, 3]), min_instance_size=12).num_labels == 3


# --- labels that reach farther


def test_drawn_dilated(backend):
    """One step: the two labels on the left are one, which an output beside it matches; the right one is missed."""
    labels, outputs = draw("##.#....# ......... ........."), draw("......... ......... #....#...")
    assert metrics_of(outputs, labels, backend)[:5] == (2, 3, 0, 3, 2)
    found = metrics_of(outputs, labels, backend, matching="dilated", dilation=1)
    assert found[:5] == (2, 2, 0, 2, 2)
    found = metrics_of(outputs, labels, backend, matching="dilated", dilation=2)
    assert found[:5] == (2, 1, 1, 0, 0)
    assert found[5:] == (1, 1, 1, 1, 0, 0, 0)
    # Where an output overlaps, IoU and Dice are with the label as it was, and all outputs that match.
    outputs[0, 0, 0, :3] = 1
    found = metrics_of(outputs, labels, backend, matching="dilated", dilation=1)
    assert found[:5] == (3, 2, 1, 1, 2)
    assert found.segmentation_quality == pytest.approx(2 / 4)
    assert found.dice == pytest.approx(4 / 6)


def test_a_label_in_parts_is_measured_whole(backend):
    labels, outputs = draw("#.#....## ........."), draw("#........ .........")
    options = {"matching": "dilated", "dilation": 1}
    assert metrics_of(outputs, labels, backend, **options)[:5] == (1, 2, 1, 1, 0)
    # Now the output is too small, and the labels are not: 2 voxels each.
    assert metrics_of(outputs, labels, backend, min_instance_size=1, **options)[:5] == (0, 2, 0, 2, 0)
    outputs = draw("###...... .........")
    assert metrics_of(outputs, labels, backend, min_instance_size=2, **options)[:5] == (1, 0, 0, 0, 1)
    labels = draw("#.#.#..## .........")
    assert metrics_of(outputs, labels, backend, min_instance_size=2, **options)[:5] == (1, 1, 1, 0, 0)


STEP = ndimage.generate_binary_structure(3, 2)


def test_ignored_voxels_are_background(device):
    """A label or an output there is none, whatever its number; labels may reach over them."""
    outputs, labels = draw("#....##. ........"), draw("..#..##. ........")
    ignored = draw(".#..#### ........") == 1
    numbers = torch.ones(1, 1, 2, 8, dtype=torch.int64).to(device)
    options = {"matching": "dilated", "dilation": 2, "ignore_mask": ignored.to(device)}
    found = metrics_of(outputs.masked_fill(ignored, torch.nan), labels, device, **options)
    assert found[:5] == (1, 1, 1, 0, 0)
    found = metrics_of(outputs, labels, device, cc_output_batch=numbers, **options)
    assert found[:5] == (1, 1, 1, 0, 0)


def plain_dilated(mask, truth, times, min_size):
    """One sample as the code of BraTS 2023 has it: SciPy's dilation, labels merged by it, each dilated by itself."""
    dilated, count = ndimage.label(ndimage.binary_dilation(truth, STEP, times), np.ones((3, 3, 3)))
    labels = [truth & (dilated == number) for number in range(1, count + 1)]
    labels = [label for label in labels if label.sum() > min_size]
    outputs, correct, pairs = instances(mask, min_size), set(), []
    for label in labels:
        near = ndimage.binary_dilation(label, STEP, times)
        touching = {i for i, output in enumerate(outputs) if (output & near).any()}
        correct |= touching
        if touching:
            pairs.append((label, np.any([outputs[i] for i in touching], axis=0)))
    iou, dice = (sum(of(a, b) for a, b in pairs) for of in (plain_iou, plain_dice))
    return len(outputs), len(labels), len(pairs), len(labels) - len(pairs), len(outputs) - len(correct), iou, dice


def plain_iou(a, b):
    return (a & b).sum() / (a | b).sum()


def plain_dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def sparse_batch(shape):
    """Logits and labels of four samples, some empty, with few enough instances that dilated ones stay apart."""
    random = np.random.default_rng(3)
    labels = np.stack([ndimage.gaussian_filter(random.standard_normal(shape), 1.0) for _ in range(4)])
    logits = labels + 0.05 * random.standard_normal(labels.shape)
    level = np.quantile(labels, 0.985)
    labels, logits = labels > level, np.roll(logits - np.quantile(logits, 0.985), (1, 2), (1, 2))
    logits[0], labels[1] = -1.0, False
    return torch.from_numpy(logits)[:, None], torch.from_numpy(labels)[:, None]


@pytest.mark.parametrize(
    ("backend", "shape", "dilation", "min_size"),
    [
        ("cpu", (13, 11, 12), 1, 0),
        ("cpu", (23, 17, 19), 3, 0),
        ("cpu", (13, 11, 12), 2, 4),
        ("cpu", (1, 19, 33), 2, 1),
        ("triton", (9, 7, 8), 1, 1),
    ],
    indirect=["backend"],
)
def test_dilated_equals_plain_statement(backend, poison, shape, dilation, min_size):
    outputs, labels = sparse_batch(shape)
    options = {"matching": "dilated", "dilation": dilation, "min_instance_size": min_size}
    found = instance_metrics(outputs.to(backend), labels.to(backend), **options)
    counts = []
    for n in range(len(outputs)):
        expected = plain_dilated(outputs[n, 0].numpy() >= 0, labels[n, 0].numpy(), dilation, min_size)
        counts.append(expected)
        assert [value[n].item() for value in found[:5]] == list(expected[:5]), n
        for name, total in zip(("segmentation_quality", "dice"), expected[5:], strict=True):
            empty = expected[0] + expected[1] == 0
            mean = total / expected[2] if expected[2] else float(empty)
            assert getattr(found, name)[n].item() == pytest.approx(mean, rel=1e-12)
    assert max(each[2] for each in counts) > 0
    # An image is a volume of one plane.
    if shape[0] == 1:
        flat = instance_metrics(outputs[:, :, 0].to(backend), labels[:, :, 0].to(backend), spatial_dims=2, **options)
        torch.testing.assert_close(flat, found, rtol=0, atol=0)


def test_dilated_in_a_plane_equals_scipy():
    _, labels = sparse_batch((1, 19, 33))
    from triton_instance_loss.matching import dilate

    expected = [ndimage.binary_dilation(sample, np.ones((1, 3, 3)), 2) for sample in labels[:, 0].numpy()]
    assert (dilate(labels[:, 0], 2).numpy() == expected).all()


# --- label maps


@every_matching
@pytest.mark.parametrize(("backend", "case"), [("cpu", (9, 8, 7)), ("triton", (5, 4, 3))], indirect=["backend"])
def test_output_numbers_equal_plain_statement(backend, poison, case, matching):
    """Random numbers on both sides, which touch and lie in pieces; and, dilated, on the outputs."""
    random = np.random.default_rng(5)
    labels = random.integers(0, 6, (2, *case)) * (random.random((2, *case)) < 0.3)
    outputs = np.where(random.random((2, *case)) < 0.8, labels, random.integers(0, 9, (2, *case)))
    given = [torch.from_numpy(volume)[:, None].to(backend) for volume in (outputs, labels)]
    out, lab = ((volume > 0).double() for volume in given)
    options = {"cc_output_batch": given[0], "activation": "none", "min_instance_size": 1}
    if matching != "dilated":
        options["cc_label_batch"] = given[1]
    found = torch.stack(instance_metrics(out, lab, matching=matching, dilation=1, **options), dim=1)
    for n, sample in enumerate(found.tolist()):
        sides = [instances(volume[n] > 0, 1, volume[n]) for volume in (outputs, labels)]
        if matching == "dilated":
            merged = ndimage.label(ndimage.binary_dilation(labels[n] > 0, STEP), np.ones((3, 3, 3)))[0]
            sides[1] = instances(labels[n] > 0, 1, merged)
            touched = [o for o in sides[0] if any((o & ndimage.binary_dilation(s, STEP)).any() for s in sides[1])]
            assert sample[:2] == [len(sides[0]), len(sides[1])]
            assert sample[4] == len(sides[0]) - len(touched)
        else:
            assert sample == pytest.approx(plain_metrics(*sides, matching, 0.5), rel=1e-12), n


def plain_precision(outputs, labels, threshold):
    """Of the masks of one sample."""
    matched = sum(any(plain_iou(o, j) > threshold for o in outputs) for j in labels)
    both = len(outputs) + len(labels)
    return matched / (both - matched) if both else 1.0


def plain_aji(outputs, labels):
    """Kumar's Algorithm 1, step by step."""
    part = whole = 0
    used = set()
    for label in labels:
        ious = [plain_iou(output, label) for output in outputs]
        if not ious or max(ious) == 0:
            whole += label.sum()
            continue
        best = int(np.argmax(ious))
        part += (outputs[best] & label).sum()
        whole += (outputs[best] | label).sum()
        used.add(best)
    whole += sum(output.sum() for i, output in enumerate(outputs) if i not in used)
    return part / whole if whole else 1.0


def test_drawn_aji(backend):
    """By hand. Label 1 (4) shares 2 of 6 with output 1 (4); label 2 (4) shares 2 of 6 with it, too, and 1 of 4 of 3.

    Label 3 (1) is missed, output 9 (2) is false, and output 3 (1) is not used.
    """
    outputs, of_outputs = numbered(".1.3... .1.1... ...1..9 ......9")
    labels, of_labels = numbered("11.22.. 11.22.. ....... 3......")
    labels, of_labels = labels.clone(), of_labels.clone()
    ids = {"cc_output_batch": of_outputs.to(backend), "cc_label_batch": of_labels.to(backend)}
    options = {"activation": "none", "spatial_dims": 2}
    value = aggregated_jaccard_index(outputs.to(backend), labels.to(backend), **ids, **options)
    # label 1: output 1, 2 of 6; label 2: output 1 has 1 of 7, output 3 has 1 of 4 and is taken
    assert value.item() == pytest.approx((2 + 1) / (6 + 4 + 1 + 2))
    masks = [[(m == k)[0, 0].numpy() for k in m.unique() if k > 0] for m in (of_outputs, of_labels)]
    assert plain_aji(*masks) == value.item()
    precision = average_precision(outputs.to(backend), labels.to(backend), **ids, **options)
    assert precision[0].tolist() == [0] * 10


def test_drawn_average_precision(backend):
    """IoUs of 3/4, 1 and 3/7, a label and an output alone: 2 of 6 up to 0.7, 1 of 7 then."""
    outputs, labels = draw("###..##.. ......... ........# ........."), draw("####.##.. ......... ......... #........")
    found = average_precision(outputs.to(backend), labels.to(backend), activation="none", spatial_dims=2)
    assert found[0].tolist() == pytest.approx([2 / 4] * 5 + [1 / 5] * 5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("function", [average_precision, aggregated_jaccard_index])
def test_empty_label_maps(function, device):
    something, nothing = draw("##.# ...# #...").to(device), torch.zeros(1, 1, 3, 4, device=device)
    options = {"activation": "none", "spatial_dims": 2}
    for sides, expected in (((nothing, nothing), 1), ((something, nothing), 0), ((nothing, something), 0)):
        assert (function(*sides, **options) == expected).all()
    assert (function(something, something, **options) == 1).all() or function is average_precision
    broken = torch.where(something == 1, torch.nan, 0.0)
    assert function(broken, something, **options).isnan().all()


@pytest.mark.parametrize(
    ("backend", "shape"), [("cpu", (9, 8, 7)), ("cpu", (1, 40, 50)), ("triton", (5, 6, 4))], indirect=["backend"]
)
def test_label_maps_equal_plain_statement(backend, poison, shape):
    outputs, labels = random_batch(shape)
    options = {"min_instance_size": 1}
    precision = average_precision(outputs.to(backend), labels.to(backend), iou_thresholds=(0.5, 0.6), **options)
    index = aggregated_jaccard_index(outputs.to(backend), labels.to(backend), **options)
    assert (precision.shape, index.shape) == ((4, 2), (4,))
    for n in range(4):
        sides = instances(outputs[n, 0].numpy() >= 0, 1), instances(labels[n, 0].numpy(), 1)
        expected = [plain_precision(*sides, threshold) for threshold in (0.5, 0.6)]
        assert precision[n].tolist() == pytest.approx(expected, rel=1e-12)
        assert index[n].item() == pytest.approx(plain_aji(*sides), rel=1e-12)


def test_label_maps_of_several_classes(device):
    outputs, labels = (volume.to(device).repeat(1, 2, 1, 1) for volume in random_batch((9, 11)))
    options = {"num_out_chn": 2, "spatial_dims": 2}
    outputs[:, 1] -= 0.05
    for function in (average_precision, aggregated_jaccard_index):
        both = function(outputs, labels, object_chn=(1, 0), **options)
        for column, channel in enumerate((1, 0)):
            torch.testing.assert_close(both[:, column], function(outputs, labels, object_chn=channel, **options))


def test_average_precision_is_that_of_the_counts():
    outputs, labels = random_batch((19, 23))
    found = average_precision(outputs, labels, spatial_dims=2)
    for place, threshold in enumerate(THRESHOLDS):
        counts = instance_metrics(outputs, labels, spatial_dims=2, matching="iou", iou_threshold=threshold)
        expected = counts.matched / (counts.matched + counts.missed + counts.false).clamp(min=1)
        torch.testing.assert_close(found[2:, place], expected[2:])


# --- errors

WRONG = [
    ({"dilation": 0}, ValueError, "dilation must be an integer of at least 1, got 0"),
    ({"dilation": 1.5}, TypeError, "dilation must be an integer of at least 1, got 1.5"),
    ({"sizes": 10}, TypeError, "sizes must be a sequence of ascending numbers, one at least, got 10"),
    ({"sizes": ()}, TypeError, "sizes must be a sequence of ascending numbers, one at least, got ()"),
    ({"sizes": (10, 10)}, ValueError, "sizes must be a sequence of ascending numbers, one at least, got (10, 10)"),
    ({"sizes": (0, 10)}, ValueError, "sizes[0] must be a finite number above 0, got 0"),
    ({"sizes": (1, math.inf)}, ValueError, "sizes[1] must be a finite number above 0, got inf"),
    ({"spacing": (1, 1, 1)}, ValueError, "spacing must be a positive number for each of 2 axes"),
    ({"spacing": 1.0}, TypeError, "spacing must be a positive number for each of 2 axes"),
    ({"spacing": (1, 0)}, ValueError, "spacing[1] must be a finite number above 0, got 0"),
    ({"min_instance_size": 0.5}, TypeError, "min_instance_size must be an integer of at least 0, got 0.5"),
    (
        {"min_instance_size": -0.5, "spacing": (1, 1)},
        ValueError,
        "min_instance_size must be a finite number of at leas",
    ),
    ({"matching": "dilated", "num_iterations": 3}, ValueError, "num_iterations must be None with matching='dilated', "),
    ({"matching": "dilated", "cc_label_batch": LABELS}, ValueError, "cc_label_batch must be None with matching='dilat"),
    ({"cc_output_batch": LABELS > 0}, TypeError, "cc_output_batch must hold the number of an instance at each voxel"),
    ({"cc_output_batch": -LABELS}, ValueError, "cc_output_batch must hold whole numbers >= 0, got -1"),
    ({"cc_output_batch": LABELS[..., 1:]}, ValueError, "cc_output_batch must have shape (1, 1, 7, 9) beside outputs"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_errors(wrong, error, message):
    right = {"outputs": OUTPUTS, "labels": LABELS, "activation": "none", "spatial_dims": 2}
    with pytest.raises(error, match=re.escape(message)):
        instance_metrics(**(right | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"iou_threshold": 0.5}, TypeError, "average_precision has no option iou_threshold, got 0.5"),
        ({"sizes": (3,)}, TypeError, "average_precision has no option sizes, got (3,)"),
        ({"gradients": "log"}, TypeError, "unexpected keyword argument 'gradients'"),
        ({"iou_thresholds": (0.4, 0.5)}, ValueError, "iou_thresholds[0] must be a finite number of at least 0.5"),
        ({"iou_thresholds": (0.6, 0.5)}, ValueError, "iou_thresholds must be a sequence of ascending numbers"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_of_average_precision(wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        average_precision(OUTPUTS, LABELS, activation="none", spatial_dims=2, **wrong)


def test_errors_of_the_index():
    with pytest.raises(TypeError, match="aggregated_jaccard_index has no option matching, got 'iou'"):
        aggregated_jaccard_index(OUTPUTS, LABELS, activation="none", spatial_dims=2, matching="iou")


def test_equals_stardist(device):
    """On 60 stored label maps whose instances touch, some of them empty on one side, at ten thresholds."""
    outputs, labels, answers = stardist_answers.read()
    ids = [torch.from_numpy(volume.astype(np.int32))[:, None].to(device) for volume in (outputs, labels)]
    volumes = [(numbers > 0).double() for numbers in ids]
    given = {"cc_label_batch": ids[1], "cc_output_batch": ids[0], "activation": "none", "spatial_dims": 2}
    precision = average_precision(*volumes, iou_thresholds=stardist_answers.THRESHOLDS, **given)
    np.testing.assert_allclose(precision.cpu().numpy(), answers[:, :, 3], rtol=1e-12)
    assert answers[:, :, 3].mean() > 0.2
    assert answers[:, :, 0].sum() > 1000
    for place, threshold in enumerate(stardist_answers.THRESHOLDS):
        found = instance_metrics(*volumes, matching="iou", iou_threshold=threshold, **given)
        counts, quality = (
            (found.matched, found.false, found.missed),
            (found.panoptic_quality, found.segmentation_quality),
        )
        ours = torch.stack((*counts, precision[:, place], found.f1, *quality), dim=1)
        np.testing.assert_allclose(ours.cpu().numpy(), answers[:, place], rtol=1e-6)  # (its IoUs are float32)
