"""The public classes: arguments, what they return, WeightedSum, changing options, copies, frameworks around them."""

import copy
import inspect
import os
import pickle
import warnings

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceLoss
from reference import TERMS

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, WeightedSum, functional


def draw(text):
    """A drawn image as (1, 1, H, W) labels: # is foreground."""
    rows = text.split()
    return torch.tensor([[[[float(c == "#") for c in row] for row in rows]]])


# One label matched by one output, one missed, one output invented.
LABELS = draw("##...... ##...... ........ ......## ......## ........")
OUTPUTS = draw("##...... #....... ........ ........ ........ ##......")


def random_batch(device, dtype=torch.float32, shape=(5, 4, 6), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(batch, 1, *shape, generator=generator, dtype=torch.float64)
    labels = (torch.rand(batch, 1, *shape, generator=generator) > 0.85).to(torch.float64)
    return outputs.to(device, dtype).requires_grad_(), labels.to(device, dtype)


def test_drawn(backend):
    outputs, labels = OUTPUTS.to(backend), LABELS.to(backend)
    loss = InstanceLoss(activation="none", spatial_dims=2)
    terms = loss(outputs, labels)
    dice = 1 - 2 * 3 / (3 + 4)
    assert terms._fields == TERMS
    assert terms.pixel.item() == pytest.approx(1 - 2 * 3 / (5 + 8), abs=1e-5)
    assert terms.instance_label.item() == pytest.approx((dice + 1) / 2, abs=1e-5)
    assert terms.instance_output.item() == pytest.approx((dice + 1) / 2, abs=1e-5)
    assert terms.false_instances.item() == 1
    assert terms.missed_instances.item() == 1
    loss.edit_parameters(rate_instead_number=True)
    assert loss(outputs, labels).missed_instances.item() == pytest.approx(0.5)


def test_drawn_surrogate_gradients(backend):
    outputs, labels = OUTPUTS.to(backend).requires_grad_(), LABELS.to(backend)
    terms = InstanceLoss(activation="none", spatial_dims=2)(outputs, labels)
    (false,) = torch.autograd.grad(terms.false_instances, outputs, retain_graph=True)
    expected = torch.zeros_like(OUTPUTS)
    expected[0, 0, 5, :2] = 1 / 2
    assert torch.equal(false.cpu(), expected)
    (missed,) = torch.autograd.grad(terms.missed_instances, outputs)
    expected = torch.zeros_like(OUTPUTS)
    expected[0, 0, 3:5, 6:] = -1 / 4
    assert torch.equal(missed.cpu(), expected)


def test_reference_gradients_are_the_published_ones(backend):
    outputs, labels = random_batch(backend)
    terms = InstanceLoss(gradients="reference")(outputs, labels)
    for name in TERMS[1:]:
        (grad,) = torch.autograd.grad(getattr(terms, name), outputs, retain_graph=True)
        assert not grad.any(), name
    (grad,) = torch.autograd.grad(terms.pixel, outputs)
    assert grad.any()


def test_signature_is_the_published_one_and_ours():
    parameters = inspect.signature(InstanceLoss).parameters
    assert list(parameters)[:3] == ["loss_function_pixel", "loss_function_instance", "loss_function_center"]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {
        "loss_function_pixel": None,
        "loss_function_instance": None,
        "loss_function_center": None,
        "activation": "sigmoid",
        "num_out_chn": 1,
        "object_chn": 1,
        "spatial_dims": 3,
        "reduce_segmentation": "mean",
        "instance_wise_reduce": "instance",
        "num_iterations": None,
        "segmentation_threshold": None,
        "max_cc_out": 4096,
        "mul_too_many": 50,
        "min_instance_size": 0,
        "centroid_offset": 3,
        "smoother": 1e-7,
        "instance_wise_loss_no_tp": True,
        "rate_instead_number": False,
        "gradients": "surrogate",
        "to_onehot_y": False,
        "ignore_index": None,
        "process_group": None,
        "spacing": None,
    }
    assert inspect.signature(InstanceCenterLoss) == inspect.signature(InstanceLoss)


def test_default_criteria_equal_monai(backend):
    outputs, labels = random_batch(backend)
    ours = InstanceLoss()(outputs, labels)
    dice = DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5)
    theirs = InstanceLoss(DiceLoss(sigmoid=True), dice, dice)(outputs, labels)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


def test_functions_are_the_terms(backend):
    outputs, labels = random_batch(backend)
    options = {"max_cc_out": 3, "rate_instead_number": True}
    terms = InstanceLoss(**options)(outputs, labels)
    segmentation = functional.instance_segmentation_loss(outputs, labels, **options)
    assert segmentation == (terms.instance_label, terms.instance_output)
    assert functional.instance_center_loss(outputs, labels, **options) == terms.center
    rates = functional.false_instance_rate_loss(outputs, labels, **options)
    assert rates == (terms.false_instances, terms.missed_instances)
    assert functional.instance_proximity_loss(outputs, labels, **options) == terms.proximity


