"""Who takes a training step, forward and backward: the losses, MONAI's Dice as the yardstick, and labels plus torch."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_instance_loss import InstanceLoss, connected_components
from triton_instance_loss.functional import instance_segmentation_loss
from triton_instance_loss.metrics import instance_metrics

from . import labelling
from .cases import Inputs
from .entry import Answer, Function, Provider, Setup

PUBLISHED_ROUNDS = 350
PUBLISHED_VOXELS = {"cpu": 2**15}
MAX_OUT, TOO_MANY, SMOOTH = 50, 50, 1e-5

Step = Callable[[Tensor, Tensor], Any]  # outputs and labels to what is added up and differentiated


class PlainDice(torch.nn.Module):
    """The operations of MONAI's `DiceLoss()` with default options, one by one, for where MONAI is not installed."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over samples and channels of 1 - (2 sum u w + s) / (sum u + sum w + s), s = 1e-5."""
        axes = list(range(2, outputs.ndim))
        both = torch.sum(outputs * labels, dim=axes)
        only_outputs = torch.sum(outputs, dim=axes) - both
        only_labels = torch.sum(labels, dim=axes) - both
        only_outputs *= 0.5
        only_labels *= 0.5
        numerator = 2 * both + SMOOTH
        return torch.mean(1 - numerator / (2 * (both + only_outputs + only_labels) + SMOOTH))


def _monai_dice() -> Any:
    from monai.losses import DiceLoss

    return DiceLoss()


def run_step(step: Step, inputs: Inputs) -> Function:
    """Forward, the sum of the terms, backward; returns the terms and the gradient."""
    outputs = inputs.outputs.detach().requires_grad_()

    def run() -> tuple[tuple[Tensor, ...], Tensor]:
        outputs.grad = None
        result = step(outputs, inputs.labels)
        terms = (result,) if isinstance(result, Tensor) else tuple(result)
        total = terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])
        total.backward()
        assert outputs.grad is not None
        return tuple(term.detach() for term in terms), outputs.grad

    return run


def read(result: tuple[tuple[Tensor, ...], Tensor]) -> Answer:
    """Each term, and the gradient."""
    terms, grad = result
    return [*terms, grad]


def in_graph(run: Function) -> Function:
    """The same as one CUDA graph; what it returns is written anew by each replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


# --- what is timed ----------------------------------------------------------------------------------------------------

Options = dict[str, Any]


def _dimensions(inputs: Inputs) -> Options:
    return {"spatial_dims": inputs.outputs.ndim - 2}


def defaults(inputs: Inputs) -> Options:
    """The arguments of our loss with nothing chosen."""
    return _dimensions(inputs)


def with_monai(inputs: Inputs) -> Options:
    """MONAI's DiceLoss three times, all else default."""
    dice = _monai_dice()
    names = ("loss_function_pixel", "loss_function_instance", "loss_function_center")
    return {**_dimensions(inputs), **dict.fromkeys(names, dice)}


def as_published(inputs: Inputs) -> Options:
    """What the published code can do: its rounds of pooling, on probabilities, which have gradients in it."""
    return {**with_monai(inputs), "num_iterations": PUBLISHED_ROUNDS, "activation": "none"}


def _probabilities(inputs: Inputs) -> Inputs:
    return Inputs(torch.sigmoid(inputs.outputs), inputs.labels)


