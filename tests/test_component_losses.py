"""The component losses: values by hand, those of the authors' code (tests/data), the reference, and all ways in."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from component_reference import reference_loss
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceLoss
from tolerance import assert_close

import triton_instance_loss
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

# Each loss with arguments of each kind, for tests that hold for all.
LOSSES = {
    "blob": (BlobLoss, {}),
    "blob_logits": (BlobLoss, {"masking": "logits", "smooth": 0.5}),
    "blob_dice": (BlobLoss, {"mode": "dice"}),
    "blob_ce": (BlobLoss, {"mode": "ce"}),
    "cc": (CCLoss, {"spacing": (1.0, 1.5, 0.5)}),
    "bicc": (CCLoss, {"alpha": 0.5, "smooth": 1.0}),
    "bicc_dice": (CCLoss, {"alpha": 0.75, "mode": "dice"}),
    "cc_ce": (CCLoss, {"mode": "ce", "alpha": 1.0}),
    "cat": (ComponentTverskyLoss, {}),
    "cat_other": (ComponentTverskyLoss, {"alpha": 0.6, "beta": 0.2, "gamma": 0.5, "epsilon": 1.0, "smooth": 0.1}),
    "false": (FalseComponentLoss, {}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
# One of each kind where each takes long.
each_kind = pytest.mark.parametrize("name", ["blob", "bicc", "cat", "false"])


def make(name, **options):
    """The loss of that name, with further options; spacing as long as there are axes."""
    kind, own = LOSSES[name]
    own = dict(own)
    if "spacing" in own and options.get("spatial_dims") == 2:
        own["spacing"] = own["spacing"][1:]
    return kind(**own, **options)


def expected_of(loss, *tensors, **options):
    own = {key: getattr(loss, key) for key in loss.own}
    return reference_loss(type(loss).__name__, *tensors, **options, **own)


def batch(shape=(2, 1, 5, 6, 7), seed=0, dtype=torch.float64, probabilities=False):
    """Logits (or probabilities) with a few components on both sides, some of which touch, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(shape, generator=generator) > 0.85).to(torch.uint8)
    x = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) - 1.5 + 2.0 * labels
    return (x.sigmoid() if probabilities else x).to(dtype), labels


def line(*values):
    """An image of one line."""
    return torch.tensor([[[values]]], dtype=torch.float64)


def value_and_gradient(loss, outputs, labels, *ids, **given):
    outputs = outputs.detach().clone().requires_grad_()
    value = loss(outputs, labels, *ids, **given)
    value.backward()
    return value.detach(), outputs.grad


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
    numbers = {ops.BLOB: [1, 1, 1, 0], ops.CELLS: [1, 1, 1], ops.TVERSKY: [0.3, 0.7, 1, 5, 0.1, 1], ops.FALSE: []}
    chosen = torch.ones(1, 1, dtype=torch.bool, device=backend) if kind == ops.FALSE else None
    tensors = [each.to(backend) for each in (x, labels, rows, counts)]
    value, _, _ = ops.region_loss(*tensors, chosen, ops.SIGMOID, kind, [float(each) for each in numbers[kind]], 1, 1)
    assert value.isnan()
    tensors[2][0, 0, 1, 1] = -1
    value, _, _ = ops.region_loss(*tensors, chosen, ops.SIGMOID, kind, [float(each) for each in numbers[kind]], 1, 1)
    assert value.isfinite()


# --- gradients


@every_loss
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_gradcheck(name, activation):
    outputs, labels = batch((1, 1, 4, 5), seed=13, probabilities=activation == "none")
    loss = make(name, spatial_dims=2, activation=activation)
    if name == "bicc_dice":  # in a cell without truth p * stopgrad(p) / stopgrad(S) is no derivative of the value
        labels[:] = 1
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), outputs.requires_grad_())


