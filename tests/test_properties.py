"""The library equals the reference on random volumes and options: every value, and the gradient of every term."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import using_backend
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss, TverskyLoss
from reference import TERMS, reference_components, reference_details
from tolerance import assert_close
from torch import Tensor

from triton_instance_loss import InstanceLoss, connected_components

MARGIN = 0.01  # probabilities for cross entropy stay this far from 0 and 1
SPACINGS = (3.0, 0.5, 1.0), (0.25, 0.75, 0.25), (2.0, 2.0, 2.0)  # distances are exact in them, as in voxels


def broadcast_mse(prediction, label):
    """MSE that takes one label channel beside several output channels, without torch's warning."""
    return ((prediction - label) ** 2).mean()


def any_loss(prediction, label):
    """Compute a loss that the library has no fused form of: it is called volume by volume."""
    return ((prediction - label) ** 2 * (1 + label)).sum() / (1 + label.sum() + (prediction**2).sum())


CRITERIA = {
    "our dice": None,
    "dice": DiceLoss(),
    "jaccard": DiceLoss(jaccard=True),
    "squared dice": DiceLoss(squared_pred=True),
    "tversky": TverskyLoss(alpha=0.3, beta=0.7),
    "any": any_loss,
    "smooth dice": DiceLoss(smooth_nr=0.5, smooth_dr=2.0),
    "mse": torch.nn.MSELoss(),
    "mse sum": torch.nn.MSELoss(reduction="sum"),
    "l1": torch.nn.L1Loss(),
    "bce": torch.nn.BCELoss(),
}
CENTER_CRITERIA = {name: CRITERIA[name] for name in ("our dice", "dice", "squared dice", "any", "mse", "l1")}

# Where the instances of a mask are. The last three look at another mask, see `draw_output_mask`.
MASKS = ("empty", "one voxel", "full", "border", "corners", "sparse", "dense", "blobs", "bars")
OUTPUT_MASKS = (*MASKS, "same", "shifted", "flipped")


@dataclass
class Case:
    """Tensors and options of one call; `criterion` is the name of loss_function_instance."""

    outputs: Tensor  # float64, every value exact in float32
    labels: Tensor
    ids: Tensor | None
    options: dict[str, Any]
    criterion: str
    dtype: torch.dtype
    weights: list[float]

    def __repr__(self):
        lines = [f"{name} = {value!r}" for name, value in vars(self).items()]
        return "Case(\n  " + "\n  ".join(lines) + "\n)"


