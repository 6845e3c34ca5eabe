"""The library gives the numbers of the published code: 38 stored cases, on each backend, in each dtype.

Triton's interpreter takes about a second a sample, and more for 350 rounds of pooling. There it runs every case once
in float64 and once in float32, with whole components for those 350 rounds (no stored instance is that wide), and two
cases for all else. On a CPU or GPU all cases run everywhere, with the stored arguments.
"""

import pytest
import torch
from golden import CASES
from reference import TERMS
from tolerance import assert_close

from triton_instance_loss import InstanceCenterLoss, InstanceLoss

# Relative. The published code divides the integers of proximity's boxes in float32; gradients are stored in float32.
PRECISION = {torch.float64: 1e-6, torch.float32: 1e-4}
PROXIMITY_PRECISION = 1e-4

INTERPRETED = not torch.cuda.is_available()
A_FEW = ("soft_2d", "softmax_2d")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
affordable_cases = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case.name}")
        for backend in ("cpu", "triton")
        for case in CASES
        if backend == "cpu" or not INTERPRETED or case.name in A_FEW
    ],
    indirect=["backend"],
)


def precision(term, dtype):
    return max(PRECISION[dtype], PROXIMITY_PRECISION if term == "proximity" else 0.0)


def on(device, tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def affordable(options, request):
    """Options of a case, less the 350 rounds of pooling where Triton is interpreted."""
    rounds = options["num_iterations"]
    interpreted = INTERPRETED and request.node.callspec.params["backend"] == "triton"
    return options | {"num_iterations": None if interpreted and rounds == 350 else rounds}


def check_values(case, terms, dtype):
    assert terms._fields == TERMS
    for name, value in terms._asdict().items():
        assert value.shape == ()
        assert value.dtype == dtype
        assert value.item() == pytest.approx(case.values[name], rel=precision(name, dtype), abs=1e-7), name


@every_case
def test_values_and_gradients(case, backend, request):
    outputs, labels, ids = on(backend, case.tensors())
    outputs.requires_grad_()
    terms = InstanceLoss(**affordable(case.options(), request))(outputs, labels, ids)
    check_values(case, terms, torch.float64)
    for name, value in terms._asdict().items():
        actual = torch.zeros_like(outputs)
        if value.requires_grad:
            (actual,) = torch.autograd.grad(value, outputs, retain_graph=True, materialize_grads=True)
        expected = case.gradient(name)
        error = (actual.cpu() - expected).abs().max().item()
        assert error <= precision(name, torch.float64) * expected.abs().max().item(), name


@every_case
def test_values_in_float32(case, backend, request):
    loss = InstanceLoss(**affordable(case.options(), request))
    check_values(case, loss(*on(backend, case.tensors(torch.float32))), torch.float32)


@pytest.mark.parametrize("name", ["soft_2d", "label_components_given_2d"])
def test_the_rounds_of_pooling_that_were_published(name, backend):
    case = next(case for case in CASES if case.name == name)
    assert case.arguments["num_iterations"] == 350
    check_values(case, InstanceLoss(**case.options())(*on(backend, case.tensors())), torch.float64)


@affordable_cases
@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_widened(case, half, backend, request):
    outputs, labels, ids = on(backend, case.tensors(HALVES[half]))
    loss = InstanceLoss(**affordable(case.options(), request) | {"gradients": "surrogate"})
    results = []
    for x in (outputs.requires_grad_(), outputs.detach().float().requires_grad_()):
        terms = loss(x, labels, ids)
        sum(terms).backward()
        results.append((terms, x.grad))
    (half_terms, half_grad), (terms, grad) = results
    for name, half_value, value in zip(TERMS, half_terms, terms, strict=True):
        assert half_value.dtype == torch.float32
        assert_close(half_value, value, torch.float32, what=name)
    assert half_grad.dtype == HALVES[half]
    torch.testing.assert_close(half_grad, grad.to(HALVES[half]))


@affordable_cases
def test_the_first_six_alone(case, backend, request):
    options = affordable(case.options(), request)
    tensors = on(backend, case.tensors())
    terms = InstanceCenterLoss(**options)(*tensors)
    assert terms._fields == TERMS[:6]
    assert all(torch.equal(six, seven) for six, seven in zip(terms, InstanceLoss(**options)(*tensors), strict=False))
