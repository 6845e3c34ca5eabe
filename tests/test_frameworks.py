"""What PyTorch asks of operators: schemas, fakes, compilation without graph breaks, no look at the data on the way."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from triton_instance_loss import (
    CCLoss,
    FalseComponentLoss,
    InstanceLoss,
    WeightedSum,
    checks,
    connected_components,
    dispatch,
    ops,
)
from triton_instance_loss.criteria import DICE, fused_form
from triton_instance_loss.metrics import average_precision, instance_metrics
from triton_instance_loss.ratios import describe

# Operators whose result Python reads, or whose shape depends on data: on CUDA each of them waits for the device.
SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "is_nonzero",
    "equal",
    "repeat_interleave",
}


class NoSynchronisation(TorchDispatchMode):
    """Raise where the host would have to wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Refuse operators that read data; let the others run."""
        name = func.overloadpacket.__name__
        if func.namespace == "triton_instance_loss":
            with self:  # what the launchers do counts too
                return dispatch.answer(name, *args)
        if name in SYNCHRONISING:
            raise AssertionError(f"{name} reads data")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise AssertionError(f"{name} with a boolean index reads data")
        return func(*args, **(kwargs or {}))


def batch(device="cpu", seed=0, shape=(6, 7, 5), activation="sigmoid"):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, 1, *shape, generator=generator)
    outputs = outputs.sigmoid() if activation == "none" else outputs
    labels = (torch.rand(2, 1, *shape, generator=generator) > 0.85).float()
    return outputs.to(device).requires_grad_(), labels.to(device)


def test_the_mode_sees_synchronisation():
    with NoSynchronisation():
        for read in (lambda x: x.item(), lambda x: x[x > 0], torch.unique, lambda x: bool(x > 0)):
            with pytest.raises(AssertionError, match="reads data"):
                read(torch.ones(()) if read is not torch.unique else torch.ones(2))


@pytest.fixture
def kernels_alone(monkeypatch):
    """The Triton backend as on CUDA, where what the interpreter itself reads of the data does not count."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def outside(executor, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            return run(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", outside)
    monkeypatch.setattr(checks, "debugging", lambda value: False)
    monkeypatch.setenv("TRITON_INSTANCE_LOSS_BACKEND", "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, test_cuda.py asks the driver instead")
@pytest.mark.parametrize(
    "options", [{}, {"max_cc_out": 0}, {"activation": "none"}, {"num_iterations": 2}, {"ids": True}]
)
def test_kernels_way_never_synchronises(kernels_alone, options):
    options = dict(options)
    given = options.pop("ids", False)
    outputs, labels = batch(activation=options.get("activation", "sigmoid"))
    ids = connected_components(labels) if given else None
    with NoSynchronisation():
        terms = InstanceLoss(**options)(outputs, labels, ids)
        torch.stack(terms).sum().backward()
        connected_components(labels, relabel=True)
    assert torch.isfinite(outputs.grad).all()


CLASSES = {"activation": "softmax", "num_out_chn": 3, "object_chn": (1, 2), "to_onehot_y": True, "ignore_index": 255}


