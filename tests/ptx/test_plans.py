"""Operators through their plans (kernels/launches.py), on other data than those that were noted."""

import pytest
import torch
from checks import check_labelling, check_loss
from triton_instance_loss.kernels import launches


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """Plans are made, and none is left from before."""
    monkeypatch.setattr(launches, "_IS_KNOWN", True)
    launches._plans.clear()
    yield launches._plans
    launches._plans.clear()


@pytest.mark.parametrize("seed", range(100, 112))
def test_losses(plans, seed):
    if check_loss(seed) is False:
        return
    noted = dict(plans)
    check_loss(seed, lambda tensor: tensor.roll(1, dims=-1).flip(-2).contiguous())
    assert noted
    assert plans == noted


@pytest.mark.parametrize("seed", range(100, 108))
def test_labelling(plans, seed):
    check_labelling(seed)
    noted = dict(plans)
    assert all(noted.values())
    check_labelling(seed, lambda tensor: tensor.flip(-1).contiguous())
    assert plans == noted


def test_tensors_that_share_memory_have_no_plan(plans):
    from triton_instance_loss import InstanceLoss

    values = (torch.rand(1, 1, 4, 5, 6) > 0.5).float()
    first = InstanceLoss(activation="none")(values, values)
    again = InstanceLoss(activation="none")(values, values)
    assert first == again
    assert "launch_find" not in {key[0].__name__ for key in plans}
    other = InstanceLoss(activation="none")(values, 1 - values)
    assert other != first