def test_edit_parameters_checks_and_changes_all_or_nothing():
    loss = InstanceLoss()
    loss.edit_parameters(max_cc_out=7, num_iterations=20, loss_function_instance=torch.nn.MSELoss())
    assert (loss.max_cc_out, loss.num_iterations) == (7, 20)
    assert isinstance(loss.loss_function_instance, torch.nn.MSELoss)
    with pytest.raises(ValueError, match=r"activation must be one of 'sigmoid', 'softmax', 'none', got 'relu'"):
        loss.edit_parameters(max_cc_out=9, activation="relu")
    with pytest.raises(TypeError, match="unknown 'max_cc'; allowed: loss_function_pixel"):
        loss.edit_parameters(max_cc=9)
    assert loss.max_cc_out == 7
    with pytest.raises(ValueError, match="max_cc_out must be an integer of at least 0, got -1"):
        loss.max_cc_out = -1
    loss.max_cc_out = 5
    assert loss.options.max_cc_out == 5


def test_copies_and_prints(capsys):
    loss = InstanceLoss(DiceLoss(), torch.nn.MSELoss(), DiceLoss(), max_cc_out=9)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.options == loss.options
        assert isinstance(other.loss_function_instance, torch.nn.MSELoss)
    loss.print_parameters()
    assert "max_cc_out: 9" in capsys.readouterr().out
    assert "max_cc_out=9" in repr(loss)
    assert "MSELoss" in repr(loss)


def _in_worker(queue, loss):
    queue.put([value.item() for value in loss(OUTPUTS, LABELS)])


def test_spawned_worker():
    loss = InstanceLoss(activation="none", spatial_dims=2)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_worker, args=(queue, loss))
    process.start()
    assert queue.get(timeout=120) == [value.item() for value in loss(OUTPUTS, LABELS)]
    process.join()


class TestWeightedSum:
    def test_is_the_sum(self, backend):
        outputs, labels = random_batch(backend)
        loss = InstanceLoss(rate_instead_number=True)
        weighted = WeightedSum(loss, proximity=0.125, center=0.0)
        total = weighted(outputs, labels)
        weights = {"pixel": 1, "instance_label": 0.5, "instance_output": 0.5, "proximity": 0.125}
        weights |= {"false_instances": 0.25, "missed_instances": 0.25}
        terms = loss(outputs, labels)._asdict()
        expected = sum(weight * terms[name] for name, weight in weights.items())
        assert total.ndim == 0
        torch.testing.assert_close(total, expected)
        assert set(weighted.terms) == set(weights)
        assert not any(value.requires_grad for value in weighted.terms.values())

    def test_zero_weights_are_not_computed(self):
        def fail(*_):
            raise AssertionError("called")

        loss = InstanceLoss(fail, None, fail, rate_instead_number=True)
        outputs, labels = random_batch("cpu")
        WeightedSum(loss, pixel=0, center=0)(outputs, labels).backward()

    @pytest.mark.parametrize("gradients", ["surrogate", "reference"])
    def test_is_connected_whatever_the_input(self, backend, gradients):
        for value in (-5.0, 5.0):
            outputs = torch.full((2, 1, 4, 5, 3), value, device=backend, requires_grad=True)
            labels = torch.zeros_like(outputs)
            terms = InstanceLoss(gradients=gradients)(outputs, labels)
            nothing = WeightedSum(InstanceLoss(gradients=gradients), **dict.fromkeys(TERMS, 0.0))(outputs, labels)
            for total in (*terms, nothing):
                assert torch.isfinite(total)
                (grad,) = torch.autograd.grad(total, outputs, retain_graph=True)
                assert torch.isfinite(grad).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_no_term_is_a_plain_zero(self, backend, dtype):
        """In float32 like any sum of terms, although the outputs are too large for a sum of their own."""
        outputs = torch.full((1, 1, 8, 8, 8), 6e4, device=backend, dtype=dtype, requires_grad=True)
        total = WeightedSum(InstanceLoss(), **dict.fromkeys(TERMS, 0.0))(MetaTensor(outputs), torch.zeros_like(outputs))
        assert (type(total), total.dtype, total.item()) == (torch.Tensor, torch.float32, 0)
        (grad,) = torch.autograd.grad(total, outputs)
        assert not grad.any()

    def test_bad_weights(self):
        with pytest.raises(ValueError, match=r"the name of a weight must be one of 'pixel', .*, got 'centre'"):
            WeightedSum(InstanceLoss(), centre=1.0)
        with pytest.raises(ValueError, match="got 'proximity'"):
            WeightedSum(InstanceCenterLoss(), proximity=1.0)
        with pytest.raises(ValueError, match="weight pixel must be a finite number, got inf"):
            WeightedSum(InstanceLoss(), pixel=float("inf"))
        with pytest.raises(TypeError, match=r"loss must be an InstanceLoss, .* or dICILoss, got DiceLoss"):
            WeightedSum(DiceLoss())


