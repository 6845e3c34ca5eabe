"""What torch may do to a call: transforms that are not supported say so, and shapes of what is compiled may change."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, WeightedSum, connected_components, functional
from triton_instance_loss.losses import DEFAULT_WEIGHTS
from triton_instance_loss.metrics import instance_metrics
from triton_instance_loss.nnunet.loss import OneAgainstTheRest


def batch(shape=(5, 4, 6), seed=0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, channels, *shape, generator=generator)
    labels = (torch.rand(outputs.shape, generator=generator) > 0.85).float()
    return outputs + 3 * labels - 1, labels


def components(outputs, labels):
    return connected_components(labels)


def numbered_components(outputs, labels):
    return connected_components(labels, relabel=True)


def by_iou(outputs, labels):
    return instance_metrics(outputs, labels, matching="iou")


CALLS = {
    "InstanceLoss": InstanceLoss(),
    "InstanceCenterLoss": InstanceCenterLoss(),
    "WeightedSum": WeightedSum(InstanceLoss(rate_instead_number=True)),
    "nothing": WeightedSum(InstanceLoss(), **dict.fromkeys(DEFAULT_WEIGHTS, 0.0)),
    "nnU-Net": OneAgainstTheRest(InstanceLoss, spatial_dims=3, num_channels=1, regions=True),
    "segmentation": functional.instance_segmentation_loss,
    "center": functional.instance_center_loss,
    "rates": functional.false_instance_rate_loss,
    "proximity": functional.instance_proximity_loss,
    "metrics": instance_metrics,
    "iou": by_iou,
    "components": components,
    "numbered": numbered_components,
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
def test_vmap(call):
    outputs, labels = batch()
    message = r"(outputs|labels|mask) has an axis of torch\.vmap, which is not supported: give it as the first axis"
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(call)(outputs[None], labels[None])
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(lambda labels: call(outputs, labels))(labels[None])
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(torch.func.grad(lambda outputs, labels: call(outputs, labels)))(outputs[None], labels[None])


def test_vmap_of_masks_and_ids():
    outputs, labels = batch()
    with pytest.raises(NotImplementedError, match=r"cc_label_batch has an axis of torch\.vmap"):
        torch.vmap(lambda ids: InstanceLoss()(outputs, labels, ids))(labels[None])
    with pytest.raises(NotImplementedError, match=r"ignore_mask has an axis of torch\.vmap"):
        torch.vmap(lambda mask: InstanceLoss()(outputs, labels, ignore_mask=mask))(labels[None] > 0)


@calls
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(call):
    with pytest.raises(
        NotImplementedError, match=r"is traced by torch\.jit\.trace, which is not supported.*torch\.comp"
    ):
        torch.jit.trace(call, batch(), check_trace=False)


class Training(torch.nn.Module):
    """A network and its loss in one module."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs, labels)


@calls
@pytest.mark.filterwarnings("ignore")
def test_jit_script(call):
    call = {components: connected_components, numbered_components: connected_components, by_iou: instance_metrics}.get(
        call, call
    )
    message = r"torch\.jit\.script of the losses, metrics and components is not supported.*use torch\.compile"
    with pytest.raises(NotImplementedError, match=message):
        torch.jit.script(call)
    if isinstance(call, torch.nn.Module):
        with pytest.raises(NotImplementedError, match=message):
            torch.jit.script(Training(call))


@calls
def test_other_devices(call):
    outputs, labels = (volume.to("meta") for volume in batch())
    with pytest.raises(
        ValueError, match=r"(outputs|mask) must be on the CPU or a CUDA device, got meta; move it there"
    ):
        call(outputs, labels)


@pytest.mark.parametrize("matching", ["overlap", "iou"])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "softmax", "num_out_chn": 3, "object_chn": (2, 1)}, {"segmentation_threshold": 0.7}],
)
def test_metrics_compile_with_shapes_that_change(matching, options):
    """From the first call on; and a threshold is no number of the graph either."""
    torch.compiler.reset()
    compiled = torch.compile(instance_metrics, fullgraph=True, dynamic=True, backend="aot_eager")
    options = {**options, "matching": matching}
    for seed, shape in enumerate(((8, 9, 7), (10, 12, 6), (5, 6, 9))):
        outputs, labels = batch(shape, seed, options.get("num_out_chn", 1))
        expected = instance_metrics(outputs, labels, **options)
        torch.testing.assert_close(compiled(outputs, labels, **options), expected)
        assert expected.num_labels.sum() > 0
    options |= {"iou_threshold": 0.6}
    torch.testing.assert_close(compiled(outputs, labels, **options), instance_metrics(outputs, labels, **options))


# --- a sum without gradients


