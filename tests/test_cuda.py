"""What only a GPU shows: the driver's own watch for synchronisation, CUDA graphs, and the compiled network."""

import pytest
import torch

from triton_instance_loss import InstanceLoss, WeightedSum
from triton_instance_loss.metrics import average_precision, instance_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(seed, shape=(33, 21, 40)):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, 1, *shape, generator=generator)
    labels = (torch.rand(2, 1, *shape, generator=generator) > 0.85).float()
    return outputs.cuda().requires_grad_(), labels.cuda()


@pytest.fixture
def no_synchronisation():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"max_cc_out": 0}, {"activation": "none"}, {"num_iterations": 3}])
def test_no_synchronisation(no_synchronisation, options):
    outputs, labels = batch(0)
    loss = InstanceLoss(**options)
    sum(loss(outputs, labels)).backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    sum(loss(outputs, labels)).backward()


@pytest.mark.parametrize("matching", ["overlap", "iou", "dilated"])
def test_metrics_never_synchronise(no_synchronisation, matching):
    outputs, labels = batch(0)
    numbers = torch.arange(labels.numel(), device="cuda").view(labels.shape) // 7
    asked = {"sizes": (2, 9), "spacing": (1, 1, 2), "min_instance_size": 2.5, "cc_output_batch": numbers}

    def metrics():
        for options in ({}, asked):
            instance_metrics(outputs, labels, matching=matching, dilation=1, **options)
        average_precision(outputs, labels)

    metrics()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    metrics()


def test_cuda_graph_replays_with_other_data():
    loss = WeightedSum(InstanceLoss(rate_instead_number=True), proximity=0.1)
    outputs, labels = batch(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            outputs.grad = None
            loss(outputs, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    outputs.grad = None
    with torch.cuda.graph(graph):
        value = loss(outputs, labels)
        value.backward()
    for seed in (1, 2, 3):
        new_outputs, new_labels = batch(seed)
        with torch.no_grad():
            outputs.copy_(new_outputs)
            labels.copy_(new_labels if seed != 2 else torch.zeros_like(new_labels))
        graph.replay()
        fresh = outputs.detach().clone().requires_grad_()
        expected = loss(fresh, labels)
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(outputs.grad, fresh.grad)


def test_cuda_graph_keeps_what_it_reads():
    outputs, labels = batch(0)
    loss = InstanceLoss(smoother=3e-6)  # numbers that nothing else asks for
    terms = torch.stack(loss(outputs, labels)).detach()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.stack(loss(outputs.detach(), labels))
    del loss
    junk = [torch.full((size,), torch.nan, dtype=torch.float64) for size in (8, 30, 64) for _ in range(200)]
    junk = [each.pin_memory() for each in junk] + [each.cuda() for each in junk]
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(captured, terms)


def test_reduce_overhead():
    torch.compiler.reset()
    network = torch.nn.Conv3d(1, 1, 3, padding=1).cuda()
    loss = WeightedSum(InstanceLoss(rate_instead_number=True, smoother=2e-6))  # its first call is a compiled one
    step = torch.compile(lambda x, y: loss(network(x), y), mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        volume, labels = batch(seed)
        torch.compiler.cudagraph_mark_step_begin()
        value = step(volume.detach(), labels)
        value.backward()
        torch.testing.assert_close(value.detach(), loss(network(volume), labels).detach())


def test_cuda_equals_cpu():
    outputs, labels = batch(7)
    for options in ({}, {"activation": "none", "segmentation_threshold": 0.9}, {"num_iterations": 2}):
        loss = InstanceLoss(**options)
        terms = loss(outputs, labels)
        (grad,) = torch.autograd.grad(sum(terms), outputs)
        twin = outputs.detach().cpu().requires_grad_()
        twin_terms = loss(twin, labels.cpu())
        (twin_grad,) = torch.autograd.grad(sum(twin_terms), twin)
        torch.testing.assert_close(torch.stack(terms).cpu(), torch.stack(twin_terms), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.cpu(), twin_grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def asked_to_be_deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results_of_100_runs(**options):
    """Terms and gradient of each run, bit by bit."""
    outputs, labels = batch(0, (96, 80, 64))
    loss = InstanceLoss(**options)
    for _ in range(100):
        terms = torch.stack(loss(outputs, labels))
        (grad,) = torch.autograd.grad(terms.sum(), outputs)
        yield torch.cat((terms.detach(), grad.flatten())).view(torch.int32)


def test_the_same_bits_in_100_runs():
    first, *others = results_of_100_runs()
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("asked_to_be_deterministic")
def test_the_same_bits_of_soft_outputs_if_asked():
    first, *others = results_of_100_runs(activation="none")
    assert all(torch.equal(first, other) for other in others)
