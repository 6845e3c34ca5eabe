"""Several losses on one scene give what each gives alone, and label once; the losses of 2023 in sums."""

import copy
import json
import pickle
from collections import Counter

import pytest
import torch
from component_cases import batch, value_and_gradient
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from triton_instance_loss import (
    BlobLoss,
    CCLoss,
    CombinedLoss,
    ComponentTverskyLoss,
    FalseComponentLoss,
    ICILoss,
    InstanceLoss,
    WeightedSum,
    dICILoss,
)


class Operators(TorchDispatchMode):
    """Counts our operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "triton_instance_loss":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def family(**options):
    return WeightedSum(InstanceLoss(rate_instead_number=True, **options), proximity=0.1)


def all_of_them(**options):
    return {
        "blob": BlobLoss(**options),
        "cc": CCLoss(**options),
        "bicc": CCLoss(alpha=0.5, smooth=1.0, **options),
        "cat": ComponentTverskyLoss(**options),
        "false": FalseComponentLoss(**options),
        "family": family(**options),
    }


OPTIONS = {
    "sigmoid": ({}, 1),
    "none": ({"activation": "none"}, 1),
    "softmax": ({"activation": "softmax", "num_out_chn": 3, "object_chn": (0, 2)}, 3),
    "ignored": ({"ignore_index": 7}, 1),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_each_as_it_is_alone(options, backend):
    options, channels = OPTIONS[options]
    options = options | {"spatial_dims": 2}
    outputs, labels = batch((2, channels, 9, 8), probabilities="activation" in options and channels == 1)
    if "ignore_index" in options:
        labels[..., :2] = 7
    outputs, labels = outputs.to(backend), labels.to(backend)
    weights = {"blob": 2.0, "cc": 0.5, "family": 3.0}
    loss = CombinedLoss(all_of_them(**options), weights)
    value, gradient = value_and_gradient(loss, outputs, labels)
    expected, expected_gradient = 0.0, 0.0
    for name, each in all_of_them(**options).items():
        alone, slope = value_and_gradient(each, outputs, labels)
        assert_close(loss.parts[name], alone, torch.float64, what=name)
        expected = expected + weights.get(name, 1.0) * alone
        expected_gradient = expected_gradient + weights.get(name, 1.0) * slope
    assert_close(value, expected, torch.float64, 10)
    assert_close(gradient, expected_gradient, torch.float64, 10)


@pytest.mark.parametrize("with_ids", [False, True])
def test_given_components_and_ignored_voxels(with_ids, backend):
    outputs, labels = (each.to(backend) for each in batch((2, 1, 9, 8)))
    ids = (torch.arange(9, device=backend)[:, None] + torch.ones_like(labels)) if with_ids else None
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    ignored[..., 3:5] = True
    loss = CombinedLoss(all_of_them(spatial_dims=2))
    loss(outputs, labels, ids, ignore_mask=ignored)
    for name, each in all_of_them(spatial_dims=2).items():
        assert_close(loss.parts[name], each(outputs, labels, ids, ignore_mask=ignored), torch.float64, what=name)


def operators_of(loss):
    outputs, labels = batch((2, 1, 9, 8))
    with Operators() as operators:
        loss(outputs, labels)
    return operators.counts


def test_labels_once():
    losses = all_of_them(spatial_dims=2)
    counts = operators_of(CombinedLoss(losses))
    assert counts["find"] == 1
    assert counts["find_instances"] == 0
    assert counts["cells"] == 2  # those of labels, which two losses look at, and those of outputs
    assert counts["region_loss"] == 5
    # Where nothing looks at outputs, they are not labelled.
    counts = operators_of(CombinedLoss({name: losses[name] for name in ("blob", "cc", "cat")}))
    assert counts["find"] == 0
    assert counts["find_instances"] == 1
    # What a loss of weight 0 wants is not made.
    counts = operators_of(CombinedLoss(losses, dict.fromkeys(losses, 0.0) | {"blob": 1.0}))
    assert counts == {"find_instances": 1, "region_loss": 1}
    # Other options are another scene, and so are other instances of the family.
    losses = {"blob": BlobLoss(spatial_dims=2), "other": FalseComponentLoss(spatial_dims=2, segmentation_threshold=0.3)}
    counts = {"find_instances": 1, "find": 1, "row_maps": 1, "unclaimed": 1, "region_loss": 2}
    assert operators_of(CombinedLoss(losses)) == counts
    losses = {"false": FalseComponentLoss(spatial_dims=2), "family": family(spatial_dims=2, min_instance_size=2)}
    assert operators_of(CombinedLoss(losses))["find"] == 2


def test_any_other_loss_sees_the_tensors_as_they_are():
    outputs, labels = batch((1, 1, 6, 5, 4), dtype=torch.float32)
    other = DiceCELoss(sigmoid=True)
    loss = CombinedLoss({"whole": other, "blob": BlobLoss()})
    value = loss(MetaTensor(outputs), MetaTensor(labels.float()))
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, other(outputs, labels.float()) + BlobLoss()(outputs, labels))
    with pytest.raises(ValueError, match=r"loss 'each' must return a 0-d tensor, got shape \(1, 1, 6, 5, 4\)"):
        CombinedLoss({"each": torch.nn.BCEWithLogitsLoss(reduction="none")})(outputs, labels.float())


def test_no_weight_at_all_is_connected():
    outputs, labels = batch((1, 1, 6, 5, 4))
    value, gradient = value_and_gradient(CombinedLoss({"blob": BlobLoss()}, {"blob": 0}), outputs, labels)
    assert value == 0
    assert not gradient.any()


def test_compiles_whole():
    torch.compiler.reset()
    loss = CombinedLoss(all_of_them(spatial_dims=2))
    outputs, labels = batch((2, 1, 8, 9), dtype=torch.float32)
    expected = value_and_gradient(loss, outputs, labels)
    actual = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), outputs, labels)
    torch.testing.assert_close(actual, expected)


def test_copies_and_bundles():
    config = {
        "_target_": "triton_instance_loss.CombinedLoss",
        "losses": {
            "blob": {"_target_": "triton_instance_loss.BlobLoss", "spatial_dims": 2},
            "bicc": {"_target_": "triton_instance_loss.CCLoss", "alpha": 0.5, "spacing": [1, 2], "spatial_dims": 2},
        },
        "weights": {"bicc": 0.5},
    }
    loss = ConfigParser({"loss": json.loads(json.dumps(config))}).get_parsed_content("loss")
    outputs, labels = batch((2, 1, 8, 9))
    expected = loss(outputs, labels)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(outputs, labels), expected)
        assert other.weights == {"blob": 1.0, "bicc": 0.5}
    loss.weights["bicc"] = 0.0
    assert torch.equal(loss(outputs, labels), loss.parts["blob"])


@pytest.mark.parametrize(
    ("losses", "weights", "error", "message"),
    [
        ([BlobLoss()], None, TypeError, "losses must be a mapping from names to losses, got list"),
        ({}, None, ValueError, "losses must have at least one, got none"),
        ({"family": InstanceLoss()}, None, TypeError, r"loss 'family' must give one number, .* WeightedSum\(Instance"),
        ({"blob": "BlobLoss"}, None, TypeError, "loss 'blob' must be a callable .*, got 'BlobLoss'"),
        ({"blob": BlobLoss()}, {"bolb": 1}, ValueError, "the name of a weight must be one of 'blob', got 'bolb'"),
        ({"blob": BlobLoss()}, {"blob": "1"}, TypeError, "weight blob must be a finite number, got '1'"),
        ({"blob": BlobLoss()}, [1.0], TypeError, r"weights must be a mapping .*, got \[1.0\]"),
    ],
)
def test_errors(losses, weights, error, message):
    with pytest.raises(error, match=message):
        CombinedLoss(losses, weights)


# --- the losses of 2023


@pytest.mark.parametrize("kind", [ICILoss, dICILoss])
@pytest.mark.parametrize("options", ["sigmoid", "softmax", "ignored"])
def test_terms_of_2023(kind, options, backend):
    """Terms of the family, and fdr from the activated output; alone and in a sum, of which each weighs what it says."""
    options, channels = OPTIONS[options]
    options = options | {"spatial_dims": 2, "rate_instead_number": True}
    outputs, labels = batch((2, channels, 9, 8), seed=3)
    outputs, labels = outputs.to(backend).requires_grad_(), labels.to(backend)
    terms = kind(**options)(outputs, labels)._asdict()
    of_family = InstanceLoss(**options)(outputs, labels)._asdict()
    of_family["instance"] = of_family["instance_label"]
    for name, value in terms.items():
        if name != "fdr":
            assert torch.equal(value, of_family[name]), name
    p = outputs.softmax(1)[:, [0, 2]] if channels > 1 else outputs.sigmoid()
    y = labels[:, [0, 2]] if channels > 1 else labels
    a = (p >= (1 / 3 if channels > 1 else 0.5)).double()
    soft = torch.where((a > 0) | (y > 0), p - p.detach(), 0.0) + a
    fdr = (1 - ((soft * y).sum((2, 3)) + 1e-7) / (soft.sum((2, 3)) + 1e-7)).mean()
    assert_close(terms["fdr"], fdr, torch.float64)
    slopes = [torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (terms["fdr"], fdr)]
    assert_close(*slopes, torch.float64, 1e-2)
    loss = WeightedSum(kind(**options), fdr=0.75)
    total = sum(loss.weights[name] * value for name, value in terms.items())
    assert_close(loss(outputs, labels), total, torch.float64, 10)
    assert set(loss.terms) == set(terms)
    published = kind(**options, gradients="reference")(outputs, labels).fdr
    assert torch.equal(published, terms["fdr"])
    assert not torch.autograd.grad(published, outputs)[0].any()
