"""Label hard masks again and again, and compare each time with the CPU: `python -m bench.gpu_races --repeats 200`.

A race shows as an answer that is wrong once in a while. The ids of components are checked, and rows, counts and
geometry of the instances; then all terms and the gradient of the loss, which with "sigmoid" must be equal bit by bit.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from triton_instance_loss import InstanceLoss, connected_components, ops
from triton_instance_loss.activation import to_volume
from triton_instance_loss.components import capacity_bound

from . import labelling
from .cases import Inputs, checkerboard, comb, lesions, noise, spirals
from .entry import SEED, Setup, difference

PATTERNS = {
    "spirals": spirals,
    "comb": comb,
    "checkerboard": checkerboard,
    **{f"noise {percent} %": noise(percent / 100) for percent in (20, 30, 40, 50, 60)},
}
SHAPES = ((2, 1, 61, 67, 71), (1, 1, 128, 128, 128), (4, 1, 255, 257))
SMALL_SHAPES = ((2, 1, 7, 8, 9), (2, 1, 11, 12))


def masks(small: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every pattern in every shape, on the CPU."""
    for shape in SMALL_SHAPES if small else SHAPES:
        for name, draw in PATTERNS.items():
            yield f"{name}, {' x '.join(map(str, shape))}", draw(shape, SEED).outputs


def expected_ids(mask: Tensor) -> Tensor:
    """What the CPU backend says, after SciPy agreed.

    Raises:
        AssertionError: They do not agree.
    """
    ids = connected_components(mask)
    assert isinstance(ids, Tensor)
    differs = difference([ids], labelling.truth(Inputs(mask, mask), Setup(torch.device("cpu"))))
    assert not differs, f"the CPU backend and SciPy: {differs}"
    return ids


def repeat_labelling(mask: Tensor, device: torch.device, repeats: int, until: float) -> tuple[int, int]:
    """(wrong, done) labellings of one mask."""
    volume = to_volume(mask)
    search = (0, 0, capacity_bound(volume.shape, None))
    expected = [to_volume(expected_ids(mask)), *ops.find_instances(volume, *search)]
    expected, there = [tensor.to(device) for tensor in expected], volume.to(device)
    wrong, done = torch.zeros((), dtype=torch.long, device=device), 0
    while done < repeats and (done == 0 or time.monotonic() < until):
        ids, rows, counts, geometry = ops.components(there, 0), *ops.find_instances(there, *search)
        used = ops.first_rows(counts, geometry.shape[1])[..., None]  # other rows hold anything
        answers = [ids, rows, counts, torch.where(used, geometry, expected[-1])]
        differs = [(ours != theirs).any() for ours, theirs in zip(answers, expected, strict=True)]
        wrong += torch.stack(differs).any()
        done += 1
    return int(wrong), done


def repeat_loss(inputs: Inputs, device: torch.device, repeats: int, until: float) -> tuple[int, int, int]:
    """(wrong terms, wrong gradients, done) of training steps on one input: not the bits of the first one."""
    there, loss = inputs.to(device), InstanceLoss()
    outputs = there.outputs.requires_grad_()
    first: tuple[Tensor, Tensor] | None = None
    wrong, done = torch.zeros(2, dtype=torch.long, device=device), 0
    while done < repeats and (done == 0 or time.monotonic() < until):
        terms = loss(outputs, there.labels)
        (grad,) = torch.autograd.grad(sum(terms[1:], terms[0]), outputs)
        answer = torch.stack(terms).detach(), grad
        first = answer if first is None else first
        wrong += torch.stack([(ours != theirs).any() for ours, theirs in zip(answer, first, strict=True)])
        done += 1
    return int(wrong[0]), int(wrong[1]), done


def main(given: list[str] | None = None) -> None:
    """One line a mask; exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_races", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180, help="then one repeat each of what is left")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small masks")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    # Memory that a kernel forgets to write shows as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    until = time.monotonic() + options.seconds
    all_wrong = 0

    def report(name: str, wrong: int, done: int) -> int:
        print(f"{name}: {wrong} wrong of {done}", flush=True)
        return wrong

    for name, mask in masks(options.small):
        all_wrong += report(name, *repeat_labelling(mask, device, options.repeats, until))
    side = 24 if options.small else 96
    some = lesions((2, 1, side, side, side), SEED)
    noisy = Inputs(torch.randn(some.outputs.shape, generator=torch.Generator().manual_seed(SEED)), some.labels)
    for name, inputs in (("lesions", some), ("noise", noisy)):
        terms, grads, done = repeat_loss(inputs, device, options.repeats, until)
        all_wrong += report(f"terms of the loss, {name}", terms, done)
        all_wrong += report(f"gradient of the loss, {name}", grads, done)
    print(f"{all_wrong} wrong")
    sys.exit(all_wrong > 0)


if __name__ == "__main__":
    main()
