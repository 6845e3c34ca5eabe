"""Instance metrics: drawn truths, a plain statement with SciPy, panoptica's answers, edges and errors."""

import inspect
import math
import re

import numpy as np
import panoptica_answers
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from triton_instance_loss.metrics import InstanceMetrics, instance_metrics
from triton_instance_loss.options import Options

MATCHINGS = ("overlap", "iou")
both_matchings = pytest.mark.parametrize("matching", MATCHINGS)


def draw(text):
    """A drawn image as (1, 1, H, W): # is foreground."""
    return torch.tensor([[[[float(c == "#") for c in row] for row in text.split()]]])


def metrics_of(outputs, labels, device="cpu", **options):
    """Metrics of drawn images of one sample, as numbers."""
    options = {"activation": "none", "spatial_dims": 2} | options
    metrics = instance_metrics(outputs.to(device), labels.to(device), **options)
    return InstanceMetrics(*(value.item() for value in metrics))


# In id order. Outputs: three quarters of the first label; half of the second; two that touch the third, one of them
# with a voxel outside; one that touches nothing. The fourth label is missed.
LABELS = draw("####..... ####..... ......... ..##..### ..##..### ......... ##.......")
OUTPUTS = draw("###...... ###...... ........# ..#...#.# ..#...#.. ......... .....####")


def test_drawn_overlap(backend):
    found = metrics_of(OUTPUTS, LABELS, backend)
    assert (found.num_outputs, found.num_labels) == (5, 4)
    assert (found.matched, found.missed, found.false) == (3, 1, 1)
    assert (found.sensitivity, found.precision) == pytest.approx((3 / 4, 4 / 5))
    assert found.f1 == pytest.approx(2 * (3 / 4) * (4 / 5) / (3 / 4 + 4 / 5))
    assert found.recognition_quality == pytest.approx(3 / (3 + 1 / 2 + 1 / 2))
    # The third label is compared with both outputs together: 4 voxels, 3 of them among its 6.
    quality = (6 / 8 + 2 / 4 + 3 / 7) / 3
    assert found.segmentation_quality == pytest.approx(quality)
    assert found.panoptic_quality == pytest.approx(3 / 4 * quality)
    assert found.dice == pytest.approx((12 / 14 + 4 / 6 + 6 / 10) / 3)


def test_drawn_iou(backend):
    found = metrics_of(OUTPUTS, LABELS, backend, matching="iou")
    assert (found.num_outputs, found.num_labels) == (5, 4)
    # The second label has an IoU of exactly one half, which is not above it.
    assert (found.matched, found.missed, found.false) == (1, 3, 4)
    assert (found.sensitivity, found.precision) == pytest.approx((1 / 4, 1 / 5))
    assert (found.f1, found.recognition_quality) == pytest.approx((2 / 9, 2 / 9))
    assert found.segmentation_quality == pytest.approx(6 / 8)
    assert found.panoptic_quality == pytest.approx(2 / 9 * 6 / 8)
    assert found.dice == pytest.approx(12 / 14)


def test_drawn_one_output_on_two_labels(backend):
    outputs, labels = draw("########"), draw("##.#####")
    found = metrics_of(outputs, labels, backend)
    assert (found.matched, found.missed, found.false, found.precision) == (2, 0, 0, 1)
    assert found.segmentation_quality == pytest.approx((2 / 8 + 5 / 8) / 2)
    found = metrics_of(outputs, labels, backend, matching="iou")
    assert (found.matched, found.missed, found.false, found.precision) == (1, 1, 0, 1)
    assert found.segmentation_quality == pytest.approx(5 / 8)
    # The same the other way round.
    found = metrics_of(labels, outputs, backend, matching="iou")
    assert (found.matched, found.missed, found.false, found.sensitivity) == (1, 0, 1, 1)
    assert found.segmentation_quality == pytest.approx(5 / 8)


def test_threshold():
    assert metrics_of(OUTPUTS, LABELS, matching="iou", iou_threshold=0.74).matched == 1
    at_most = metrics_of(OUTPUTS, LABELS, matching="iou", iou_threshold=0.75)
    assert (at_most.matched, at_most.segmentation_quality, at_most.dice, at_most.panoptic_quality) == (0, 0, 0, 0)
    assert metrics_of(OUTPUTS, LABELS, iou_threshold=0.75).matched == 3  # not used