@each_kind
def test_no_second_derivative(name, backend):
    outputs, labels = batch((1, 1, 4, 5), seed=14)
    outputs = outputs.to(backend).requires_grad_()
    (gradient,) = torch.autograd.grad(
        make(name, spatial_dims=2)(outputs, labels.to(backend)), outputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        gradient.sum().backward()


@each_kind
def test_functional_gradient(name, backend):
    outputs, labels = batch((1, 1, 4, 5), seed=15)
    outputs, labels, loss = outputs.to(backend), labels.to(backend), make(name, spatial_dims=2)
    _, expected = value_and_gradient(loss, outputs, labels)
    torch.testing.assert_close(torch.func.grad(loss)(outputs, labels), expected)
    with pytest.raises(NotImplementedError, match="outputs has an axis of torch"):
        torch.vmap(loss)(outputs[None], labels[None])


@each_kind
def test_the_same_bits_again(name):
    outputs, labels = batch(dtype=torch.float32)
    first, second = (value_and_gradient(make(name), outputs, labels) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# --- ways in


@each_kind
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(name, compiler):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    loss = make(name, spatial_dims=2)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for seed in range(3):
        outputs, labels = batch((2, 1, 8, 9), seed=seed, dtype=torch.float32)
        expected, actual = (value_and_gradient(each, outputs, labels) for each in (loss, compiled))
        torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@each_kind
def test_meta_tensors_and_autocast(name, backend):
    outputs, labels = (each.to(backend) for each in batch((1, 1, 6, 5), dtype=torch.float32))
    loss = make(name, spatial_dims=2)
    expected, gradient = value_and_gradient(loss, outputs, labels)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(backend.type, dtype=dtype):
            value, same = value_and_gradient(loss, MetaTensor(outputs), MetaTensor(labels))
        assert type(value) is torch.Tensor
        assert torch.equal(value, expected)
        torch.testing.assert_close(torch.as_tensor(same).as_subclass(torch.Tensor), gradient)


@every_loss
def test_copies_and_bundles(name):
    loss = make(name, ignore_index=255)
    arguments = {key: getattr(loss, key) for key in (*loss.own, "activation", "object_chn", "ignore_index")}
    config = ConfigParser(
        json.loads(json.dumps({"loss": {"_target_": f"triton_instance_loss.{type(loss).__name__}"} | arguments}))
    )
    outputs, labels = batch((1, 1, 4, 5, 6), seed=16)
    expected = loss(outputs, labels)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), config.get_parsed_content("loss")):
        assert repr(other) == repr(loss)
        assert torch.equal(other(outputs, labels), expected)
    assert all(f"{key}={value!r}" in repr(loss) for key, value in arguments.items())


def test_arguments_of_any_numeric_type():
    loss = CCLoss(smooth=np.float32(0.5), alpha=np.int64(1), spacing=np.array([1, 2, 3]), object_chn=np.int8(0))
    assert (loss.smooth, loss.alpha, loss.spacing, loss.object_chn) == (0.5, 1, (1.0, 2.0, 3.0), 0)
    json.dumps([loss.smooth, loss.alpha, loss.spacing])
    assert BlobLoss("ce").mode == "ce"  # positional, as published arguments are


def test_arguments_change_together_or_not_at_all():
    loss = CCLoss(spacing=(1, 2, 3))
    loss.alpha = 0.5
    loss.edit_parameters(spatial_dims=2, spacing=(1, 2))
    assert (loss.alpha, loss.spatial_dims, loss.spacing) == (0.5, 2, (1.0, 2.0))
    with pytest.raises(ValueError, match="spacing must be a positive number for each of 3 axes"):
        loss.spatial_dims = 3
    with pytest.raises(ValueError, match="alpha must be"):
        loss.edit_parameters(mode="ce", alpha=2)
    assert (loss.mode, loss.alpha, loss.spatial_dims) == ("dice_ce", 0.5, 2)
    with pytest.raises(AttributeError, match="CCLoss has no option 'spacings'; did you mean 'spacing'"):
        loss.spacings = (1, 1)
    with pytest.raises(
        TypeError, match=r"CCLoss.edit_parameters got unknown 'aplha'; allowed: mode, smooth, alpha, spacing, "
    ):
        loss.edit_parameters(aplha=1)


# --- errors


