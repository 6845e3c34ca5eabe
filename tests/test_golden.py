"""The library gives the numbers of the published code: 38 stored cases, on each backend, in each dtype."""

import pytest
import torch
from golden import CASES
from reference import TERMS
from tolerance import assert_close

from triton_instance_loss import InstanceCenterLoss, InstanceLoss

# Relative. The published code divides the integers of proximity's boxes in float32; gradients are stored in float32.
PRECISION = {torch.float64: 1e-6, torch.float32: 1e-4}
PROXIMITY_PRECISION = 1e-4

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def precision(term, dtype):
    return max(PRECISION[dtype], PROXIMITY_PRECISION if term == "proximity" else 0.0)


def on(device, tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values(case, dtype, backend):
    terms = InstanceLoss(**case.options())(*on(backend, case.tensors(dtype)))
    assert terms._fields == TERMS
    for name, value in terms._asdict().items():
        assert value.shape == ()
        assert value.dtype == dtype
        assert value.item() == pytest.approx(case.values[name], rel=precision(name, dtype), abs=1e-7), name


@every_case
def test_gradients(case, backend):
    outputs, labels, ids = on(backend, case.tensors())
    outputs.requires_grad_()
    terms = InstanceLoss(**case.options())(outputs, labels, ids)
    for name, value in terms._asdict().items():
        actual = torch.zeros_like(outputs)
        if value.requires_grad:
            (actual,) = torch.autograd.grad(value, outputs, retain_graph=True, materialize_grads=True)
        expected = case.gradient(name)
        error = (actual.cpu() - expected).abs().max().item()
        assert error <= precision(name, torch.float64) * expected.abs().max().item(), name


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_widened(case, dtype, backend):
    outputs, labels, ids = on(backend, case.tensors(dtype))
    loss = InstanceLoss(**case.options() | {"gradients": "surrogate"})
    results = []
    for x in (outputs.requires_grad_(), outputs.detach().float().requires_grad_()):
        terms = loss(x, labels, ids)
        sum(terms).backward()
        results.append((terms, x.grad))
    (half_terms, half_grad), (terms, grad) = results
    for name, half_value, value in zip(TERMS, half_terms, terms, strict=True):
        assert half_value.dtype == torch.float32
        assert_close(half_value, value, torch.float32, what=name)
    assert half_grad.dtype == dtype
    assert_close(half_grad, grad.to(dtype), dtype, what="gradient")


@every_case
def test_the_first_six_alone(case, backend):
    options = case.options()
    tensors = on(backend, case.tensors())
    terms = InstanceCenterLoss(**options)(*tensors)
    assert terms._fields == TERMS[:6]
    assert all(torch.equal(six, seven) for six, seven in zip(terms, InstanceLoss(**options)(*tensors), strict=False))
