"""The reference itself: maps worked out by hand, and the published values and gradients."""

import math

import pytest
import torch
from golden import CASES
from reference import TERMS, reference_components, reference_terms


def drawing(*rows):
    """Turn rows of a drawing into a (1, 1, H, W) image: "." is 0, "5" is 0.5, "2" is 0.25, "1" is 1."""
    values = {".": 0.0, "5": 0.5, "2": 0.25, "1": 1.0}
    return torch.tensor([[values[c] for c in row.replace(" ", "")] for row in rows], dtype=torch.float64)[None, None]


def plain_dice(prediction, label):
    """Dice without smoothing, so that values are plain fractions."""
    return 1 - 2 * (prediction * label).sum() / (prediction.sum() + label.sum())


def terms_of(outputs, labels, ids=None, **options):
    """Terms of a drawing with plain Dice, as floats."""
    options = {
        "loss_function_pixel": plain_dice,
        "loss_function_instance": plain_dice,
        "loss_function_center": plain_dice,
        "activation": "none",
        "spatial_dims": 2,
    } | options
    return {name: value.item() for name, value in reference_terms(outputs, labels, ids, **options).items()}


def expect(actual, **expected):
    assert {name: actual[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Two labels; the first output covers one of them and a faint voxel more, the second touches nothing.
LABELS = drawing(
    ". . . . . . . . . . . .",
    ". 1 1 . . . . . 1 . . .",
    ". . . . . . . . . . . .",
)
OUTPUTS = drawing(
    ". . . . . . . . . . . .",
    ". 1 1 5 . 1 . . . . . .",
    ". . . . . . . . . . . .",
)


def test_two_labels_two_outputs():
    terms = terms_of(OUTPUTS, LABELS)
    # The first output: 2 * 2 / (2.5 + 2). The faint voxel enters the label's value as 0.5 * 0.5: 2 * 2 / (2.25 + 2).
    output_value, label_value = 1 - 4 / 4.5, 1 - 4 / 4.25
    expect(
        terms,
        pixel=1 - 4 / 6.5,
        instance_label=(label_value + 1) / 2,
        instance_output=(output_value + 1) / 2,
        false_instances=1,
        missed_instances=1,
    )
    # Rows of every box are [0, 2). Columns: outputs [0, 5) and [3, 6) with centres 3 and 5, labels [0, 3) and [6, 9)
    # with centres 2 and 8. The lone output is as far from both labels, so its parts cancel.
    nearest = 1 - 6 / 10 + 1 / (2**2 + 5**2 + 1e-7)
    expect(terms, proximity=(nearest * (label_value - output_value)) ** 2)


def test_with_true_positives_counts_the_faint_voxel_once():
    expect(terms_of(OUTPUTS, LABELS, instance_wise_loss_no_tp=False), instance_label=(1 - 4 / 4.5 + 1) / 2)


def test_rates():
    expect(
        terms_of(OUTPUTS, LABELS, rate_instead_number=True, smoother=1.0), false_instances=1 / 3, missed_instances=1 / 3
    )


def test_sum_over_instances():
    options = {"instance_wise_reduce": "data", "reduce_segmentation": "sum"}
    expect(terms_of(OUTPUTS, LABELS, **options), instance_output=1 - 4 / 4.5 + 1)


def test_cap_keeps_the_output_that_ends_first():
    # The second output is not used: it is neither correct nor in instance_output, but it stays in the count.
    expect(terms_of(OUTPUTS, LABELS, max_cc_out=1), instance_output=1 - 4 / 4.5, false_instances=1, missed_instances=1)


def test_too_many():
    whole = 1 - 4 / 6.5
    terms = terms_of(OUTPUTS, LABELS, mul_too_many=0.5)
    expect(terms, instance_output=whole, instance_label=1, center=1, false_instances=2, missed_instances=2)
    # The box in the middle: rows [0, 2) with centre 1, columns [5, 7) with centre 6.
    to_first, to_second = 1 + 16 / (4 + 49 + 1e-7), 1 - 2 / 8 + 4 / (4 + 16 + 1e-7)
    expect(terms, proximity=(to_first + to_second - min(to_first, to_second) * whole) ** 2 + 2)


def test_min_instance_size():
    # The one-voxel output and label are gone; what is left is the pair that touches.
    expect(
        terms_of(OUTPUTS, LABELS, min_instance_size=1),
        pixel=1 - 4 / 6.5,
        instance_label=1 - 4 / 4.25,
        instance_output=1 - 4 / 4.5,
        false_instances=0,
        missed_instances=0,
    )


def test_given_components():
    # One instance has a voxel of each label, one a voxel of the first; an id where no label is makes no instance.
    ids = torch.zeros(1, 1, 3, 12, dtype=torch.int64)
    ids[0, 0, 1, 1], ids[0, 0, 1, 2], ids[0, 0, 1, 8], ids[0, 0, 0, 0] = 2**40, 7, 2**40, 9
    first = 1 - 2 * 1 / (1 + 0.25 + 1)  # 7: the voxel of the output that is on the other instance is left out
    second = 1 - 2 * 1 / (1 + 0.25 + 2)  # 2^40
    expect(
        terms_of(OUTPUTS, LABELS, ids),
        instance_label=(first + second) / 2,
        instance_output=(1 - 2 * 2 / (2.5 + 3) + 1) / 2,
        missed_instances=0,
    )


def test_one_output_beside_one_label():
    labels = drawing(". . . . .", ". 1 1 . .", ". 1 1 . .", ". . . . .")
    outputs = drawing(". . . . .", ". . 1 1 .", ". . 1 1 .", ". . . . .")
    # Centres (2, 2) and (2, 3); boxes [0, 3) by [0, 3), and [0, 3) by [1, 4): 6 of 9 pixels in common.
    expect(
        terms_of(outputs, labels, centroid_offset=1, smoother=0.25),
        pixel=1 / 2,
        instance_label=1 / 2,
        instance_output=1 / 2,
        center=1 - 2 * 6 * 1.25**2 / (18 * 1.25),
        false_instances=0,
        missed_instances=0,
        proximity=0,
    )


def test_no_outputs():
    labels = drawing("1 . . . .", *[". . . . ."] * 4)
    outputs = drawing(*["2 2 2 2 2"] * 5)
    # Boxes: [0, 1) with centre 1 (twice), and in the middle [1, 3) with centre 2.
    whole, distance = 1 - 2 * 0.25 / (6.25 + 1), 1 + 2 / (18 + 1e-7)
    expect(
        terms_of(outputs, labels),
        instance_label=1,
        instance_output=whole,
        center=1,
        false_instances=0,
        missed_instances=1,
        proximity=(distance * (1 - whole)) ** 2,
    )


def test_no_labels():
    outputs = drawing("1 . . . .", *[". . . . ."] * 4)
    expect(
        terms_of(outputs, drawing(*[". . . . ."] * 5)),
        instance_label=1,
        instance_output=1,
        center=1,
        false_instances=1,
        missed_instances=0,
        proximity=0,
    )


def test_nothing_at_all():
    nothing = drawing(". . . .", ". . . .")
    own_dice = {"loss_function_pixel": None, "loss_function_instance": None, "loss_function_center": None}
    expect(terms_of(nothing, nothing, **own_dice), **dict.fromkeys(TERMS, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_spoils_everything(value):
    outputs = OUTPUTS.clone()
    outputs[0, 0, 2, 3] = value
    assert all(math.isnan(term) for term in terms_of(outputs, LABELS).values())


def gradient(term, outputs=OUTPUTS, labels=LABELS, **options):
    """Gradient of one term of a drawing with respect to the outputs, as rows."""
    x = outputs.clone().requires_grad_()
    options = {"loss_function_instance": plain_dice, "activation": "none", "spatial_dims": 2} | options
    reference_terms(x, labels, **options)[term].backward()
    return x.grad[0, 0]


def test_surrogate_of_false_and_missed():
    expected = torch.zeros(3, 12, dtype=torch.float64)
    expected[1, 5] = 1
    torch.testing.assert_close(gradient("false_instances"), expected)
    torch.testing.assert_close(gradient("false_instances", max_cc_out=1), expected)
    expected = torch.zeros(3, 12, dtype=torch.float64)
    expected[1, 8] = -1
    torch.testing.assert_close(gradient("missed_instances"), expected)


def test_surrogate_of_the_center():
    # Boxes [0, 2) by [0, 4), and [0, 2) by [2, 7): the second owns the columns that they share.
    actual = gradient("center", loss_function_center=lambda u, w: u.sum(), centroid_offset=2)
    expected = torch.zeros(3, 12, dtype=torch.float64)
    expected[1, 1:4] = 4 / 3
    expected[1, 5] = 10
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("term", ["center", "false_instances", "missed_instances"])
def test_published_gradients_of_counts_are_zero(term):
    assert not gradient(term, gradients="reference").any()


@pytest.mark.parametrize("mode", ["surrogate", "reference"])
def test_gradient_of_instance_output(mode):
    # 1 - 2 I / (S + 2) with I = 2, S = 2.5, halved by the mean over two outputs.
    expected = torch.zeros(3, 12, dtype=torch.float64)
    expected[1, 1:3] = (-2 / 4.5 + 4 / 4.5**2) / 2
    expected[1, 3] = 4 / 4.5**2 / 2
    torch.testing.assert_close(gradient("instance_output", gradients=mode), expected)


@pytest.mark.parametrize("mode", ["surrogate", "reference"])
def test_false_positive_voxel_enters_with_a_constant_copy_of_itself(mode):
    # 1 - 2 T / (T + 0.5 a + 2) with T = 2, a = 0.5, halved; where nothing was detected the mask is zero.
    expected = torch.zeros(3, 12, dtype=torch.float64)
    expected[1, 1:3] = (-2 / 4.25 + 4 / 4.25**2) / 2
    expected[1, 3] = 0.5 * 4 / 4.25**2 / 2
    torch.testing.assert_close(gradient("instance_label", gradients=mode), expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_surrogate_passes_through_the_activation(activation):
    # Every term is a function of the binary output; its derivative is that of the soft one.
    channels = 2 if activation == "softmax" else 1
    logits = torch.cat([OUTPUTS * 4 - 1.5, OUTPUTS * 0][:channels], dim=1)
    options = {"activation": activation, "num_out_chn": channels, "object_chn": 0, "spatial_dims": 2}
    x = logits.clone().requires_grad_()
    actual = {}
    for mode in ("surrogate", "reference"):
        terms = reference_terms(x, LABELS, gradients=mode, **options)
        actual[mode] = torch.autograd.grad(terms["instance_output"], x)[0]
    hard = (OUTPUTS > 0).double().requires_grad_()
    terms = reference_terms(hard, LABELS, activation="none", spatial_dims=2)
    by_activated = torch.autograd.grad(terms["instance_output"], hard)[0]
    p = torch.sigmoid(OUTPUTS * 4 - 1.5)
    torch.testing.assert_close(actual["surrogate"][:, :1], by_activated * p * (1 - p))
    assert not actual["reference"].any()


def test_components_touch_at_corners():
    mask = drawing("1 . . . 1", ". 1 . . 1", ". . . . .", "1 1 . 1 .")
    ids = torch.tensor([[7, 0, 0, 0, 10], [0, 7, 0, 0, 10], [0, 0, 0, 0, 0], [17, 17, 0, 19, 0]])
    assert torch.equal(reference_components(mask)[0, 0], ids)


def test_a_component_of_the_first_voxel_is_one():
    assert reference_components(drawing("1 . .", ". . ."))[0, 0].tolist() == [[1, 0, 0], [0, 0, 0]]


def test_components_do_not_reach_into_the_next_sample():
    mask = torch.ones(2, 1, 2, 2, 2)
    assert torch.equal(reference_components(mask), torch.full((2, 1, 2, 2, 2), 8))


@pytest.mark.parametrize(
    ("rounds", "ids"),
    [(1, [2, 3, 4, 5, 5]), (2, [3, 4, 5, 5, 5]), (4, [5, 5, 5, 5, 5]), (None, [5, 5, 5, 5, 5])],
)
def test_rounds_of_pooling_cut_what_is_wider(rounds, ids):
    assert reference_components(drawing("1 1 1 1 1"), rounds)[0, 0, 0].tolist() == ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_values_and_gradients(case):
    outputs, labels, ids = case.tensors()
    outputs.requires_grad_()
    terms = reference_terms(outputs, labels, ids, **case.options())
    for name in TERMS:
        # The published code divides integer boxes in float32; gradients are stored in float32.
        precision = 1e-5 if name == "proximity" else 1e-9
        assert terms[name].item() == pytest.approx(case.values[name], rel=precision, abs=1e-9), name
        (actual,) = torch.autograd.grad(terms[name], outputs, retain_graph=True)
        expected = case.gradient(name)
        error = (actual - expected).abs().max().item()
        assert error <= max(precision, 1e-6) * expected.abs().max().item(), name