ERRORS = [
    (BlobLoss, {"mode": "iou"}, ValueError, "mode must be one of 'dice_ce', 'dice', 'ce', got 'iou'"),
    (CCLoss, {"mode": None}, ValueError, "mode must be one of 'dice_ce', 'dice', 'ce', got None"),
    (BlobLoss, {"masking": "zero"}, ValueError, "masking must be one of 'probabilities', 'logits', got 'zero'"),
    (BlobLoss, {"smooth": -1}, ValueError, "smooth must be a finite number of at least 0, got -1"),
    (CCLoss, {"smooth": math.nan}, ValueError, "smooth must be a finite number of at least 0, got nan"),
    (CCLoss, {"smooth": "1"}, TypeError, "smooth must be a finite number of at least 0, got '1'"),
    (CCLoss, {"alpha": 1.5}, ValueError, "alpha must be a finite number of at least 0 and of at most 1, got 1.5"),
    (CCLoss, {"alpha": -0.5}, ValueError, "alpha must be a finite number of at least 0 and of at most 1, got -0.5"),
    (CCLoss, {"spacing": (1, 1)}, ValueError, r"spacing must be .* 3 axes \(spatial_dims=3\), got 2: \(1, 1\)"),
    (CCLoss, {"spacing": (1, 0, 1)}, ValueError, r"spacing\[1\] must be a finite number above 0, got 0"),
    (CCLoss, {"spacing": (1, 1, -2.0)}, ValueError, r"spacing\[2\] must be a finite number above 0, got -2.0"),
    (CCLoss, {"spacing": (math.inf, 1, 1)}, ValueError, r"spacing\[0\] must be a finite number above 0, got inf"),
    (CCLoss, {"spacing": ("1", 1, 1)}, TypeError, r"spacing\[0\] must be a finite number above 0, got '1'"),
    (CCLoss, {"spacing": 2.0}, TypeError, r"spacing must be a positive number for each of 3 axes .*, or None, got 2.0"),
    (ComponentTverskyLoss, {"alpha": -1}, ValueError, "alpha must be a finite number of at least 0, got -1"),
    (ComponentTverskyLoss, {"beta": -1}, ValueError, "beta must be a finite number of at least 0, got -1"),
    (ComponentTverskyLoss, {"gamma": math.inf}, ValueError, "gamma must be a finite number of at least 0, got inf"),
    (ComponentTverskyLoss, {"epsilon": -2}, ValueError, "epsilon must be a finite number of at least 0, got -2"),
    (ComponentTverskyLoss, {"background_weight": None}, TypeError, "background_weight must be .*, got None"),
    (FalseComponentLoss, {"activation": "relu"}, ValueError, "activation must be one of .*, got 'relu'"),
    (FalseComponentLoss, {"max_cc_out": 5}, TypeError, "unknown 'max_cc_out'; allowed: activation, "),
    (BlobLoss, {"sigmoid": True}, TypeError, "unknown 'sigmoid'; allowed: mode, smooth, masking, activation, "),
    (BlobLoss, {"ignore_index": 1}, ValueError, "ignore_index must not be"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), ERRORS)
def test_wrong_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)
    loss = kind()
    if next(iter(arguments)) in (*kind.own, *triton_instance_loss.component_losses.SHARED):
        with pytest.raises(error, match=message):
            setattr(loss, *next(iter(arguments.items())))


@each_kind
def test_wrong_tensors(name):
    outputs, labels = batch((1, 1, 4, 5))
    loss = make(name, spatial_dims=2)
    with pytest.raises(ValueError, match="labels must have shape"):
        loss(outputs, labels[..., 1:])
    with pytest.raises(TypeError, match="ignore_mask must be bool"):
        loss(outputs, labels, ignore_mask=labels)
    with pytest.raises(TypeError, match="cc_label_batch must hold the number of an instance"):
        loss(outputs, labels, labels > 0)
    with pytest.raises(ValueError, match="outputs must have shape"):
        make(name)(outputs, labels)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script"):
        torch.jit.script(loss)


@pytest.mark.parametrize("name", ["blob", "blob_ce", "bicc", "cc_ce"])
def test_cross_entropy_wants_probabilities(name):
    outputs, labels = batch((1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"mode='.*ce' is a cross entropy and needs outputs in \[0, 1\]"):
        make(name, activation="none", spatial_dims=2)(outputs, labels)
    assert make("blob_dice", activation="none", spatial_dims=2)(outputs, labels).isfinite()


@each_kind
def test_probabilities_as_logits_get_a_warning(name):
    outputs, labels = batch((1, 1, 4, 5), probabilities=True)
    with pytest.warns(UserWarning, match="outputs must be logits"):
        make(name, spatial_dims=2)(outputs, labels)
