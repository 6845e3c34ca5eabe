"""How component losses are called: gradients, the compiler, frameworks, copies, changed arguments, errors."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from component_cases import batch, each_kind, every_loss, make, value_and_gradient
from monai.bundle import ConfigParser
from monai.data import MetaTensor

import triton_instance_loss
from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss

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
