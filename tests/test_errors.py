"""Bad input: one clear error each, naming the argument, its value and what is allowed."""

import math
import re

import pytest
import torch
from backends import VARIABLE

from triton_instance_loss import InstanceLoss, checks, connected_components, dispatch, functional

OPTIONS = [
    ({"activation": "relu"}, ValueError, "activation must be one of 'sigmoid', 'softmax', 'none', got 'relu'"),
    ({"activation": None}, ValueError, "activation must be one of 'sigmoid', 'softmax', 'none', got None"),
    ({"reduce_segmentation": "max"}, ValueError, "reduce_segmentation must be one of 'mean', 'sum', got 'max'"),
    ({"instance_wise_reduce": "batch"}, ValueError, "instance_wise_reduce must be one of 'instance', 'data', got"),
    ({"gradients": "none"}, ValueError, "gradients must be one of 'surrogate', 'log', 'reference', got 'none'"),
    ({"num_out_chn": 0}, ValueError, "num_out_chn must be an integer of at least 1, got 0"),
    ({"num_out_chn": 1.0}, TypeError, "num_out_chn must be an integer of at least 1, got 1.0"),
    ({"activation": "softmax"}, ValueError, "num_out_chn must be an integer of at least 2, got 1"),
    (
        {"num_out_chn": 3, "object_chn": 3},
        ValueError,
        "object_chn must be a channel from 0 to 2 (num_out_chn=3), got 3",
    ),
    ({"object_chn": -1}, ValueError, "object_chn must be an integer of at least 0, got -1"),
    ({"object_chn": "lesion"}, TypeError, "object_chn must be an integer of at least 0, got 'lesion'"),
    ({"num_out_chn": 3, "object_chn": [1, 3]}, ValueError, "object_chn must be a channel from 0 to 2 (num_out_chn=3)"),
    ({"num_out_chn": 3, "object_chn": [1, 1]}, ValueError, "object_chn must be one channel or several different ones"),
    ({"num_out_chn": 3, "object_chn": []}, ValueError, "object_chn must be one channel or several different ones of"),
    ({"object_chn": [0, 1]}, ValueError, "object_chn must be one channel or several different ones of num_out_chn=1"),
    ({"to_onehot_y": 1}, TypeError, "to_onehot_y must be True or False, got 1"),
    ({"ignore_index": "255"}, TypeError, "ignore_index must be a finite number, got '255'"),
    ({"ignore_index": 1}, ValueError, "ignore_index must not be a label of foreground, (1,), got 1"),
    (
        {"num_out_chn": 3, "object_chn": 2, "to_onehot_y": True, "ignore_index": 2},
        ValueError,
        "ignore_index must not be a label of foreground, (2,), got 2",
    ),
    (
        {"ignore_index": 2, "segmentation_threshold": 0},
        ValueError,
        "segmentation_threshold must be above 0 where voxels are ignored",
    ),
    ({"process_group": 0}, TypeError, 'process_group must be None, "world" or a torch.distributed.ProcessGroup, got 0'),
    ({"spatial_dims": 1}, ValueError, "spatial_dims must be an integer of at least 2, got 1"),
    ({"spatial_dims": 4}, ValueError, "spatial_dims must be 2 or 3, got 4"),
    ({"num_iterations": 0}, ValueError, "num_iterations must be an integer of at least 1, got 0"),
    ({"num_iterations": True}, TypeError, "num_iterations must be an integer of at least 1, got True"),
    (
        {"segmentation_threshold": 1.5},
        ValueError,
        "segmentation_threshold must be a finite number of at most 1, got 1.5",
    ),
    ({"segmentation_threshold": float("nan")}, ValueError, "segmentation_threshold must be a finite number"),
    ({"segmentation_threshold": "0.5"}, TypeError, "segmentation_threshold must be a finite number"),
    ({"max_cc_out": -1}, ValueError, "max_cc_out must be an integer of at least 0, got -1"),
    ({"mul_too_many": -0.5}, ValueError, "mul_too_many must be a finite number of at least 0, got -0.5"),
    ({"min_instance_size": -2}, ValueError, "min_instance_size must be an integer of at least 0, got -2"),
    (
        {"spacing": 2.0},
        TypeError,
        "spacing must be a positive number for each of 3 axes (spatial_dims=3), or None",
    ),
    (
        {"spacing": (1, 1)},
        ValueError,
        "spacing must be a positive number for each of 3 axes (spatial_dims=3), got 2",
    ),
    ({"spacing": (1, 0, 1)}, ValueError, "spacing[1] must be a finite number above 0, got 0"),
    ({"spacing": (1, 1, -2.0)}, ValueError, "spacing[2] must be a finite number above 0, got -2.0"),
    ({"spacing": (1, 1, math.nan)}, ValueError, "spacing[2] must be a finite number above 0, got nan"),
    ({"centroid_offset": -1}, ValueError, "centroid_offset must be a finite number of at least 0, got -1"),
    ({"smoother": 0}, ValueError, "smoother must be a finite number above 0, got 0"),
    ({"instance_wise_loss_no_tp": 1}, TypeError, "instance_wise_loss_no_tp must be True or False, got 1"),
    ({"rate_instead_number": "yes"}, TypeError, "rate_instead_number must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        InstanceLoss(**options)
    with pytest.raises(error, match=re.escape(message)):
        functional.false_instance_rate_loss(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4), **options)


VOLUME = (2, 1, 4, 5, 3)
TENSORS = [
    (torch.zeros(2, 1, 4, 5), None, None, ValueError, "outputs must have shape (B, N, H, W, D) for spatial_dims=3"),
    (torch.zeros(VOLUME, dtype=torch.int64), None, None, TypeError, "outputs must be float16, bfloat16, float32 or"),
    (torch.zeros(VOLUME, dtype=torch.complex64), None, None, TypeError, "outputs must have a real dtype, got torch.c"),
    (torch.zeros(VOLUME).to_sparse(), None, None, TypeError, "outputs must be a dense tensor, got layout"),
    ([0.0], None, None, TypeError, "outputs must be a torch.Tensor, got list"),
    (torch.zeros(0, 1, 4, 5, 3), None, None, ValueError, "outputs must have at least one element along every axis"),
    (torch.zeros(2, 1, 4, 0, 3), None, None, ValueError, "outputs must have at least one element along every axis"),
    (torch.zeros(2, 2, 4, 5, 3), None, None, ValueError, "outputs must have num_out_chn=1 channels, got 2"),
    (None, torch.zeros(2, 1, 4, 5, 4), None, ValueError, "labels must have shape (2, 1, 4, 5, 3) beside outputs of"),
    (None, torch.zeros(1, 1, 4, 5, 3), None, ValueError, "labels must have shape (2, 1, 4, 5, 3) beside outputs of"),
    (
        None,
        torch.zeros(VOLUME, device="meta"),
        None,
        ValueError,
        "labels must be on the device of outputs, cpu, got meta",
    ),
    (None, torch.zeros(VOLUME, dtype=torch.complex64), None, TypeError, "labels must have a real dtype"),
    (None, torch.zeros(VOLUME).to(torch.float8_e5m2), None, TypeError, "labels must have a dtype that can be compared"),
    (None, None, torch.zeros(2, 4, 5, 3), ValueError, "cc_label_batch must have shape (2, 1, 4, 5, 3) beside"),
    (None, None, torch.full(VOLUME, -1), ValueError, "cc_label_batch must hold whole numbers >= 0, got -1"),
    (None, None, torch.full(VOLUME, 0.5), ValueError, "cc_label_batch must hold whole numbers >= 0, got 0.5"),
    (None, None, torch.full(VOLUME, float("nan")), ValueError, "cc_label_batch must hold whole numbers >= 0, got nan"),
    (None, None, torch.full(VOLUME, float("inf")), ValueError, "cc_label_batch must hold whole numbers >= 0, got inf"),
]


@pytest.mark.parametrize(("outputs", "labels", "ids", "error", "message"), TENSORS, ids=lambda value: str(value)[:40])
def test_tensors(outputs, labels, ids, error, message):
    outputs = torch.zeros(VOLUME) if outputs is None else outputs
    labels = torch.zeros(VOLUME) if labels is None else labels
    with pytest.raises(error, match=re.escape(message)):
        InstanceLoss()(outputs, labels, ids)


def test_too_many_samples_of_classes():
    outputs = torch.zeros(1, 4, 1, 1).expand(10923, 4, 1, 1)
    loss = InstanceLoss(spatial_dims=2, num_out_chn=4, object_chn=(1, 2, 3), activation="softmax")
    with pytest.raises(ValueError, match="outputs must have at most 10922 samples with 3 classes, got 10923"):
        loss(outputs, outputs)


def test_too_many_voxels():
    outputs = torch.zeros(1).expand(1, 1, 2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 voxels a sample, got 2147483648"):
        InstanceLoss()(outputs, outputs)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 voxels a sample, got 2147483648"):
        connected_components(outputs)


def test_too_many_samples():
    outputs = torch.zeros(1).expand(32768, 1, 2, 2)
    with pytest.raises(ValueError, match="outputs must have at most 32767 samples, got 32768"):
        InstanceLoss(spatial_dims=2)(outputs, outputs)


@pytest.mark.parametrize("name", ["loss_function_pixel", "loss_function_instance", "loss_function_center"])
@pytest.mark.filterwarnings("ignore:.*no fused form")
def test_criteria(name):
    outputs = torch.randn(VOLUME)
    labels = (outputs > 0.5).float()
    with pytest.raises(
        TypeError, match=re.escape(f"{name} must be a callable loss(outputs, labels), or None for Dice")
    ):
        InstanceLoss(**{name: "dice"})
    with pytest.raises(TypeError, match=f"{name} must return a 0-d tensor, got float"):
        InstanceLoss(**{name: lambda u, w: 1.0})(outputs, labels)
    with pytest.raises(ValueError, match=re.escape(f"{name} must return a 0-d tensor, got shape ")):
        InstanceLoss(**{name: lambda u, w: u - w})(outputs, labels)


def test_cross_entropy_needs_probabilities():
    loss = InstanceLoss(None, torch.nn.BCELoss(), activation="none")
    labels = torch.zeros(VOLUME)
    with pytest.raises(ValueError, match=re.escape("a cross entropy and needs outputs in [0, 1], got [-2.0, 3.0]")):
        loss(torch.linspace(-2, 3, labels.numel()).view(VOLUME), labels)
    with pytest.raises(ValueError, match="loss_function_center must take values of 1 \\+ smoother"):
        InstanceLoss(None, None, torch.nn.BCELoss())
    with pytest.raises(ValueError, match="criterion must take values of 1 \\+ smoother"):
        functional.instance_center_loss(labels, labels, criterion=torch.nn.BCELoss())


MASKS = [
    (torch.zeros(2, 2, 4, 4), ValueError, "mask must have one channel, (B, 1, *spatial), got (2, 2, 4, 4)"),
    (torch.zeros(4, 4), ValueError, "mask must have shape (B, N, H, W, D)"),
    (torch.zeros(1, 1, 0, 4), ValueError, "mask must have at least one element along every axis"),
    (torch.zeros(1, 1, 4, 4, dtype=torch.complex64), TypeError, "mask must have a real dtype"),
    (None, TypeError, "mask must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize(("mask", "error", "message"), MASKS, ids=lambda value: str(value)[:40])
def test_masks(mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        connected_components(mask)


def test_component_options():
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="num_iterations must be an integer of at least 1, got 0"):
        connected_components(mask, 0)
    with pytest.raises(TypeError, match="relabel must be True or False, got 1"):
        connected_components(mask, relabel=1)


def test_backend_variable(monkeypatch):
    tensor = torch.zeros(1)
    monkeypatch.setenv(VARIABLE, "numpy")
    with pytest.raises(ValueError, match=r"TRITON_INSTANCE_LOSS_BACKEND must be 'cpu' or 'triton'.*got 'numpy'"):
        dispatch.backend(tensor)
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        dispatch.backend(tensor)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'meta'"):
        dispatch.backend(torch.zeros(1, device="meta"))


def test_cuda_without_triton(monkeypatch):
    """A tensor that says it is on CUDA stands for one: the check looks at nothing else."""

    class Cuda:
        device = torch.device("cuda", 0)

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_TRITON_IS_INSTALLED", False)
    with pytest.raises(RuntimeError, match="Tensors on cuda:0 need the package 'triton', which is not installed"):
        dispatch.backend(Cuda())
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(ValueError, match="works on CPU tensors only, got a tensor on cuda:0"):
        dispatch.backend(Cuda())


def test_debug_switch_is_what_looks_at_cuda(monkeypatch):
    class Cuda:
        device = torch.device("cuda", 0)

    monkeypatch.delenv(checks.DEBUG_VARIABLE, raising=False)
    assert not checks.debugging(Cuda())
    monkeypatch.setenv(checks.DEBUG_VARIABLE, "1")
    assert checks.debugging(Cuda())
