"""Every operator on small volumes, against the CPU backend: `python -m bench.gpu_small`.

Alone, or under compute-sanitizer. Kernels, blocks and warps are those of real launches; only the volumes are small,
since a sanitizer is slow.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from triton_instance_loss import InstanceLoss, connected_components, ops

from .entry import Answer, difference
from .steps import PlainDice

SHAPES = ((2, 1, 13, 14), (2, 1, 9, 10, 11))


def _slow(outputs: Tensor, labels: Tensor) -> Tensor:
    """A criterion without a fused form."""
    result: Tensor = PlainDice()(outputs, labels)
    return result


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "probabilities": {"activation": "none", "instance_wise_loss_no_tp": False},
    "two channels": {"activation": "softmax", "num_out_chn": 2, "rate_instead_number": True},
    "three rounds": {"num_iterations": 3, "max_cc_out": 0},
    "no small instances": {"min_instance_size": 2, "max_cc_out": 3, "reduce_segmentation": "sum"},
    "too many": {"mul_too_many": 0},
    "squares": {"activation": "none", "loss_function_instance": torch.nn.MSELoss()},
    "cross entropy": {"activation": "none", "loss_function_instance": torch.nn.BCELoss()},
    "any criterion": {"loss_function_instance": _slow, "loss_function_center": _slow},
    "components given": {"given": True},
}


def _inputs(shape: tuple[int, ...], variant: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = variant.get("num_out_chn", 1)
    outputs = torch.randn((shape[0], channels, *shape[2:]), generator=generator) - 1.0
    if variant.get("activation") == "none":
        outputs = torch.sigmoid(outputs)
    labels = (torch.rand(shape, generator=generator) < 0.15).float()
    labels[-1] *= float(seed % 2)  # a sample without labels
    return outputs, labels


def _answer(outputs: Tensor, labels: Tensor, options: dict[str, Any], device: torch.device) -> Answer:
    options = dict(options)
    given = options.pop("given", False)
    ids = connected_components(labels).to(device) if given else None
    outputs, labels = outputs.to(device).requires_grad_(), labels.to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terms = InstanceLoss(spatial_dims=outputs.ndim - 2, **options)(outputs, labels, ids)
    sum(terms[1:], terms[0]).backward()
    assert outputs.grad is not None
    return [*(term.detach() for term in terms), outputs.grad]


def compare(
    device: torch.device, backend: str, names: Iterable[str] = VARIANTS, seeds: Iterable[int] = (0, 1)
) -> Iterator[tuple[str, str]]:
    """(what was compared, how it differs from the CPU backend)."""
    for shape in SHAPES:
        for name in names:
            options = VARIANTS[name]
            for seed in seeds:
                outputs, labels = _inputs(shape, options, seed)
                expected = _answer(outputs, labels, options, torch.device("cpu"))
                with mock.patch.dict(os.environ, {ops.BACKEND_VARIABLE: backend}):
                    answer = _answer(outputs, labels, options, device)
                yield f"{len(shape) - 2}D, {name}, seed {seed}", difference(answer, expected)


def main(given: list[str] | None = None) -> None:
    """Print what differs; exit with 1 if anything does."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_small", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one input of each kind")
    options = parser.parse_args(given)
    wrong = 0
    backend, seeds = ("triton" if options.device == "cuda" else "cpu"), ((1,) if options.quick else (0, 1))
    for name, detail in compare(torch.device(options.device), backend, seeds=seeds):
        print(f"{name}: {detail or 'as on the CPU'}", flush=True)
        wrong += bool(detail)
    print(f"{wrong} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