def draw_mask(kind: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Foreground of one sample, bool of `shape`."""
    mask = torch.zeros(shape, dtype=torch.bool)
    noise = torch.rand(shape, generator=generator)
    if kind == "one voxel":
        mask.view(-1)[torch.randint(mask.numel(), (), generator=generator)] = True
    elif kind == "full":
        mask[:] = True
    elif kind == "border":
        inside = F.pad(torch.ones([max(size - 2, 0) for size in shape], dtype=torch.bool), [1] * (2 * len(shape)))
        mask = ~inside[tuple(slice(0, size) for size in shape)] & (noise < 0.8)
    elif kind == "corners":  # neighbours touch at corners or edges only
        parity = sum(torch.arange(size).reshape([-1] + [1] * (len(shape) - d - 1)) for d, size in enumerate(shape))
        mask = (parity % 2 == 0).expand(shape) & (noise < 0.7)
    elif kind == "sparse":
        mask = noise < 0.1
    elif kind == "dense":
        mask = noise < 0.35
    elif kind == "blobs":
        pool = F.avg_pool3d if len(shape) == 3 else F.avg_pool2d
        smooth = pool(F.pad(noise[None, None], [1] * (2 * len(shape)), value=0.5), kernel_size=3, stride=1)[0, 0]
        mask = smooth > 0.56
    elif kind == "bars":  # long instances, which few rounds of pooling cut
        mask = (torch.arange(shape[0]).reshape([-1] + [1] * (len(shape) - 1)) % 3 == 0).expand(shape) & (noise < 0.9)
    return mask.contiguous()


def draw_output_mask(kind: str, label: Tensor, generator: torch.Generator) -> Tensor:
    """Foreground of one sample of the outputs, on its own or like that of the label."""
    if kind == "same":
        return label.clone()
    if kind == "shifted":
        return torch.roll(label, shifts=[1] * label.ndim, dims=list(range(label.ndim)))
    if kind == "flipped":
        return label ^ (torch.rand(label.shape, generator=generator) < 0.15)
    return draw_mask(kind, list(label.shape), generator)


def draw_ids(kind: str, labels: Tensor, generator: torch.Generator) -> Tensor | None:
    """Precomputed components of (B, 1, *spatial) labels, or None."""
    if kind == "none":
        return None
    if kind == "any":  # not components at all: scattered, also outside the labels, and missing on some of them
        return torch.randint(5, labels.shape, generator=generator)
    ids = reference_components(labels > 0.5)
    largest = int(ids.max())
    top = {"big": 2**30, "float32": 2**24, "int16": 2**15 - 1}[kind]
    # Another order, and some components share a number.
    numbers = torch.randint(1, top, (largest + 1,), generator=generator)
    numbers[torch.rand(largest + 1, generator=generator) < 0.1] = 3
    numbers[0] = 0
    ids = numbers[ids] * (2**33 if kind == "big" else 1)  # 0 in 32 bits
    return ids.to({"big": torch.int64, "float32": torch.float32, "int16": torch.int16}[kind])


def draw_outputs(
    masks: Tensor, activation: str, channels: int, threshold: float | None, kind: str, generator: torch.Generator
) -> Tensor:
    """One channel that is foreground on `masks` as far as activation and threshold allow it; the others are 0."""
    noise = torch.rand(masks.shape, generator=generator)
    if activation != "none":
        threshold = (0.5 if activation == "sigmoid" else 1 / channels) if threshold is None else threshold
        middle = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else 0.0
        if activation == "softmax" and middle != 0.0:
            middle = 0.0 if threshold == 1 / channels else middle + math.log(channels - 1)
        outputs = middle + torch.where(masks, 0.05 + 4 * noise, -0.05 - 4 * noise)
        if kind == "ties" and middle == 0:
            outputs = torch.where(masks, 0.0, outputs)
        return outputs.double()
    if kind == "hard" or (threshold is not None and threshold <= 0):
        return torch.where(masks, 1.0, 0.0 if kind == "hard" else 0.9 * noise).double()
    threshold = min(0.5 if threshold is None else threshold, 0.95)
    inside = threshold + 0.01 + (0.99 - threshold) * noise
    if kind == "ties":  # exactly at the threshold, which counts
        inside = torch.where(noise < 0.5, threshold, inside)
    if kind == "raw":  # not probabilities
        inside, noise = inside + 20 * noise, noise - 5 * noise**2
    return torch.where(masks, inside, (threshold - 0.01) * noise).double()


@st.composite
def cases(draw, max_voxels=240, max_size=13):
    """Draw a case. Hypothesis makes the choices; a drawn seed fills the volumes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    spatial_dims = draw(st.sampled_from([2, 3]))
    shape = []
    for _ in range(spatial_dims):
        shape.append(draw(st.integers(1, min(max_size, max(1, max_voxels // math.prod(shape))))))
    shape = draw(st.permutations(shape))
    batch = draw(st.integers(1, 3))
    activation = draw(st.sampled_from(["none", "sigmoid", "softmax"]))
    channels = draw(st.integers(2, 3) if activation == "softmax" else st.sampled_from([1, 1, 1, 2]))
    criterion = draw(st.sampled_from(list(CRITERIA)))
    threshold = draw(st.sampled_from([None, None, 0.5, 0.25, 0.75, 0.7, 0.0, 1.0, -0.5]))
    kinds = ["soft", "hard"]
    if threshold is None or (threshold in (0.5, 0.25, 0.75) and activation != "softmax"):  # exact in float32
        kinds += ["ties", "ties"]
    if criterion in ("any", "mse", "l1"):  # well conditioned whatever the outputs are
        kinds.append("raw")
    kind = draw(st.sampled_from(kinds))

    label_kinds = draw(st.lists(st.sampled_from(MASKS), min_size=batch, max_size=batch))
    output_kinds = draw(st.lists(st.sampled_from(OUTPUT_MASKS), min_size=batch, max_size=batch))
    label_masks = torch.stack([draw_mask(label_kind, shape, generator) for label_kind in label_kinds])
    output_masks = torch.stack(
        [draw_output_mask(k, mask, generator) for k, mask in zip(output_kinds, label_masks, strict=True)]
    )

    object_chn = draw(st.integers(0, channels - 1)) if channels > 1 else 1
    channel = object_chn if channels > 1 else 0
    outputs = torch.rand((batch, channels, *shape), generator=generator).double() * (0.9 if activation == "none" else 0)
    outputs[:, channel] = draw_outputs(output_masks, activation, channels, threshold, kind, generator)
    if activation == "none" and criterion == "bce":
        outputs = outputs.clamp(MARGIN, 1 - MARGIN)

    labels = label_masks[:, None]
    if channels > 1 and draw(st.booleans(), label="one label channel for each output channel"):
        labels = torch.rand((batch, channels, *shape), generator=generator) < 0.3
        labels[:, channel] = label_masks
    labels = labels.to(draw(st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool])))
    if labels.dtype.is_floating_point and draw(st.booleans(), label="labels are neither 0 nor 1"):  # resampled ones
        away = torch.rand(labels.shape, generator=generator, dtype=labels.dtype) * 0.7 - 0.25
        labels = labels + torch.where(away > 0, away, 0).where(labels == 0, -away)

    id_kind = draw(st.sampled_from(["none", "none", "none", "any", "big", "float32", "int16"]))
    label_channel = channel if labels.shape[1] > 1 else 0
    ids = draw_ids(id_kind, labels[:, label_channel : label_channel + 1], generator)

    pixel = draw(st.sampled_from([None, broadcast_mse, torch.nn.BCEWithLogitsLoss()] if channels == 1 else [None]))
    if pixel is None and channels > 1 and activation != "softmax" and draw(st.booleans()):
        pixel = broadcast_mse
    if pixel is None and activation == "softmax" and draw(st.booleans()):
        pixel = DiceLoss()
    options = {
        "loss_function_pixel": pixel,
        "loss_function_instance": CRITERIA[criterion],
        "loss_function_center": draw(st.sampled_from(list(CENTER_CRITERIA.values()))),
        "activation": activation,
        "num_out_chn": channels,
        "object_chn": object_chn,
        "spatial_dims": spatial_dims,
        "reduce_segmentation": draw(st.sampled_from(["mean", "sum"])),
        "instance_wise_reduce": draw(st.sampled_from(["instance", "data"])),
        "num_iterations": draw(st.sampled_from([None, None, 1, 2, 3])),
        "segmentation_threshold": threshold,
        "max_cc_out": draw(st.sampled_from([50, 0, 1, 2])),
        "mul_too_many": draw(st.sampled_from([50, 50, 1, 0.5, 2, 0])),
        "min_instance_size": draw(st.sampled_from([0, 0, 1, 2, 3])),
        "centroid_offset": draw(st.integers(0, 6)),
        "smoother": draw(st.sampled_from([1e-7, 1e-3])),
        "instance_wise_loss_no_tp": draw(st.booleans()),
        "rate_instead_number": draw(st.booleans()),
        "gradients": draw(st.sampled_from(["surrogate", "surrogate", "log", "log", "reference"])),
        "spacing": draw(st.sampled_from([None, None, *SPACINGS])),
    }
    if options["spacing"] is not None:
        options["spacing"] = options["spacing"][:spatial_dims]
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    weights = draw(st.lists(st.sampled_from([1.0, -2.0, 0.5, 3.0]), min_size=len(TERMS), max_size=len(TERMS)))
    return Case(outputs.float().double(), labels, ids, options, criterion, dtype, weights)


def gradient_of(value: Tensor, x: Tensor) -> Tensor:
    """Gradient with respect to x; zeros where the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, x, retain_graph=True, materialize_grads=True)[0]


def check(case: Case, device: torch.device) -> None:
    """Compare the library with the reference: values, the gradient of each weighted term, and that of their sum."""
    truth_x = case.outputs.clone().requires_grad_()
    truth, samples = reference_details(truth_x, case.labels, case.ids, **case.options)

    x = case.outputs.to(device=device, dtype=case.dtype).requires_grad_()
    ids = None if case.ids is None else case.ids.to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a criterion is evaluated volume by volume
        terms = InstanceLoss(**case.options)(x, case.labels.to(device), ids)

    # A sum over instances and a square: errors grow with what is summed, before the two sums are subtracted. That of a
    # gradient of an instance, relative to 1 as everywhere, is multiplied by what is squared.
    masses = [(sample.label_sum.abs() + sample.output_sum.abs()).item() for sample in samples]
    scales = dict.fromkeys(TERMS, 1.0) | {"proximity": max(mass**2 for mass in masses)}
    sides = [
        sum(gradient_of(side, truth_x).abs() for side in (sample.label_sum, sample.output_sum)) for sample in samples
    ]
    gradient_scales = dict.fromkeys(TERMS, 1.0) | {
        "proximity": max(mass * max(1.0, side.max()) for mass, side in zip(masses, sides, strict=True))
    }

    assert terms._fields == TERMS
    for name, value in terms._asdict().items():
        assert value.shape == ()
        assert value.dtype == case.dtype
        assert_close(value, truth[name], case.dtype, scales[name], name)

    # At 0 and 1 the derivative of the cross entropy is whatever its clamp makes of it: no number worth agreeing on.
    binary = case.options["activation"] != "none"
    clamped = {"instance_label", "instance_output", "proximity"} if case.criterion == "bce" and binary else set()
    compared = [(name, weight) for name, weight in zip(TERMS, case.weights, strict=True) if name not in clamped]
    total, truth_total, total_scale = 0, 0, 0.0
    for name, weight in compared:
        scale = abs(weight) * float(gradient_scales[name])
        value, expected = weight * getattr(terms, name), weight * truth[name]
        assert_close(gradient_of(value, x), gradient_of(expected, truth_x), case.dtype, scale, f"gradient of {name}")
        total, truth_total, total_scale = total + value, truth_total + expected, total_scale + scale
    assert_close(gradient_of(total, x), gradient_of(truth_total, truth_x), case.dtype, total_scale, "gradient of all")


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=320, suppress_health_check=QUIET)
@given(case=cases())
def test_cpu_equals_the_reference(case):
    note(repr(case))
    with using_backend("cpu") as device:
        check(case, device)


# Interpreted, shrinking a failure takes minutes; `test_cpu_equals_the_reference` finds most smaller.
@settings(max_examples=40, suppress_health_check=QUIET, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(case=cases(max_voxels=48, max_size=6))
def test_triton_equals_the_reference(case):
    note(repr(case))
    with using_backend("triton") as device:
        check(case, device)


@pytest.mark.parametrize("backend_name", ["cpu", "triton"])
@settings(max_examples=40, suppress_health_check=QUIET)
@given(
    kind=st.sampled_from(MASKS),
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    batch=st.integers(1, 3),
    rounds=st.sampled_from([None, 1, 2, 3, 5]),
    seed=st.integers(0, 2**16),
)
def test_components_equal_the_reference(backend_name, kind, shape, batch, rounds, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([draw_mask(kind, shape, generator) for _ in range(batch)])[:, None]
    with using_backend(backend_name) as device:
        ids = connected_components(mask.to(device), num_iterations=rounds)
    assert ids.shape == mask.shape
    assert torch.equal(ids.cpu().long(), reference_components(mask, rounds))


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_makes_every_term_nan(activation, value, backend):
    channels = 2 if activation == "softmax" else 1
    outputs = torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(0)).to(backend)
    outputs[1, 0, 2, 3] = value
    loss = InstanceLoss(activation=activation, num_out_chn=channels, object_chn=channels - 1, spatial_dims=2)
    assert all(math.isnan(term) for term in loss(outputs, torch.ones(2, 1, 5, 7, device=backend)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_raw_values_of_any_size(dtype, backend):
    """Sums over values of 10^4 and of both signs lose nothing that the result needs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([draw_mask("blobs", [9, 10, 11], generator) for _ in range(2)])[:, None]
    outputs = 1e4 * torch.randn(labels.shape, generator=generator)
    options = {"activation": "none", "loss_function_instance": torch.nn.MSELoss(), "gradients": "surrogate"}
    truth_x = outputs.double().requires_grad_()
    truth, _ = reference_details(truth_x, labels, **options)
    x = outputs.to(backend, dtype).requires_grad_()
    terms = InstanceLoss(**options)(x, labels.to(backend))
    for name in ("instance_label", "instance_output", "false_instances", "missed_instances"):
        value = getattr(terms, name)
        assert_close(value, truth[name], dtype, what=name)
        assert_close(gradient_of(value, x), gradient_of(truth[name], truth_x), dtype, what=f"gradient of {name}")


def test_one_huge_value_is_finite(backend):
    """Nothing overflows on the way that the result does not need."""
    outputs = torch.full((1, 1, 4, 4), 3e38, device=backend)
    terms = InstanceLoss(activation="none", spatial_dims=2)(outputs, torch.zeros(1, 1, 4, 4, device=backend))
    assert terms.false_instances.item() == 1