@both_matchings
def test_drawn_empty(device, matching):
    something, nothing = draw("##.# ...# #..."), torch.zeros(1, 1, 3, 4)
    options = {"device": device, "matching": matching}
    ratios = ("recognition_quality", "f1", "segmentation_quality", "panoptic_quality", "dice")

    found = metrics_of(nothing, nothing, **options)
    assert found[:5] == (0, 0, 0, 0, 0)
    assert found[5:] == (1,) * 7

    found = metrics_of(nothing, something, **options)
    assert found[:5] == (0, 3, 0, 3, 0)
    assert (found.sensitivity, found.precision) == (0, 1)
    assert [getattr(found, name) for name in ratios] == [0] * 5

    found = metrics_of(something, nothing, **options)
    assert found[:5] == (3, 0, 0, 0, 3)
    assert (found.sensitivity, found.precision) == (1, 0)
    assert [getattr(found, name) for name in ratios] == [0] * 5

    # Something on both sides that never meets.
    found = metrics_of(something, draw(".... .... ...#"), **(options | {"min_instance_size": 1}))
    assert found[:5] == (2, 0, 0, 0, 2)
    found = metrics_of(draw("##.. .... ...."), draw(".... .... ...#"), **options)
    assert found == (1, 1, 0, 1, 1, *[0] * 7)


# The same stated plainly: one sample, instances as boolean masks, loops over all pairs, Python's numbers.


def instances(mask, min_size=0, ids=None):
    """Masks of the components of a mask, or of the given ids inside it, of more than `min_size` voxels."""
    ids = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))[0] if ids is None else ids * mask
    return [ids == name for name in np.unique(ids) if name > 0 and (ids == name).sum() > min_size]


def plain_metrics(outputs, labels, matching, threshold):
    """The metrics of one sample from the masks of its instances."""
    pairs = []  # (label, what it is compared with)
    correct = set()
    for label in labels:
        touching = {i for i, output in enumerate(outputs) if (output & label).any()}
        if matching == "overlap":
            correct |= touching
            if touching:
                pairs.append((label, np.any([outputs[i] for i in touching], axis=0)))
        for i in touching if matching == "iou" else ():
            if (outputs[i] & label).sum() / (outputs[i] | label).sum() > threshold:
                correct.add(i)
                pairs.append((label, outputs[i]))
    matched, missed, false = len(pairs), len(labels) - len(pairs), len(outputs) - len(correct)
    sensitivity = matched / len(labels) if labels else 1.0
    precision = len(correct) / len(outputs) if outputs else 1.0
    f1 = 2 * sensitivity * precision / (sensitivity + precision) if sensitivity + precision else 0.0
    recognition = quality = dice = 0.0 if labels or outputs else 1.0
    if matched:
        recognition = matched / (matched + (false + missed) / 2)
        quality = sum((a & b).sum() / (a | b).sum() for a, b in pairs) / matched
        dice = sum(2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs) / matched
    counts = (len(outputs), len(labels), matched, missed, false)
    return (*counts, sensitivity, precision, f1, recognition, quality, recognition * quality, dice)


def random_batch(shape):
    """Logits and labels of four samples: one without outputs, one without labels, two that overlap."""
    random = np.random.default_rng(0)
    fields = np.stack([ndimage.gaussian_filter(random.standard_normal(shape), 0.8) for _ in range(4)])
    labels = fields > np.quantile(fields, 0.8)
    logits = fields + 0.05 * random.standard_normal(fields.shape) - np.quantile(fields, 0.8)
    logits[0] = -1.0
    labels[1] = False
    return torch.from_numpy(logits)[:, None], torch.from_numpy(labels)[:, None]


def given_ids(labels):
    """Large ids: components, less a plane that has none, and all in another plane as one instance."""
    found = np.stack([ndimage.label(sample, structure=np.ones((3, 3, 3)))[0] for sample in labels[:, 0].numpy()])
    ids = torch.from_numpy(found)[:, None].long() * 2**33
    ids[:, :, :, 4], ids[:, :, :, 0] = 0, 7
    return ids


CASES = {
    "3d": ((5, 6, 4), {}),
    "2d": ((19, 23), {"spatial_dims": 2}),
    "options": ((9, 10, 8), {"min_instance_size": 2, "segmentation_threshold": 0.51, "iou_threshold": 0.6}),
    "ids": ((6, 7, 5), {"min_instance_size": 1}),
}
# Triton's interpreter takes about a second a sample.
INTERPRETED = ("3d",) if not torch.cuda.is_available() else tuple(CASES)