def test_meta_tensors_in_plain_tensors_out(backend):
    outputs, labels = random_batch(backend)
    expected = InstanceLoss()(outputs, labels)
    terms = InstanceLoss()(MetaTensor(outputs), MetaTensor(labels))
    assert all(type(value) is torch.Tensor for value in terms)
    assert terms == expected
    sum(terms).backward()
    assert outputs.grad.any()


def test_autocast_changes_nothing(backend):
    outputs, labels = random_batch(backend, torch.bfloat16)
    expected = InstanceLoss()(outputs, labels)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        terms = InstanceLoss()(outputs, labels)
    assert terms == expected
    assert all(value.dtype == torch.float32 for value in terms)


def test_labels_of_any_dtype(backend):
    outputs, labels = random_batch(backend, batch=1)
    loss = InstanceLoss(torch.nn.MSELoss(), torch.nn.MSELoss(), DiceLoss())
    expected = torch.stack(loss(outputs, labels))
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64):
        terms = torch.stack(loss(outputs, labels.to(dtype)))
        torch.testing.assert_close(terms, expected, msg=str(dtype))
        terms.sum().backward()


def test_memory_layout_does_not_matter(backend):
    outputs, labels = random_batch(backend)
    expected = InstanceLoss()(outputs, labels)
    (grad,) = torch.autograd.grad(sum(expected), outputs)
    strange = outputs.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    assert not strange.is_contiguous()
    terms = InstanceLoss()(strange, labels.expand(2, 1, 5, 4, 6))
    assert terms == expected
    (strange_grad,) = torch.autograd.grad(sum(terms), strange)
    assert torch.equal(strange_grad, grad)


def test_repeats_bitwise(backend):
    outputs, labels = random_batch(backend)
    results = []
    for _ in range(3):
        terms = InstanceLoss()(outputs, labels)
        results.append((terms, torch.autograd.grad(sum(terms), outputs)[0]))
    for terms, grad in results[1:]:
        assert terms == results[0][0]
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_non_finite_outputs_give_nan(backend, bad, activation):
    outputs, labels = random_batch(backend)
    options = {}
    if activation == "softmax":
        outputs, options = torch.cat((outputs, -outputs), 1), {"num_out_chn": 2}
    outputs = outputs.detach()
    outputs[1, 0, 3, 3, 3] = bad
    outputs.requires_grad_()
    terms = InstanceLoss(activation=activation, **options)(outputs, labels)
    assert all(value.isnan() for value in terms)
    (grad,) = torch.autograd.grad(sum(terms), outputs)
    assert grad.isnan().any()


def test_large_finite_outputs_stay_finite(backend):
    outputs, labels = random_batch(backend)
    outputs = (outputs.detach() * 3e37).requires_grad_()
    terms = InstanceLoss(DiceLoss(sigmoid=True), activation="sigmoid")(outputs, labels)
    assert all(torch.isfinite(value) for value in terms)
    outputs = (outputs.detach() / 3e33).requires_grad_()
    terms = InstanceLoss(activation="none")(outputs, labels)
    assert all(torch.isfinite(value) for value in terms)
    (grad,) = torch.autograd.grad(sum(terms), outputs)
    assert torch.isfinite(grad).all()


