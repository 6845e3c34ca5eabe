"""What the component losses give: values by hand, those of the authors' code (tests/data), the reference, edges."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from component_cases import batch, each_kind, every_loss, expected_of, line, make, value_and_gradient
from monai.losses import DiceLoss
from tolerance import assert_close

from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss, ICILoss, dICILoss, ops

DATA = Path(__file__).parent / "data"
RECORDS = json.loads((DATA / "components.json").read_text())
ARRAYS = np.load(DATA / "components.npz")
OF_RECORDS = {
    "blob": BlobLoss,
    "blob_ce": BlobLoss,
    "cc": CCLoss,
    "cc_dice": CCLoss,
    "bicc": CCLoss,
    "bicc_75": CCLoss,
    "bicc_smooth": CCLoss,
    "cat": ComponentTverskyLoss,
    "false": FalseComponentLoss,
    "ICILoss": ICILoss,
    "dICILoss": dICILoss,
}
assert len(RECORDS) == 67


# --- by hand


LABELS = line(1, 1, 0, 0, 1)
PREDICTED = line(1.0, 0.5, 0.5, 0.0, 0.25)


def flat(kind, **own):
    return kind(activation="none", spatial_dims=2, **own)


def test_blob_by_hand(backend):
    outputs, labels = PREDICTED.to(backend), LABELS.to(backend)
    # Of the two voxels S = 1.5, of the one 0.25; the background has 0.5.
    two, one = 1 - 3 / (1.5 + 0.5 + 2), 1 - 0.5 / (0.25 + 0.5 + 1)
    value = flat(BlobLoss, mode="dice", smooth=0)(outputs, labels)
    assert value.item() == pytest.approx((two + one) / 2)
    # As the authors have it, the other one's voxels count as p = 1/2.
    two, one = 1 - 3 / (1.5 + 0.5 + 2 + 0.5), 1 - 0.5 / (0.25 + 0.5 + 1 + 1)
    value = flat(BlobLoss, mode="dice", smooth=0, masking="logits")(outputs, labels)
    assert value.item() == pytest.approx((two + one) / 2)
    half = math.log(2)
    two, one = (2 * half) / 4, (math.log(4) + half) / 3
    assert flat(BlobLoss, mode="ce")(outputs, labels).item() == pytest.approx((two + one) / 2)
    two, one = (3 * half) / 5, (math.log(4) + 3 * half) / 5
    value = flat(BlobLoss, mode="ce", masking="logits")(outputs, labels)
    assert value.item() == pytest.approx((two + one) / 2)


def test_cells_by_hand(backend):
    outputs, labels = PREDICTED.to(backend), LABELS.to(backend)
    # The third voxel is nearer to the first instance, the fourth to the second.
    first, second = 1 - 2 * 1.5 / (2.0 + 2), 1 - 2 * 0.25 / (0.25 + 1)
    assert flat(CCLoss, mode="dice")(outputs, labels).item() == pytest.approx((first + second) / 2)
    half = math.log(2)
    first, second = 2 * half / 3, math.log(4) / 2
    assert flat(CCLoss, mode="ce")(outputs, labels).item() == pytest.approx((first + second) / 2)
    # One output, in whose cell is everything.
    everything = 1 - 2 * 1.75 / (2.25 + 3)
    assert flat(CCLoss, mode="dice", alpha=1)(outputs, labels).item() == pytest.approx(everything)


def test_cell_of_a_false_output_by_hand(backend):
    outputs, labels = line(0.75, 0, 0, 0, 1, 0.5).to(backend), line(0, 0, 0, 0, 1, 1).to(backend)
    false, true = 0.75**2 / 0.75, 1 - 2 * 1.5 / (1.5 + 2)
    value, gradient = value_and_gradient(flat(CCLoss, mode="dice", alpha=1), outputs, labels)
    assert value.item() == pytest.approx((false + true) / 2)
    assert gradient[..., 0].item() == pytest.approx(0.75 / 0.75 / 2)


def test_tversky_by_hand(backend):
    outputs, labels = PREDICTED.to(backend), LABELS.to(backend)
    two, one = 1 / 7, 1 / 6
    hit, missed, false = two * 1.5 + one * 0.25, two * 0.5 + one * 0.75, 0.1 * 0.5
    expected = 1 - hit / (hit + 0.3 * false + 0.7 * missed)
    assert flat(ComponentTverskyLoss, smooth=0)(outputs, labels).item() == pytest.approx(expected)


def test_false_by_hand(backend):
    labels = line(1, 1, 1, 1, 0, 0, 0, 1).to(backend)
    # Two pieces of the first label, the larger of which it claims; one output without any; the last one is claimed.
    outputs = line(0.5, 0, 0.75, 1, 0, 0.5, 0, 1).to(backend)
    value, gradient = value_and_gradient(flat(FalseComponentLoss), outputs, labels)
    assert value.item() == pytest.approx((0.5 + 0.5) / 2)
    assert gradient.flatten().tolist() == [0.5, 0, 0, 0, 0, 0.5, 0, 0]


def test_equal_claims_go_to_the_smaller_id(backend):
    _, gradient = value_and_gradient(
        flat(FalseComponentLoss), line(1, 0, 1, 0, 0).to(backend), line(1, 1, 1, 0, 0).to(backend)
    )
    assert gradient.flatten().tolist() == [0, 0, 1, 0, 0]
    # One output may be claimed by two labels.
    value = flat(FalseComponentLoss)(line(1, 1, 1, 0, 1).to(backend), line(1, 0, 1, 0, 0).to(backend))
    assert value.item() == 1  # the last one alone


# --- what was published


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['name']}-{record['loss']}")
def test_published(record, backend):
    outputs = torch.from_numpy(ARRAYS[f"{record['name']}/outputs"]).double().to(backend)
    labels = torch.from_numpy(ARRAYS[f"{record['name']}/labels"]).to(backend)
    if "values" in record:
        criteria = [DiceLoss() for _ in range(3)]
        terms = OF_RECORDS[record["loss"]](*criteria, **record["arguments"])(outputs.sigmoid(), labels)
        assert list(terms._fields) == record["order"]
        assert terms._asdict() == pytest.approx(record["values"], abs=1e-5)
        return
    value, gradient = value_and_gradient(OF_RECORDS[record["loss"]](**record["arguments"]), outputs, labels)
    assert value.item() == pytest.approx(record["value"] or 0.0, abs=1e-5)
    key = f"{record['name']}/{record['loss']}/grad"
    expected = torch.from_numpy(ARRAYS[key]).double() if key in ARRAYS else torch.zeros(gradient.shape)
    assert (gradient.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- the reference


def check_against_reference(loss, tensors, options, device, dtype=torch.float64, **given):
    """Values and gradients; the truth is the reference in float64 on the same numbers."""
    outputs, labels, ids = tensors
    outputs = outputs.to(dtype)
    on_device = (labels.to(device), None if ids is None else ids.to(device))
    mask = {name: each.to(device) for name, each in given.items()}
    value, gradient = value_and_gradient(loss, outputs.to(device), *on_device, **mask)
    truth = outputs.detach().double().requires_grad_()
    expected = expected_of(loss, truth, labels, ids, ignored=given.get("ignore_mask"), **options)
    expected.backward()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.shape == ()
    assert_close(value, expected, value.dtype)
    precision = dtype if dtype.itemsize < 4 else value.dtype
    assert_close(gradient, truth.grad, precision, truth.grad.abs().max() * 2 if dtype.itemsize < 4 else 1e-3)


@every_loss
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_reference_in_3d(name, activation, backend, poison):
    outputs, labels = batch(probabilities=activation == "none")
    loss = make(name, activation=activation)
    check_against_reference(loss, (outputs, labels, None), {"activation": activation}, backend)


@every_loss
def test_reference_in_2d(name, backend, poison):
    outputs, labels = batch((3, 1, 11, 13), seed=1)
    loss = make(name, spatial_dims=2, segmentation_threshold=0.3)
    check_against_reference(loss, (outputs, labels, None), {"threshold": 0.3}, backend)


@each_kind
def test_softmax_and_classes(name, backend):
    outputs, labels = batch((2, 3, 9, 8), seed=2)
    options = {"activation": "softmax", "num_out_chn": 3, "object_chn": (1, 2), "spatial_dims": 2}
    how = {"activation": "softmax", "channels": (1, 2)}
    check_against_reference(make(name, **options), (outputs, labels, None), how, backend)
    numbers = torch.randint(0, 3, (2, 1, 9, 8), generator=torch.Generator().manual_seed(3))
    masks = torch.cat([numbers == each for each in range(3)], 1)
    of_numbers = value_and_gradient(make(name, **options, to_onehot_y=True), outputs.to(backend), numbers.to(backend))
    of_masks = value_and_gradient(make(name, **options), outputs.to(backend), masks.to(backend))
    assert_close(of_numbers[0], of_masks[0], torch.float64)
    assert_close(of_numbers[1], of_masks[1], torch.float64)


@each_kind
def test_regions_of_sigmoid(name, backend):
    """Label channels that overlap, of which two are looked at."""
    outputs, labels = batch((2, 3, 7, 8), seed=4)
    loss = make(name, num_out_chn=3, object_chn=(2, 0), spatial_dims=2)
    check_against_reference(loss, (outputs, labels, None), {"channels": (2, 0)}, backend)


@every_loss
def test_ignored_voxels(name, backend):
    outputs, labels = batch(seed=5)
    ignored = torch.zeros(2, 1, 5, 6, 7, dtype=torch.bool)
    ignored[:, :, 1:4, 2:5] = True
    ignored[1, :, :, 0] = True
    loss = make(name)
    check_against_reference(loss, (outputs, labels, None), {}, backend, ignore_mask=ignored)
    # The same by label; what stands there does not matter.
    by_label = labels.clone()
    by_label[ignored] = 255
    elsewhere = outputs.masked_fill(ignored, math.nan)
    expected, gradient = value_and_gradient(
        loss, outputs.to(backend), labels.to(backend), ignore_mask=ignored.to(backend)
    )
    loss.ignore_index = 255
    value, same = value_and_gradient(loss, elsewhere.to(backend), by_label.to(backend))
    assert_close(value, expected, torch.float64)
    assert_close(same, gradient, torch.float64)
    assert not same.cpu()[ignored].any()


@every_loss
def test_given_components(name, backend):
    """Neighbours that touch are two instances; a voxel without a number is in none."""
    outputs, labels = batch((2, 1, 9, 8), seed=6)
    ids = torch.randint(1, 4, (2, 1, 9, 8), generator=torch.Generator().manual_seed(7)) * 10**12
    check_against_reference(make(name, spatial_dims=2), (outputs, labels, ids), {}, backend)
    ids[..., ::3] = 0
    check_against_reference(make(name, spatial_dims=2), (outputs, labels, ids), {}, backend)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(name, dtype, backend):
    outputs, labels = batch((2, 1, 9, 8), seed=8)
    check_against_reference(make(name, spatial_dims=2), (outputs, labels, None), {}, backend, dtype)


# --- edges


CASES = {
    "empty": lambda x, y: (x - 60, 0 * y),
    "full": lambda x, y: (x + 60, 0 * y + 1),
    "only labels": lambda x, y: (x - 60, y),
    "only outputs": lambda x, y: (x + 60, 0 * y),
    "labels full": lambda x, y: (x, 0 * y + 1),
    "saturated": lambda x, y: (1e4 * x, y),
    "zero": lambda x, y: (0 * x, y),
}


@every_loss
@pytest.mark.parametrize("case", CASES)
def test_edges(name, case, backend, poison):
    outputs, labels = CASES[case](*batch((2, 1, 6, 5), seed=9))
    check_against_reference(make(name, spatial_dims=2), (outputs, labels, None), {}, backend)
    if case != "saturated":  # where p is 0 or 1 to the last bit, as with empty and full in float32
        check_against_reference(make(name, spatial_dims=2), (outputs, labels, None), {}, backend, torch.float32)


@every_loss
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("logit", [-3.0, 3.0])
def test_one_voxel(name, label, logit, backend):
    outputs, labels = torch.full((1, 1, 1, 1, 1), logit).double(), torch.full((1, 1, 1, 1, 1), label)
    check_against_reference(make(name), (outputs, labels, None), {}, backend)


@every_loss
def test_all_ignored(name, backend):
    outputs, labels = batch((2, 1, 4, 5), seed=10)
    ignored = torch.zeros(outputs.shape, dtype=torch.bool)
    ignored[0] = True
    loss = make(name, spatial_dims=2)
    check_against_reference(loss, (outputs, labels, None), {}, backend, ignore_mask=ignored)
    ignored[:] = True
    value, gradient = value_and_gradient(loss, outputs.to(backend), labels.to(backend), ignore_mask=ignored.to(backend))
    assert value.isfinite()
    assert not gradient.any()


@each_kind
def test_noise(name, backend):
    """As many components as fit."""
    outputs, labels = torch.full((1, 1, 9, 9), -5.0).double(), torch.zeros(1, 1, 9, 9)
    outputs[..., ::2, ::2] = labels[..., ::2, ::2] = 1
    labels[..., 4, 4], outputs[..., 4, 4] = 0, 2
    check_against_reference(make(name, spatial_dims=2), (outputs, labels, None), {}, backend)


@each_kind
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_outputs_show(name, broken, backend):
    outputs, labels = batch((2, 1, 4, 5), seed=11)
    outputs[0, 0, 1, 2] = broken
    assert make(name, spatial_dims=2)(outputs.to(backend), labels.to(backend)).isnan()
    two = torch.cat((outputs, -outputs.nan_to_num(0, 1, 1)), 1)
    loss = make(name, spatial_dims=2, activation="softmax", num_out_chn=2, object_chn=0)
    assert loss(two.to(backend), labels.to(backend)).isnan()
    assert make(name, spatial_dims=2, num_out_chn=2)(two.to(backend), labels.to(backend)).isfinite()


@each_kind
def test_broken_labels_are_an_error(name):
    outputs, labels = batch((1, 1, 4, 5), seed=12)
    with pytest.raises(ValueError, match=r"labels must be 0 or 1 .*, got 255"):
        make(name, spatial_dims=2)(outputs, 255 * labels)


@pytest.mark.parametrize("kind", [ops.BLOB, ops.CELLS, ops.TVERSKY, ops.FALSE])
@pytest.mark.parametrize("label", [2.0, -1.0, math.nan])
def test_broken_labels_show(kind, label, backend):
    """Where labels are not looked at, the value is NaN."""
    x, labels = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    rows, counts = labels.int(), torch.ones(1, dtype=torch.int32)
    rows[0, 0, 0, 0], labels[0, 0, 0, 0], labels[0, 0, 1, 1] = 1, 1, label
    rows = rows.clamp(min=1) if kind == ops.CELLS else rows
    numbers = {ops.BLOB: [1, 1, 1, 0], ops.CELLS: [1, 1, 1, 1], ops.TVERSKY: [0.3, 0.7, 1, 5, 0.1, 1], ops.FALSE: []}
    chosen = torch.ones(1, 1, dtype=torch.bool, device=backend) if kind == ops.FALSE else None
    tensors = [each.to(backend) for each in (x, labels, rows, counts)]
    value, _, _ = ops.region_loss(*tensors, chosen, ops.SIGMOID, kind, [float(each) for each in numbers[kind]], 1, 1)
    assert value.isnan()
    tensors[2][0, 0, 1, 1] = -1
    value, _, _ = ops.region_loss(*tensors, chosen, ops.SIGMOID, kind, [float(each) for each in numbers[kind]], 1, 1)
    assert value.isfinite()