@both_matchings
@pytest.mark.parametrize(
    ("backend", "case"),
    [(backend, case) for backend in ("cpu", "triton") for case in (CASES if backend == "cpu" else INTERPRETED)],
    indirect=["backend"],
)
def test_equals_plain_statement(backend, poison, case, matching):
    shape, options = CASES[case]
    outputs, labels = random_batch(shape)
    ids = given_ids(labels) if case == "ids" else None
    on_device = (None if value is None else value.to(backend) for value in (outputs, labels, ids))
    found = torch.stack(instance_metrics(*on_device, matching=matching, **options), dim=1)
    foreground = (outputs.sigmoid() >= options.get("segmentation_threshold", 0.5)).numpy()[:, 0]
    matched = []
    for n, sample in enumerate(found.tolist()):
        size = options.get("min_instance_size", 0)
        given = None if ids is None else ids[n, 0].numpy()
        sides = instances(foreground[n], size), instances(labels[n, 0].numpy(), size, given)
        expected = plain_metrics(*sides, matching, options.get("iou_threshold", 0.5))
        assert sample == pytest.approx(expected, rel=1e-12), n
        matched.append(expected[2])
    assert max(matched) > 0


def test_equals_panoptica(device):
    """On 100 stored volumes, where both are not empty; there panoptica has NaN."""
    outputs, labels, answers = panoptica_answers.read()
    volumes = (torch.from_numpy(volume)[:, None].to(device) for volume in (outputs, labels))
    found = instance_metrics(*(volume.double() for volume in volumes), matching="iou", activation="none")
    ours = torch.stack([getattr(found, name) for name in panoptica_answers.NAMES.values()], dim=1).cpu().numpy()
    empty = ~outputs.any((1, 2, 3)) & ~labels.any((1, 2, 3))
    assert empty.sum() == 1
    assert answers[~empty, 2].max() > 5
    np.testing.assert_allclose(ours[~empty], answers[~empty], rtol=1e-12)
    np.testing.assert_array_equal(ours[empty], [[0, 0, 0, 0, 0, 1, 1, 1, 1]])


@both_matchings
def test_several_channels(device, matching):
    outputs, labels = random_batch((9, 11))
    options = {"spatial_dims": 2, "matching": matching}
    expected = instance_metrics(outputs.to(device), labels.to(device), **options)
    two = torch.cat((torch.zeros_like(outputs), outputs), dim=1).to(device)
    both_labels = torch.cat((~labels, labels), dim=1).to(device)
    for activation in ("softmax", "sigmoid"):
        found = instance_metrics(two, both_labels, activation=activation, num_out_chn=2, **options)
        torch.testing.assert_close(found, expected)


@both_matchings
def test_a_column_for_each_of_several_classes(device, matching):
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 3, 9, 8, 7, generator=generator).to(device)
    numbers = torch.randint(0, 3, (2, 1, 9, 8, 7), generator=generator).to(device)
    options = {"num_out_chn": 3, "activation": "softmax", "matching": matching, "to_onehot_y": True}
    both = instance_metrics(outputs, numbers, object_chn=[2, 1], **options)
    for column, number in enumerate((2, 1)):
        one = instance_metrics(outputs, numbers, object_chn=number, **options)
        for several, single in zip(both, one, strict=True):
            assert several.shape == (2, 2)
            assert torch.equal(several[:, column], single)


@both_matchings
def test_ignored_voxels_are_background(device, matching):
    outputs, labels = (draw("##..##. ##..... .......").to(device) for _ in range(2))
    ignored = draw("....### ....... .......").to(device) == 1
    options = {"activation": "none", "spatial_dims": 2, "matching": matching}
    found = instance_metrics(outputs.masked_fill(ignored, torch.nan), labels, ignore_mask=ignored, **options)
    assert (found.num_outputs.item(), found.num_labels.item(), found.matched.item()) == (1, 1, 1)
    found = instance_metrics(outputs, labels.masked_fill(ignored, 255), ignore_index=255, **options)
    assert (found.num_outputs.item(), found.num_labels.item(), found.matched.item()) == (1, 1, 1)


def test_all_outputs_count(backend):
    """Also where a loss would use none of them."""
    outputs, labels = torch.zeros(2, 1, 1, 5, 35)
    outputs[..., ::2, ::2] = 1
    labels[..., 4, 34] = 1
    found = metrics_of(outputs, labels, backend)
    assert found[:5] == (54, 1, 1, 0, 53)


