"""How many rows tables have, and what becomes of instances beyond them."""

import pytest
import torch
from backends import using_backend
from reference import reference_terms

from triton_instance_loss import InstanceLoss, connected_components, instances

pytest.importorskip("triton")


@pytest.fixture
def triton():
    """Run on the Triton backend; the value is the device for that."""
    with using_backend("triton") as device:
        yield device


@pytest.fixture(params=[2, 3])
def few_rows(request, monkeypatch, triton):
    """Tables with as few rows as their share of a volume gives, or two; the value is the number of dimensions."""
    monkeypatch.setattr(instances, "FEW_ROWS", 2)
    monkeypatch.setattr(instances, "BLOCKS_A_ROW", {2: 9, 3: 9})
    return request.param


def lattice(shape, step, device):
    """Every `step`-th voxel along each axis."""
    mask = torch.zeros(shape, dtype=torch.float64, device=device)
    mask[(..., *(slice(None, None, step),) * (len(shape) - 2))] = 1
    return mask


@pytest.mark.parametrize(("shape", "density"), [((1, 1, 96, 96, 96), 0.05), ((1, 1, 1024, 1024), 0.17)])
def test_noise_has_fewer_components_than_rows(shape, density):
    # The densities at which noise has the most components.
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    _, counts = connected_components(mask, relabel=True)
    blocks = torch.tensor(shape[2:]).div(2).prod()
    assert 0.15 * blocks < counts.item() < blocks / instances.BLOCKS_A_ROW[len(shape) - 2]


def test_rows_of_a_patch(monkeypatch, triton):
    seen = []
    monkeypatch.setattr(
        instances.ops, "find", lambda *arguments: seen.append(arguments[-2:]) or [(None, None), *[None] * 4]
    )
    x = labels = torch.zeros(1, 64, 64, 64)
    for options in (instances.Options(), instances.Options(max_cc_out=0), instances.Options(num_iterations=9)):
        instances.find(x, labels, instances.search(x, labels, None, (-1, 0), options))
    # a quarter of the blocks, and the rest; with all outputs kept, or one id a voxel, no rest
    assert seen == [(8192, 24576), (32768, 0), (64**3, 0)]


@pytest.mark.parametrize("max_cc_out", [1, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("rates", [False, True])
def test_outputs_beyond_the_tables(few_rows, triton, max_cc_out, activation, rates):
    """All terms and their gradient, where most outputs have no row, and some of those touch the label."""
    shape = (2, 1, *(8,) * few_rows)
    generator = torch.Generator().manual_seed(few_rows)
    outputs = lattice(shape, 2, triton)
    outputs[1, ..., 2:5] = 1.0  # instances of several voxels
    outputs = outputs * (0.6 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64).to(triton))
    outputs = (6 * outputs - 3 if activation == "sigmoid" else outputs).requires_grad_()
    labels = torch.zeros(shape, dtype=torch.float64, device=triton)
    labels[..., :3, 1:7] = 1
    options = {"activation": activation, "spatial_dims": few_rows, "max_cc_out": max_cc_out, "mul_too_many": 1000}
    options["rate_instead_number"] = rates
    ours = InstanceLoss(**options)(outputs, labels)
    (grad,) = torch.autograd.grad(sum(ours), outputs)
    expected = reference_terms(outputs, labels, **options)
    (plain,) = torch.autograd.grad(sum(expected.values()), outputs)
    for name, value in ours._asdict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, plain, rtol=1e-9, atol=1e-12)


def test_too_many_outputs_beyond_the_tables(few_rows, triton):
    shape = (1, 1, *(8,) * few_rows)
    outputs, labels = lattice(shape, 2, triton).requires_grad_(), lattice(shape, 2, triton) * 0
    labels[..., :3] = 1
    options = {"activation": "none", "spatial_dims": few_rows, "mul_too_many": 2}
    ours = InstanceLoss(**options)(outputs, labels)
    expected = reference_terms(outputs, labels, **options)
    assert ours.proximity > 4**few_rows  # the number of outputs is added
    for name, value in ours._asdict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, an assertion on the device ends the process")
def test_labels_beyond_the_tables(few_rows, triton):
    labels = lattice((1, 1, *(8,) * few_rows), 2, triton)
    with pytest.raises(ValueError, match=rf"labels must have at most \d+ instances .* got {4**few_rows}"):
        InstanceLoss(activation="none", spatial_dims=few_rows, max_cc_out=1)(labels, labels)
