"""Settings are checked where they are set: weights of a sum, options of any numeric type, nnU-Net's factor."""

import copy
import fractions
import io
import json
import pickle
import re
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, WeightedSum, connected_components, functional
from triton_instance_loss.losses import DEFAULT_WEIGHTS
from triton_instance_loss.metrics import instance_metrics
from triton_instance_loss.nnunet.loss import OneAgainstTheRest, WithInstanceTerms


def batch(channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, channels, 5, 4, 6, generator=generator)
    return outputs.requires_grad_(), (torch.rand(outputs.shape, generator=generator) > 0.85).float()


def weighted_sum(family=InstanceLoss, **weights):
    return WeightedSum(family(rate_instead_number=True), **weights)


# --- the weights of a sum

WRONG = [
    ("missed", 100, ValueError, r"the name of a weight must be one of 'pixel', .*, got 'missed'"),
    (3, 1.0, ValueError, r"the name of a weight must be one of 'pixel', .*, got 3"),
    ("center", float("nan"), ValueError, "weight center must be a finite number, got nan"),
    ("center", -float("inf"), ValueError, "weight center must be a finite number, got -inf"),
    ("center", np.float32("inf"), ValueError, "weight center must be a finite number, got inf"),
    ("center", "1", TypeError, "weight center must be a finite number, got '1'"),
    ("center", None, TypeError, "weight center must be a finite number, got None"),
    ("center", True, TypeError, "weight center must be a finite number, got True"),
    ("center", np.bool_(True), TypeError, "weight center must be a finite number, got True"),
    ("center", [1.0], TypeError, r"weight center must be a finite number, got \(1\.0,\)"),
    ("center", torch.tensor(1.0), TypeError, r"weight center must be a finite number, got tensor\(1\.\)"),
]
WAYS = {
    "one": lambda loss, name, weight: loss.weights.__setitem__(name, weight),
    "update": lambda loss, name, weight: loss.weights.update({name: weight, "pixel": 7.0}),
    "pairs": lambda loss, name, weight: loss.weights.update([("pixel", 7.0), (name, weight)]),
    "or": lambda loss, name, weight: loss.weights.__ior__({"pixel": 7.0, name: weight}),
    "whole": lambda loss, name, weight: setattr(loss, "weights", {**loss.weights, "pixel": 7.0, name: weight}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("name", "weight", "error", "message"), WRONG)
def test_wrong_weights(way, name, weight, error, message):
    loss = weighted_sum()
    with pytest.raises(error, match=message):
        way(loss, name, weight)
    assert loss.weights == DEFAULT_WEIGHTS  # all or nothing


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_proximity_of_a_loss_without_it(way):
    loss = weighted_sum(InstanceCenterLoss)
    with pytest.raises(ValueError, match=r"the name of a weight must be one of .*'missed_instances', got 'proximity'"):
        way(loss, "proximity", 0.1)


@pytest.mark.parametrize(
    "delete",
    [
        lambda weights: weights.pop("center"),
        lambda weights: weights.pop("center", 0.0),
        lambda weights: weights.__delitem__("center"),
    ],
)
def test_weights_are_not_deleted(delete):
    loss = weighted_sum()
    with pytest.raises(ValueError, match="weight center must be a finite number and can't be deleted; 0 leaves the"):
        delete(loss.weights)
    with pytest.raises(ValueError, match="weight pixel must be"):
        loss.weights.clear()
    with pytest.raises(ValueError, match="weight proximity must be"):
        loss.weights.popitem()
    with pytest.raises(ValueError, match="the name of a weight must be one of"):
        loss.weights.setdefault("missed", 1.0)
    assert loss.weights == DEFAULT_WEIGHTS
    assert loss.weights.setdefault("center", 9.0) == 0.25


def test_weights_as_a_whole():
    loss = weighted_sum()
    with pytest.raises(ValueError, match=r"got none for 'pixel', 'instance_label'.*update"):
        loss.weights = {"center": 1.0}
    with pytest.raises(TypeError, match=r"weights must be a mapping from the names of terms to numbers, got \[1\.0\]"):
        loss.weights = [1.0]
    loss.weights = dict.fromkeys(reversed(DEFAULT_WEIGHTS), np.int64(2))
    assert list(loss.weights.items()) == [(name, 2.0) for name in DEFAULT_WEIGHTS]
    assert all(type(weight) is float for weight in loss.weights.values())
    outputs, labels = batch()
    torch.testing.assert_close(loss(outputs, labels), 2 * sum(loss.loss(outputs, labels)))
    loss.weights |= {"pixel": 0}
    assert (type(loss.weights), loss.weights["pixel"]) == (type(weighted_sum().weights), 0.0)
    with pytest.raises(ValueError, match="got 'missed'"):
        loss.weights["missed"] = 1.0


def test_weights_are_a_dict():
    weights = weighted_sum(center=fractions.Fraction(1, 8)).weights
    expected = DEFAULT_WEIGHTS | {"center": 0.125}
    assert isinstance(weights, dict)
    assert weights == expected == dict(weights) == {**weights} == weights.copy()
    assert weights != DEFAULT_WEIGHTS
    assert (repr(weights), list(weights.items())) == (repr(expected), list(expected.items()))
    assert json.loads(json.dumps(weights)) == expected
    assert type(weights | {"other": 1}) is dict
    for other in (copy.copy(weights), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert other == weights
        with pytest.raises(ValueError, match="got 'missed'"):
            other["missed"] = 1.0
        other["center"] = 3
        assert (other["center"], weights["center"]) == (3.0, 0.125)


def test_copies_of_a_sum_have_weights_of_their_own():
    outputs, labels = batch()
    loss = weighted_sum(proximity=0.1)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(file, weights_only=False)):
        assert torch.equal(other(outputs, labels), loss(outputs, labels))
        other.weights.update(dict.fromkeys(other.weights, 0.0), center=1)
        assert torch.equal(other(outputs, labels), other.loss(outputs, labels).center)
        assert list(other.terms) == ["center"]
    assert loss.weights["proximity"] == 0.1


def test_the_state_dict_has_no_weights():
    assert not weighted_sum().state_dict()


def test_options_and_criteria_belong_to_the_loss_that_is_summed():
    loss = weighted_sum()
    for name, value in (("max_cc_out", 0), ("rate_instead_number", False), ("loss_function_instance", None)):
        with pytest.raises(AttributeError, match=f"{name} belongs to the loss that is summed: set loss.loss.{name}"):
            setattr(loss, name, value)
    with pytest.raises(AttributeError, match=re.escape("center is a term: set its weight, loss.weights['center']")):
        loss.center = 0.5
    with pytest.raises(TypeError, match=r"loss must be an InstanceLoss, .* or dICILoss, got MSELoss"):
        loss.loss = torch.nn.MSELoss()
    with pytest.raises(ValueError, match=r"loss must have the terms pixel, .*, got InstanceCenterLoss"):
        loss.loss = InstanceCenterLoss()
    loss.loss.max_cc_out = 0
    loss.loss = InstanceLoss(rate_instead_number=True)
    loss.anything = "else"
    assert loss.loss.max_cc_out == InstanceLoss().max_cc_out


@pytest.mark.parametrize("family", [InstanceLoss, InstanceCenterLoss])
def test_an_attribute_that_is_nearly_an_option(family):
    loss = family()
    for name, meant in (("max_cc_outt", "max_cc_out"), ("object_chan", "object_chn"), ("gradient", "gradients")):
        with pytest.raises(
            AttributeError, match=f"has no option '{name}'; did you mean '{meant}'.*Allowed: .*max_cc_out"
        ):
            setattr(loss, name, 1)
    # Attributes that loops put on modules, and those of a subclass.
    loss.name, loss.prepare_data_per_node, loss._max_cc_out, loss.training = "mine", True, 3, False

    class Mine(family):
        def __init__(self):
            super().__init__()
            self.gradient = "steep"

    assert Mine().gradient == "steep"


# --- counts with the weights of rates


def test_counts_with_a_weight_warn_once():
    message = (
        "false_instances and missed_instances are counts, thousands for an untrained network.*rate_instead_number=T"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        loss = WeightedSum(InstanceLoss())
    assert (len(caught), caught[0].filename) == (1, __file__)
    with pytest.warns(UserWarning, match="^missed_instances are counts.*InstanceCenterLoss rate"):
        WeightedSum(InstanceCenterLoss(), false_instances=0)
    outputs, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(outputs, labels)
        WeightedSum(InstanceLoss(), false_instances=0, missed_instances=0)(outputs, labels)
        weighted_sum(missed_instances=3)(outputs, labels)


# --- options of any numeric type


class Config(Sequence):
    """A sequence that is neither list nor tuple, like those of configuration libraries."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]

    def __len__(self):
        return len(self.values)


CLASSES = [
    [2, 1],
    range(2, 0, -1),
    Config(2, np.int32(1)),
    np.array([2, 1]),
    np.array([2, 1], dtype=np.uint8),
    (np.int64(2), np.int64(1)),
]


@pytest.mark.parametrize("classes", CLASSES, ids=lambda value: type(value).__name__)
def test_any_sequence_of_classes(classes):
    outputs, labels = batch(3)
    options = {"num_out_chn": np.int64(3), "activation": "softmax", "rate_instead_number": np.bool_(True)}
    loss = InstanceLoss(object_chn=classes, **options)
    assert loss.object_chn == (2, 1)
    assert all(type(number) is int for number in loss.object_chn)
    expected = InstanceLoss(object_chn=(2, 1), num_out_chn=3, activation="softmax", rate_instead_number=True)
    assert torch.equal(torch.stack(loss(outputs, labels)), torch.stack(expected(outputs, labels)))
    loss.object_chn = 1
    loss.object_chn = classes
    loss.edit_parameters(object_chn=classes)
    assert loss.options == expected.options
    ours = functional.instance_center_loss(outputs, labels, object_chn=classes, **options)
    assert torch.equal(ours, expected(outputs, labels).center)
    options.pop("rate_instead_number")
    metrics = instance_metrics(outputs, labels, object_chn=classes, **options)
    assert all(value.shape == (2, 2) for value in metrics)


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), np.array(1)], ids=repr)
def test_one_class_of_metrics_has_no_axis(one):
    outputs, labels = batch(3)
    options = {"num_out_chn": 3, "activation": "softmax"}
    assert all(value.shape == (2,) for value in instance_metrics(outputs, labels, object_chn=one, **options))
    assert all(value.shape == (2, 1) for value in instance_metrics(outputs, labels, object_chn=[one], **options))


NUMBERS = {
    "num_out_chn": np.int16(2),
    "object_chn": np.int64(1),
    "spatial_dims": np.int8(3),
    "num_iterations": np.int64(4),
    "segmentation_threshold": np.float32(0.25),
    "max_cc_out": np.uint8(7),
    "mul_too_many": np.float64(3.5),
    "min_instance_size": np.int64(1),
    "centroid_offset": fractions.Fraction(5, 2),
    "smoother": np.float16(0.125),
    "instance_wise_loss_no_tp": np.bool_(False),
    "rate_instead_number": np.bool_(True),
    "to_onehot_y": np.bool_(False),
    "ignore_index": np.uint8(255),
}


def test_numbers_become_plain_python():
    loss = InstanceLoss(**NUMBERS)
    for name, number in NUMBERS.items():
        value = getattr(loss, name)
        assert type(value) in (int, float, bool)
        assert value == number
        json.dumps(value)
        assert f"{name}={value!r}" in repr(loss)
        setattr(loss, name, number)
        assert type(getattr(loss, name)) is type(value)
    plain = InstanceLoss(**{name: getattr(loss, name) for name in NUMBERS})
    assert plain.options == loss.options == copy.deepcopy(loss).options == pickle.loads(pickle.dumps(loss)).options
    outputs, labels = batch(2)
    assert torch.equal(torch.stack(loss(outputs, labels)), torch.stack(plain(outputs, labels)))
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs, labels), loss(outputs, labels))


def test_numbers_of_functions():
    outputs, labels = batch()
    metrics = [
        instance_metrics(outputs, labels, matching="iou", iou_threshold=threshold, min_instance_size=size)
        for threshold, size in ((np.float32(0.75), np.int64(1)), (0.75, 1))
    ]
    torch.testing.assert_close(*metrics, rtol=0, atol=0)
    assert torch.equal(connected_components(labels, np.int64(2)), connected_components(labels, 2))
    connected_components(labels, relabel=np.bool_(True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cc_out": np.bool_(True)}, "max_cc_out must be an integer of at least 0, got True"),
        ({"max_cc_out": np.float64(3)}, "max_cc_out must be an integer of at least 0, got 3.0"),
        ({"mul_too_many": np.bool_(True)}, "mul_too_many must be a finite number of at least 0, got True"),
        ({"smoother": "1e-7"}, "smoother must be a finite number above 0, got '1e-7'"),
        ({"rate_instead_number": np.int64(1)}, "rate_instead_number must be True or False, got 1"),
        ({"object_chn": "12"}, "object_chn must be an integer of at least 0, got '12'"),
        ({"object_chn": b"\x01"}, r"object_chn must be an integer of at least 0, got b'\\x01'"),
        ({"object_chn": {1, 2}}, "object_chn must be an integer of at least 0, got {1, 2}"),
        ({"num_out_chn": 3, "object_chn": np.array([1.0])}, "object_chn must be an integer of at least 0, got 1.0"),
        ({"num_out_chn": 3, "object_chn": [True]}, "object_chn must be an integer of at least 0, got True"),
        ({"num_out_chn": [3]}, r"num_out_chn must be an integer of at least 1, got \(3,\)"),
    ],
)
def test_what_is_no_number_stays_refused(options, message):
    with pytest.raises(TypeError, match=message):
        InstanceLoss(**options)


# --- nnU-Net's loss


def one_against_the_rest(**options):
    return OneAgainstTheRest(InstanceLoss, **{"spatial_dims": 3, "num_channels": 3, "regions": False} | options)


def test_factor_and_level_weights():
    loss = WithInstanceTerms(lambda *_: 0.0, one_against_the_rest(), np.array([0.75, 0.25, 0.0]))
    assert loss.level_weights == (0.75, 0.25, 0.0)
    assert all(type(weight) is float for weight in loss.level_weights)
    loss.factor = np.float32(0.5)
    assert type(loss.factor) is float
    for value, error in ((float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"factor must be a finite number, got {value!r}"):
            loss.factor = value
        with pytest.raises(error, match=re.escape(f"level_weights[1] must be a finite number, got {value!r}")):
            loss.level_weights = (1.0, value)
        with pytest.raises(error, match=re.escape("level_weights[0] must be a finite number, got ")):
            WithInstanceTerms(None, one_against_the_rest(), [value])
    with pytest.raises(TypeError, match=r"level_weights must be a sequence of finite numbers, or None, got 1.0"):
        loss.level_weights = 1.0
    with pytest.raises(ValueError, match=r"level_weights must have a finite number for each level, got \[\]"):
        loss.level_weights = []
    assert (loss.factor, loss.level_weights) == (0.5, (0.75, 0.25, 0.0))
    loss.level_weights = None
    assert copy.deepcopy(loss).level_weights is None


def test_weights_of_the_instance_terms():
    loss = one_against_the_rest(weights={"center": np.float32(0.5)}, num_channels=np.int64(3), regions=np.bool_(False))
    assert loss.loss.weights["center"] == 0.5
    with pytest.raises(ValueError, match=r"the name of a weight must be one of 'instance_label', .*, got 'pixel'"):
        one_against_the_rest(weights={"pixel": 1.0})
    with pytest.raises(ValueError, match="got 'proximity'"):
        OneAgainstTheRest(InstanceCenterLoss, spatial_dims=3, num_channels=2, regions=True, weights={"proximity": 1.0})
    with pytest.raises(TypeError, match="weight center must be a finite number, got '1'"):
        one_against_the_rest(weights={"center": "1"})
    with pytest.raises(
        TypeError, match=r"weights must be a mapping from the names of terms to numbers, or None, got 0.5"
    ):
        one_against_the_rest(weights=0.5)
    with pytest.raises(TypeError, match=r"num_channels must be an integer of at least 1, got 3.0"):
        one_against_the_rest(num_channels=3.0)
    with pytest.raises(TypeError, match="regions must be True or False, got 'no'"):
        one_against_the_rest(regions="no")
    with pytest.raises(TypeError, match="ignore_label must be an integer of at least 0, got '255'"):
        one_against_the_rest(ignore_label="255")