@both_matchings
def test_rounds_of_pooling(device, matching):
    """A line of five voxels falls into the largest index within two steps: voxels 3, 4 and 5 share one."""
    outputs, labels = draw("#####.. ......."), draw("..###.. .......")
    found = metrics_of(outputs, labels, device, num_iterations=2, matching=matching)
    assert found[:5] == (3, 1, 1, 0, 2)
    assert found.segmentation_quality == 1
    assert metrics_of(outputs, labels, device, matching=matching)[:5] == (1, 1, 1, 0, 0)


@both_matchings
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_not_finite(matching, activation, bad, device):
    outputs, labels = random_batch((19, 23))
    channels = 2 if activation == "softmax" else 1
    outputs = outputs.repeat(1, channels, 1, 1)
    outputs[1, 0, 3, 3] = bad
    options = {"spatial_dims": 2, "num_out_chn": channels, "activation": activation, "matching": matching}
    found = torch.stack(instance_metrics(outputs.to(device), labels.to(device), **options), dim=1)
    assert found.isnan().all(1).tolist() == [False, True, False, False]
    assert not found[[0, 2, 3]].isnan().any()


@both_matchings
def test_large_finite_outputs(matching, device):
    outputs, labels = random_batch((19, 23))
    options = {"spatial_dims": 2, "matching": matching}
    expected = instance_metrics(outputs.to(device), labels.to(device), **options)
    found = instance_metrics(torch.sign(outputs).to(device) * 3e38, labels.to(device), **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_comes_back(dtype, device):
    outputs, labels = OUTPUTS.to(device, dtype).requires_grad_(), LABELS.to(device, torch.uint8)
    expected = instance_metrics(OUTPUTS.double(), LABELS, activation="none", spatial_dims=2)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for given in ((outputs, labels), (MetaTensor(outputs), MetaTensor(labels))):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = instance_metrics(*given, activation="none", spatial_dims=2)
        for value, truth in zip(found, expected, strict=True):
            assert (type(value), value.shape, value.dtype) == (torch.Tensor, (1,), wanted)
            assert value.device == outputs.device
            assert not value.requires_grad
            assert value.item() == pytest.approx(truth.item(), rel=1e-6)


def test_options_are_those_of_the_losses():
    """Same names and defaults."""
    parameters = inspect.signature(instance_metrics).parameters
    theirs = inspect.signature(Options).parameters
    shared = [name for name in parameters if name in theirs]
    assert len(shared) == 10
    assert all(parameters[name].default == theirs[name].default for name in shared)


WRONG = [
    ({"matching": "dice"}, ValueError, "matching must be one of 'overlap', 'iou', 'dilated', got 'dice'"),
    ({"iou_threshold": 0.49}, ValueError, "iou_threshold must be a finite number of at least 0.5"),
    ({"iou_threshold": 1.01}, ValueError, "and of at most 1, got 1.01"),
    ({"iou_threshold": "0.5"}, TypeError, "iou_threshold must be a finite number"),
    ({"activation": "relu"}, ValueError, "activation must be one of 'sigmoid', 'softmax', 'none', got 'relu'"),
    ({"spatial_dims": 3}, ValueError, "outputs must have shape (B, N, H, W, D) for spatial_dims=3"),
    ({"num_out_chn": 2}, ValueError, "outputs must have num_out_chn=2 channels, got 1"),
    ({"num_iterations": 0}, ValueError, "num_iterations must be an integer of at least 1, got 0"),
    ({"min_instance_size": -1}, ValueError, "min_instance_size must be an integer of at least 0, got -1"),
    ({"segmentation_threshold": 2.0, "activation": "sigmoid"}, ValueError, "segmentation_threshold must be"),
    ({"outputs": OUTPUTS.long()}, TypeError, "outputs must be float16, bfloat16, float32 or float64"),
    ({"outputs": [0.0]}, TypeError, "outputs must be a torch.Tensor, got list"),
    ({"labels": LABELS[..., 1:]}, ValueError, "labels must have shape (1, 1, 7, 9) beside outputs of"),
    ({"cc_label_batch": -LABELS}, ValueError, "cc_label_batch must hold whole numbers >= 0, got -1"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_errors(wrong, error, message):
    right = {"outputs": OUTPUTS, "labels": LABELS, "activation": "none", "spatial_dims": 2}
    instance_metrics(**right)
    with pytest.raises(error, match=re.escape(message)):
        instance_metrics(**(right | wrong))