def batch_of_classes(seed=0):
    """Three channels of outputs, labels 0, 1, 2 and 255, and a mask of more voxels to ignore."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(1, 3, 4, 3, 5, generator=generator)
    labels = torch.tensor((0, 0, 1, 2, 255))[torch.randint(0, 5, (1, 1, 4, 3, 5), generator=generator)]
    return outputs.requires_grad_(), labels, torch.rand(labels.shape, generator=generator) < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, test_cuda.py asks the driver instead")
def test_classes_and_ignored_voxels_never_synchronise(kernels_alone):
    outputs, labels, ignored = batch_of_classes()
    with NoSynchronisation():
        terms = InstanceLoss(**CLASSES)(outputs, labels, ignore_mask=ignored)
        torch.stack(terms).sum().backward()
    assert torch.isfinite(outputs.grad).all()


def test_classes_and_ignored_voxels_compile_whole():
    torch.compiler.reset()
    loss = WeightedSum(InstanceLoss(**CLASSES, rate_instead_number=True))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        outputs, labels, ignored = batch_of_classes(seed)
        values = [run(outputs, labels, ignore_mask=ignored) for run in (loss, compiled)]
        grads = [torch.autograd.grad(value, outputs)[0] for value in values]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*grads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, test_cuda.py asks the driver instead")
@pytest.mark.parametrize("matching", ["overlap", "iou", "dilated"])
def test_metrics_never_synchronise(kernels_alone, matching):
    outputs, labels = batch(shape=(4, 5, 3))
    numbers = torch.arange(labels.numel()).view(labels.shape) // 7
    with NoSynchronisation():
        metrics = instance_metrics(outputs, labels, matching=matching)
        asked = {"sizes": (2, 9), "spacing": (1, 1, 2), "min_instance_size": 2.5, "cc_output_batch": numbers}
        metrics += instance_metrics(outputs, labels, matching=matching, **asked)
        metrics += (average_precision(outputs, labels),)
    assert all(torch.isfinite(value).all() for value in metrics)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_fake_tensors_go_all_the_way(activation):
    with FakeTensorMode():
        outputs = torch.randn(2, 1, 8, 9, 7, requires_grad=True)
        labels = torch.zeros(2, 1, 8, 9, 7)
        terms = InstanceLoss(activation=activation)(outputs, labels, torch.zeros(2, 1, 8, 9, 7, dtype=torch.int64))
        assert all(value.shape == () for value in terms)
        sum(terms).backward()
        assert outputs.grad.shape == outputs.shape


@functools.cache
def operator_arguments(device, backend):
    """Arguments of each operator, from a small batch; `backend` is the one in use."""
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.rand(2, 2, 5, 6, 7, generator=generator).to(device)
    labels = (labels > 0.7).int()
    rows = (36, 0) if backend == "cpu" else (30, 6)  # in the tables, and of the rest
    find = (x, labels, None, ops.SIGMOID, 0.66, ops.PROBABILITY, 0, 0, 0, 30, 50.0, *rows)
    sites, pixel_sums, health, counts, geometry = ops.find(*find)
    sum_instances = (x, sites, counts, geometry, ops.SIGMOID, 0, True, 128)
    maps = ops.row_maps(x, sites)
    criteria, weights = describe(*[fused_form(DICE)] * 3, 1e-7), [1.0] * 7
    how = (ops.SIGMOID, 0, True)
    of_terms = 0, True, 128, False, 3.0, [1.0, 2.0, 0.7], True, criteria, 1, ops.BY_MEAN, True
    evaluate = (x, sites, counts, geometry, pixel_sums, health, None, None, weights, ops.SIGMOID, *of_terms)
    terms, total, kept = ops.evaluate(*evaluate)
    regions = (x, labels, maps[2:], counts[ops.LABELS])
    region_loss = (*regions, None, ops.SIGMOID, ops.BLOB, [1.0, 1.0, 1e-5, 0.0], 1, rows[0])
    value, *slopes = ops.region_loss(*region_loss)
    backward = (x, labels, sites, counts, kept, terms, total, weights, *how, ops.PROBABILITY, 0, True, True)
    return {
        "find": find,
        "row_maps": (x, sites),
        "components": (maps[:2] > 0, 0),
        "find_instances": (maps[:2] > 0, 2, 1, 210),
        "number_instances": (maps[:2].long() * 2**40, 0, 36),
        "sum_instances": sum_instances,
        "evaluate": evaluate,
        "find_and_evaluate": (*find[:3], weights, *find[3:], *of_terms),
        "evaluate_backward": (*backward, ops.OF_LOGARITHM, False),
        "center_volumes": (geometry, counts, [5, 6, 7], [1, 2, 3]),
        "unclaimed": (x, sites, counts, geometry, 128),
        "cells": (maps[2:], [1.0, 1.0, 2.0]),
        "region_loss": region_loss,
        "region_loss_backward": (value, *regions[:3], *slopes, ops.SIGMOID, ops.BLOB),
    }


def test_every_operator_is_checked():
    assert set(operator_arguments("cpu", "cpu")) == set(ops._SCHEMAS)


@pytest.mark.parametrize("name", list(ops._SCHEMAS))
def test_opcheck(backend, name):
    # Pairs come in any order, and atomics add in any order: compare what does not depend on that.
    used = ops.backend(torch.empty(0, device=backend))
    arguments = operator_arguments(backend, used)[name]
    operator = getattr(torch.ops.triton_instance_loss, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    # Kernels leave rows that are not used as they are, and a whole opcheck compares all that is returned.
    with_tables = dispatch.ROOMS[name] in ("centers", "evaluate", "regions") or "find" in name or "number" in name
    with_tables = with_tables or name == "sum_instances"
    if backend.type == "cpu" and (used == "cpu" or not with_tables):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(activation, compiler):
    """Network and loss in one graph, forward and backward, with other numbers of instances, compiled once."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 1, 3, padding=1)
    network = torch.nn.Sequential(network, torch.nn.Sigmoid()) if activation == "none" else network
    loss = WeightedSum(InstanceLoss(activation=activation, rate_instead_number=True), proximity=0.1)

    def step(volume, labels):
        return loss(network(volume), labels)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for seed in range(3):
        volume, labels = batch(seed=seed, shape=(8, 7, 9))
        results = []
        for run in (step, compiled):
            network.zero_grad()
            value = run(3 * volume.detach(), labels)
            value.backward()
            results.append((value.detach(), [p.grad.clone() for p in network.parameters()], dict(loss.terms)))
        (value, grads, terms), (compiled_value, compiled_grads, compiled_terms) = results
        torch.testing.assert_close(compiled_value, value)
        torch.testing.assert_close(compiled_grads, grads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(compiled_terms, terms)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_whole_without_a_gradient(backend):
    """As in a validation step: another way through the compiler."""
    torch.compiler.reset()
    outputs, labels = (volume.to(backend) for volume in batch(shape=(8, 7, 9)))
    loss = InstanceLoss()
    with torch.no_grad():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(outputs, labels)
        torch.testing.assert_close(compiled, loss(outputs, labels))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_several_shapes(dynamic):
    torch.compiler.reset()
    loss = WeightedSum(InstanceLoss(rate_instead_number=True))
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((8, 9, 7), (10, 12, 6), (5, 5, 5)):
        outputs, labels = batch(shape=shape)
        torch.testing.assert_close(compiled(outputs, labels), loss(outputs, labels))


@pytest.mark.parametrize("name", ["family", "cells", "false components", "metrics"])
def test_compiles_once_for_all_shapes(backend, name):
    """With `dynamic`, forward and backward, whatever the batch and the sides."""
    call = {
        "family": WeightedSum(InstanceLoss(rate_instead_number=True)),
        "cells": CCLoss(),
        "false components": FalseComponentLoss(),
        "metrics": lambda outputs, labels: torch.stack(instance_metrics(outputs.detach(), labels))[2:].sum(),
    }[name]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for times, shape in ((1, (3, 5, 7)), (2, (6, 4, 8)), (3, (5, 5, 6))):
        outputs, labels = (torch.cat([each.detach().to(backend)] * times) for each in batch(shape=shape))
        leaves = [outputs.clone().requires_grad_() for _ in range(2)]
        values = [function(leaf, labels) for function, leaf in zip((compiled, call), leaves, strict=True)]
        torch.testing.assert_close(*values)
        if name != "metrics":
            torch.testing.assert_close(*[torch.autograd.grad(*pair)[0] for pair in zip(values, leaves, strict=True)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("matching", ["overlap", "iou", "dilated"])
@pytest.mark.parametrize("asked", [{}, {"sizes": (2, 9), "spacing": (1, 1, 2), "min_instance_size": 2.5}], ids=str)
def test_metrics_compile_whole(matching, asked):
    """In one graph, for other numbers of instances and other shapes."""
    torch.compiler.reset()
    compiled = torch.compile(instance_metrics, fullgraph=True, backend="aot_eager")
    for seed, shape in enumerate(((8, 9, 7), (8, 9, 7), (10, 12, 6))):
        outputs, labels = batch(seed=seed, shape=shape)
        outputs = outputs + 4 * labels - 2
        options = {"matching": matching, "dilation": 1, **asked}
        if asked:
            options["cc_output_batch"] = torch.arange(labels.numel()).view(labels.shape) // 7
        expected = instance_metrics(outputs, labels, **options)
        torch.testing.assert_close(compiled(outputs, labels, **options), expected)
        assert (expected.num_labels if asked else expected.matched).sum() > 0


def test_weights_that_change_are_not_compiled_each_time():
    """Once more when a term joins in, not for every value on its way up."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    outputs, labels = batch()
    loss = WeightedSum(InstanceLoss(rate_instead_number=True))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for epoch in range(12):
        loss.weights["center"] = 0.02 * epoch
        torch.testing.assert_close(compiled(outputs, labels), loss(outputs, labels))
        assert ("center" in loss.terms) == (epoch > 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_slow_criterion_still_runs_compiled():
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="no fused form"):
        loss = InstanceLoss(None, torch.nn.HuberLoss())
    outputs, labels = batch()
    compiled = torch.compile(loss, backend="aot_eager")(outputs, labels)
    torch.testing.assert_close(torch.stack(compiled), torch.stack(loss(outputs, labels)))