def _ours(options: Callable[[Inputs], Options]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: run_step(InstanceLoss(**options(inputs)), inputs)


def _ours_in_graph(options: Callable[[Inputs], Options]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: in_graph(_ours(options)(inputs, setup))


def _ours_as_published(inputs: Inputs, setup: Setup) -> Function:
    return run_step(InstanceLoss(**as_published(inputs), gradients="reference"), _probabilities(inputs))


def _published(inputs: Inputs, setup: Setup) -> Function:
    loss = setup.references["instance_loss"].InstanceLoss(**as_published(inputs), centroid_offset=3)
    return run_step(loss, _probabilities(inputs))


def soft(inputs: Inputs) -> Options:
    """Probabilities as they are, of which sums are no whole numbers; all else default."""
    return {**_dimensions(inputs), "activation": "none"}


def _ours_with_components(inputs: Inputs, setup: Setup) -> Function:
    """The labels' components are given, as from a file."""
    components, loss = connected_components(inputs.labels), InstanceLoss(**defaults(inputs))
    return run_step(lambda outputs, labels: loss(outputs, labels, components), inputs)


def _metrics(**options: Any) -> Callable[[Inputs, Setup], Function]:
    """Forward alone: there is nothing to differentiate."""
    return lambda inputs, setup: (
        lambda: instance_metrics(inputs.outputs, inputs.labels, **_dimensions(inputs), **options)
    )


def read_any(result: Any) -> Answer:
    """The terms and the gradient of a step, or the metrics."""
    return read(result) if len(result) == 2 else list(result)


def _metrics_by_cpu(**options: Any) -> Callable[[Inputs, Setup], Answer]:
    return lambda inputs, setup: list(_metrics(**options)(on_host(inputs), setup)())


def _ours_soft(inputs: Inputs, setup: Setup) -> Function:
    return _ours(soft)(_probabilities(inputs), setup)


def _ours_deterministic(inputs: Inputs, setup: Setup) -> Function:
    run = _ours_soft(inputs, setup)

    def run_asked() -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(False)

    return run_asked


def soft_by_cpu(inputs: Inputs, setup: Setup) -> Answer:
    """The CPU backend's answer on probabilities."""
    return read(_ours_soft(on_host(inputs), setup)())


def _terms_alone(inputs: Inputs, setup: Setup) -> Function:
    return run_step(lambda outputs, labels: instance_segmentation_loss(outputs, labels, **_dimensions(inputs)), inputs)


def _by_labels(label: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: run_step(lambda *volumes: instance_terms_by_scatter(*volumes, label), inputs)


# --- what the answer must be ------------------------------------------------------------------------------------------


def on_host(inputs: Inputs) -> Inputs:
    """The same on the CPU."""
    return inputs.to(torch.device("cpu"))


def by_cpu(options: Callable[[Inputs], Options]) -> Callable[[Inputs, Setup], Answer]:
    """The CPU backend's answer: what every other backend has to give."""
    return lambda inputs, setup: read(_ours(options)(on_host(inputs), setup)())


def volume_by_volume(options: Callable[[Inputs], Options]) -> Callable[[Inputs, Setup], Answer]:
    """The terms by the slow way, full volumes for each instance; the gradient by the CPU backend."""

    def truth(inputs: Inputs, setup: Setup) -> Answer:
        host, chosen = on_host(inputs), options(inputs)
        unknown: Options = dict.fromkeys(("loss_function_instance", "loss_function_center"), _unregistered)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            terms = InstanceLoss(**{**chosen, **unknown})(host.outputs, host.labels)
        return [*terms, by_cpu(options)(host, setup)[-1]]

    return truth


def _unregistered(outputs: Tensor, labels: Tensor) -> Tensor:
    result: Tensor = PlainDice()(outputs, labels)
    return result


def terms_alone(inputs: Inputs, setup: Setup) -> Answer:
    """The two instance terms of the CPU backend."""
    return read(_terms_alone(on_host(inputs), setup)())


def published_answer(inputs: Inputs, setup: Setup) -> Answer:
    """The answer of the published code; without it, or where it would take minutes, of our CPU backend."""
    too_large = inputs.outputs.numel() > PUBLISHED_VOXELS.get(setup.device.type, inputs.outputs.numel())
    if "instance_loss" not in setup.references or too_large:
        return read(_ours_as_published(on_host(inputs), setup)())
    return read(_published(inputs, setup)())


def instance_terms_by_scatter(
    outputs: Tensor, labels: Tensor, label: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """instance_label and instance_output with default options, from any labeller and torch's own operations.

    What one would write without this library: labels, `unique` for dense numbers, `index_add` for sums. It reads
    counts, so it synchronises.
    """
    probabilities = torch.sigmoid(outputs)
    foreground, truth = probabilities.detach() >= 0.5, labels == 1
    a = foreground.float() + (probabilities - probabilities.detach())
    out_ids, lab_ids = label(foreground), label(truth)
    per_label, per_output = [], []
    for sample in range(outputs.shape[0]):
        values = _scatter_sample(a[sample], truth[sample], out_ids[sample], lab_ids[sample])
        per_label.append(values[0])
        per_output.append(values[1])
    return torch.cat(per_label).mean(), torch.cat(per_output).mean()


def _dense(ids: Tensor) -> tuple[Tensor, int]:
    """Numbers 1..n in the order of the largest voxel, 0 in the background."""
    flat = ids.flatten().long()
    names, numbers = flat.unique(return_inverse=True)
    if names[0] != 0:
        numbers, names = numbers + 1, torch.cat((names.new_zeros(1), names))
    largest = torch.zeros_like(names).scatter_reduce_(0, numbers, torch.arange(len(flat), device=flat.device), "amax")
    largest[0] = -1
    return largest.argsort().argsort()[numbers], len(names) - 1


def _dice(intersection: Tensor, total: Tensor) -> Tensor:
    return 1.0 - (2.0 * intersection + SMOOTH) / (total + SMOOTH)


def _scatter_sample(a: Tensor, truth: Tensor, out_ids: Tensor, lab_ids: Tensor) -> tuple[Tensor, Tensor]:
    a, y = a.flatten(), truth.flatten().float()
    out, outputs = _dense(out_ids)
    lab, labels = _dense(lab_ids)
    kept = 0 if labels and outputs > labels * TOO_MANY else min(outputs, MAX_OUT)
    whole = _dice((a * y).sum(), a.sum() + y.sum())[None]

    def add_up(values: Tensor, numbers: Tensor, count: int) -> Tensor:
        return torch.zeros(count + 1, device=a.device).index_add(0, numbers, values)[1:]

    inside = out * (out <= kept)
    touching = torch.zeros((kept + 1) * (labels + 1), device=a.device)
    touching[inside * (labels + 1) + lab] = 1.0
    touching = touching.view(kept + 1, labels + 1)[1:, 1:]
    lab_sizes = add_up(torch.ones_like(a), lab, labels)
    excess = add_up(a * a.detach() * (1 - y), inside, kept)
    matched = add_up(a * (inside > 0), lab, labels)
    per_label = _dice(matched, matched + touching.T @ excess + lab_sizes) if labels else whole
    mass, hit = add_up(a, inside, kept), add_up(a * y, inside, kept)
    per_output = _dice(hit, mass + touching @ lab_sizes) if kept else whole
    return per_label, per_output


def _yardstick(make: Callable[[], Any]) -> Callable[[Inputs, Setup], Function]:
    return lambda inputs, setup: run_step(make(), inputs)


YARDSTICKS = ("MONAI DiceLoss", "plain Dice")
DICE = (
    Provider("MONAI DiceLoss", _yardstick(_monai_dice), None, needs=("monai",)),
    Provider("plain Dice", _yardstick(PlainDice), None),
)


def providers(
    truth: Callable[[Callable[[Inputs], Options]], Callable[[Inputs, Setup], Answer]],
) -> tuple[Provider, ...]:
    """The yardsticks and our loss, eager and in a CUDA graph, with MONAI's criteria and our own."""
    ours = [("ours, MONAI criteria", with_monai, ("monai",)), ("ours, defaults", defaults, ())]
    return (
        *DICE,
        *(Provider(name, _ours(options), truth(options), needs) for name, options, needs in ours),
        *(
            Provider(
                f"{name}, CUDA graph", _ours_in_graph(options), truth(options), needs, ("cuda",), torch_memory=False
            )
            for name, options, needs in ours
        ),
    )


REFERENCE = (
    *DICE,
    Provider("published", _published, published_answer, ("instance_loss", "monai"), most_voxels=PUBLISHED_VOXELS),
    Provider("ours, as published", _ours_as_published, published_answer, ("monai",)),
    Provider("ours, MONAI criteria", _ours(with_monai), by_cpu(with_monai), ("monai",)),
)

SMALL = (
    *DICE,
    Provider("ours, MONAI criteria", _ours(with_monai), by_cpu(with_monai), ("monai",)),
    Provider("ours, defaults", _ours(defaults), by_cpu(defaults)),
    Provider("ours, components given", _ours_with_components, by_cpu(defaults)),
    *(
        Provider(f"instance_metrics, {way}", _metrics(matching=way), _metrics_by_cpu(matching=way))
        for way in ("overlap", "iou")
    ),
)

DETERMINISM = (
    *DICE,
    Provider("ours, defaults", _ours(defaults), by_cpu(defaults)),
    Provider("ours, soft", _ours_soft, soft_by_cpu),
    Provider("ours, soft, deterministic", _ours_deterministic, soft_by_cpu),
)

INSTANCE_TERMS = (
    *DICE,
    Provider("ours", _terms_alone, terms_alone),
    *(
        Provider(f"{name} + torch", _by_labels(label), terms_alone, needs, devices, torch_memory="cupy" not in needs)
        for name, (label, needs, devices) in labelling.LABELLERS.items()
    ),
)