class Passes(TorchDispatchMode):
    """Which operations of torch return as many elements as the outputs have."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.elements:
            self.names.append(str(func))
        return result


NOTHING = dict.fromkeys(DEFAULT_WEIGHTS, 0.0)
WEIGHTS = [{}, {"proximity": 0.1}, NOTHING, NOTHING | {"center": -1}]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gradients", ["surrogate", "reference"])
@pytest.mark.parametrize("empty", [False, True])
def test_sums_without_gradients_are_the_same_bits(backend, weights, gradients, empty):
    outputs, labels = (volume.to(backend) for volume in batch())
    outputs, labels = (outputs.abs().neg(), 0 * labels) if empty else (outputs, labels)
    loss = WeightedSum(InstanceLoss(gradients=gradients, rate_instead_number=True), **weights)
    expected = loss(outputs.requires_grad_(), labels)
    assert expected.requires_grad
    for x in (outputs, outputs.detach()):
        with torch.no_grad():
            value = loss(x, labels)
        assert torch.equal(value.view(torch.int32), expected.detach().view(torch.int32))


def test_no_pass_that_nobody_needs():
    """The constant pixel term has no graph, so the sum has to be connected to the outputs by other means."""
    outputs, labels = batch()
    outputs.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = WeightedSum(InstanceLoss(lambda u, w: torch.tensor(2.0)), **dict.fromkeys(DEFAULT_WEIGHTS, 0.0))
    for pixel, value in ((0.0, 0.0), (1.0, 2.0), (-1.0, -2.0)):
        loss.weights["pixel"] = pixel
        results = []
        for grad in (True, False):
            with torch.set_grad_enabled(grad), Passes(outputs.numel()) as passes:
                results.append(loss(outputs, labels))
            assert not [name for name in passes.names if "mul" in name]
        assert results[0].item() == results[1].item() == value
        (gradient,) = torch.autograd.grad(results[0], outputs)
        assert gradient.shape == outputs.shape
        assert not gradient.any()


def test_a_sum_of_nothing_does_not_look_at_the_outputs():
    outputs = torch.full((1, 1, 4, 4, 4), torch.inf, requires_grad=True)
    loss = WeightedSum(InstanceLoss(), **dict.fromkeys(DEFAULT_WEIGHTS, 0.0))
    with Passes(outputs.numel()) as passes:
        value = loss(outputs, torch.zeros_like(outputs))
    assert value.item() == 0
    assert not [name for name in passes.names if "mul" in name or "sum" in name]


losses = pytest.mark.parametrize("call", [CALLS["WeightedSum"], CALLS["nnU-Net"]], ids=["WeightedSum", "nnU-Net"])


@losses
def test_func_grad_is_backward(call, backend):
    outputs, labels = (tensor.to(backend) for tensor in batch())
    x = outputs.clone().requires_grad_()
    value = call(x, labels)
    truth = torch.autograd.grad(value, x)[0]
    assert torch.equal(torch.func.grad(call)(outputs, labels), truth)
    grad, again = torch.func.grad_and_value(call)(outputs, labels)
    assert torch.equal(grad, truth)
    assert torch.equal(again, value.detach())
    value, back = torch.func.vjp(lambda x: call(x, labels), outputs)
    assert torch.equal(back(torch.ones_like(value))[0], truth)


@pytest.mark.parametrize("max_cc_out", [1, 40])
def test_func_grad_beyond_the_cap(max_cc_out, backend):
    """More voxels than `max_cc_out` are foreground, as in any patch of ordinary size; and more instances."""
    outputs, labels = (tensor.to(backend) for tensor in batch((9, 10, 8)))
    loss = WeightedSum(InstanceLoss(rate_instead_number=True, max_cc_out=max_cc_out))
    x = outputs.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grad = torch.func.grad(loss)(outputs, labels)
    assert any("max_cc_out=1 are used" in str(each.message) for each in caught) == (max_cc_out == 1)
    assert torch.equal(grad, torch.autograd.grad(loss(x, labels), x)[0])


@losses
def test_func_grad_of_slow_criteria(call):
    """Of the values that a criterion gives, and through a network."""
    outputs, labels = batch()
    network = torch.nn.Conv3d(1, 1, 1)
    parameters = dict(network.named_parameters())
    with pytest.warns(UserWarning, match="no fused form"):
        loss = WeightedSum(InstanceLoss(None, torch.nn.HuberLoss(), torch.nn.HuberLoss(), rate_instead_number=True))

    def of_parameters(parameters):
        return loss(torch.func.functional_call(network, parameters, outputs), labels) + call(outputs, labels)

    grads = torch.func.grad(of_parameters)(parameters)
    truth = torch.autograd.grad(of_parameters(parameters), list(parameters.values()))
    assert all(torch.equal(grads[name], one) for name, one in zip(parameters, truth, strict=True))


@losses
def test_there_is_no_second_derivative_and_no_forward_mode(call):
    outputs, labels = batch()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.func.grad(lambda x: torch.func.grad(call)(x, labels).sum())(outputs)
    for forward in (
        lambda: torch.func.jvp(lambda x: call(x, labels), (outputs,), (outputs,)),
        lambda: torch.func.jacfwd(lambda x: call(x, labels))(outputs),
    ):
        with pytest.raises(NotImplementedError, match=r"outputs has (a tangent|an axis)"):
            forward()