def test_second_derivative_raises(backend):
    outputs, labels = random_batch(backend)
    terms = InstanceLoss()(outputs, labels)
    (grad,) = torch.autograd.grad(terms.instance_label, outputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# Where the gradient is the true derivative: soft outputs in the terms that are smooth in them. The other terms are step
# functions, and their true derivative is the published one, zero; so are all instance terms of hard outputs.
TRUE_DERIVATIVES = [
    ("none", "surrogate", ("pixel", "instance_label", "instance_output", "proximity")),
    ("none", "reference", TERMS),
    ("sigmoid", "reference", TERMS),
]


def stacked(terms, names):
    return torch.stack([getattr(terms, name) for name in names])


@pytest.mark.parametrize(("activation", "gradients", "terms"), TRUE_DERIVATIVES)
@pytest.mark.parametrize("criterion", [None, torch.nn.MSELoss()], ids=["dice", "mse"])
def test_gradcheck(backend, activation, gradients, terms, criterion):
    outputs, labels = random_batch(backend, torch.float64, shape=(3, 4, 3))
    if activation == "none":
        # Far enough from the threshold that no finite difference changes the instances.
        outputs = outputs.detach().sigmoid()
        outputs = torch.where((outputs - 0.5).abs() < 0.01, 0.6, outputs).requires_grad_()
    # With no_tp instance_label holds a * stopgrad(a), whose derivative no finite difference gives.
    options = {"instance_wise_loss_no_tp": False, "mul_too_many": 100}
    loss = InstanceLoss(None, criterion, activation=activation, gradients=gradients, **options)
    # The interpreter takes a second a call, so there one random direction stands for all elements.
    interpreted = os.environ["TRITON_INSTANCE_LOSS_BACKEND"] == "triton" and backend.type == "cpu"
    assert torch.autograd.gradcheck(
        lambda x: stacked(loss(x, labels), terms),
        outputs,
        nondet_tol=1e-12 if backend.type == "cuda" else 0.0,
        fast_mode=interpreted,
    )


def test_softmax_pixel_gets_the_activated_output(backend):
    seen = []

    def pixel(outputs, labels):
        seen.append((outputs.detach(), labels))
        return (outputs * labels).mean()

    outputs = torch.randn(2, 3, 4, 5, 3, device=backend, requires_grad=True)
    labels = (torch.rand(2, 3, 4, 5, 3, device=backend) > 0.5).float()
    terms = InstanceLoss(pixel, activation="softmax", num_out_chn=3, object_chn=2)(outputs, labels)
    expected = (torch.softmax(outputs, 1)[:, 2:] >= 1 / 3).float()
    assert torch.equal(seen[0][0], expected)
    assert torch.equal(seen[0][1], labels[:, 2:])
    (grad,) = torch.autograd.grad(terms.pixel, outputs)
    assert grad.any()


def test_no_warning_with_recognised_criteria(backend):
    outputs, labels = random_batch(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InstanceLoss(DiceLoss(), DiceLoss(), DiceLoss())(outputs, labels)


def test_a_threshold_that_rounds_to_zero_is_zero(backend):
    """With "none" and a threshold of 0, outputs are foreground where they are 1."""
    outputs = torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.0, 3.0]).view(1, 1, 1, 6).to(backend)
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 6).to(backend)
    tiny, zero = (
        torch.stack(InstanceLoss(spatial_dims=2, activation="none", segmentation_threshold=threshold)(outputs, labels))
        for threshold in (1e-60, 0.0)
    )
    assert torch.equal(tiny, zero)


@pytest.mark.parametrize("spacing", [None, (0.7, 0.7), (2.0, 2.0)])
def test_voxels_that_are_as_long_as_wide_need_no_spacing(backend, spacing):
    outputs, labels = random_batch(backend, shape=(9, 12))
    plain = InstanceLoss(spatial_dims=2)(outputs, labels)
    spaced = InstanceLoss(spatial_dims=2, spacing=spacing)(outputs, labels)
    assert plain.center == spaced.center
    torch.testing.assert_close(spaced.proximity, plain.proximity, rtol=1e-6, atol=0.0)


def test_spacing_of_center_boxes_and_distances(backend):
    """Two voxels, three columns apart, of an image whose rows are three times as far from each other as its columns."""
    outputs, labels = torch.zeros(2, 1, 1, 9, 9, device=backend).unbind()
    outputs[..., 4, 1], labels[..., 4, 4] = 1, 1
    terms = {}
    for spacing in (None, (3.0, 1.0), (1.0, 3.0)):
        loss = InstanceLoss(activation="none", spatial_dims=2, centroid_offset=1.0, spacing=spacing)
        terms[spacing] = loss(outputs, labels)
    # Boxes [c - o - 1, c + o) reach, rounded up, o = 1 row and column; 2 / 3 of a row and 2 columns; 2 rows and 2 / 3
    # of a column. Columns 0..1 (clipped) and 2..4 share none, columns 0..2 and 1..5 two, in three rows.
    assert terms[None].center == pytest.approx(1.0, abs=1e-4)
    assert terms[1.0, 3.0].center == pytest.approx(1.0, abs=1e-4)
    assert terms[3.0, 1.0].center == pytest.approx(1 - 2 * 6 / (9 + 15), abs=1e-4)
    # Extended boxes have rows 2..4, and columns 0..1 (clipped) and 2..4: their centres are columns 1 and 4, there are 5
    # columns and 3 rows around both, and no voxel is shared.
    distances = {None: 1 + 9 / (9 + 25), (3.0, 1.0): 1 + 9 / (81 + 25), (1.0, 3.0): 1 + 81 / (9 + 225)}
    for spacing, distance in distances.items():
        loss = InstanceLoss(None, _only_labels, activation="none", spatial_dims=2, spacing=spacing)
        assert loss(outputs, labels).proximity == pytest.approx(distance**2, rel=1e-5), spacing


def _only_labels(u, w):
    """1 of an instance that has a label, and else 0, so that nothing is taken away from the distances of labels."""
    return w.max() + 0 * u.sum()
