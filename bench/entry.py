"""What a benchmark is made of: cases, providers of an answer, and the comparison that gates the timing."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Draw, Inputs, Shape
from .references import KNOWN

SEED = 2024
# Of float answers, relative to the largest entry (or to 1): two formulas in float32 over millions of voxels.
TOLERANCE = 1e-4

Answer = list[Tensor]


@dataclass(frozen=True)
class Setup:
    """Where the benchmark runs, and authors' code by name, of which a checkout was named."""

    device: torch.device
    references: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One input: its name, shape and drawing; `tiny` is the shape that tests use."""

    name: str
    shape: Shape
    draw: Draw
    tiny: Shape

    @property
    def voxels(self) -> int:
        """Voxels of the whole batch."""
        return math.prod(self.shape)

    def shrunk(self) -> "Case":
        """The same in the shape for tests."""
        return Case(f"{self.name}, tiny", self.tiny, self.draw, self.tiny)


Function = Callable[[], Any]
Build = Callable[[Inputs, Setup], Function]
Truth = Callable[[Inputs, Setup], Answer]


@dataclass(frozen=True)
class Provider:
    """One way to the answer.

    Args:
        name: as it stands in rows and pictures.
        build: prepares everything that is not to be timed and returns the function that is.
        truth: gives the answer the function must give to be timed; None for a yardstick, which answers something else.
        needs: modules that must be installed, and names of authors' code (`references.KNOWN`).
        devices: where it runs.
        most_voxels: more than this, by device, and it is left out.
        torch_memory: whether all it allocates is seen by torch's statistics (on CUDA).
    """

    name: str
    build: Build
    truth: Truth | None
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    most_voxels: dict[str, int] = field(default_factory=dict)
    torch_memory: bool = True

    def reason_to_skip(self, case: Case, setup: Setup) -> tuple[str, str]:
        """(status, detail) of a row that says why there is no time; two empty strings if nothing is in the way."""
        device = setup.device.type
        missing = [name for name in self.needs if not _have(name, setup)]
        if missing:
            return "absent", f"needs {', '.join(missing)}"
        if device not in self.devices:
            return "absent", f"runs on {', '.join(self.devices)} only"
        if case.voxels > self.most_voxels.get(device, case.voxels):
            return "too large", f"more than {self.most_voxels[device]} voxels"
        return "", ""


def _have(name: str, setup: Setup) -> bool:
    if name in KNOWN:
        return name in setup.references
    return importlib.util.find_spec(name) is not None


@dataclass(frozen=True)
class Entry:
    """One thing measured.

    Args:
        name: for the command line.
        about: one line for people.
        cases: the inputs.
        providers: side by side in one process.
        read: makes comparable tensors of what a provider's function returns.
        bytes_per_voxel: what cannot be avoided: inputs read once, results written once.
        yardsticks: ratios are to the first of these that was timed.
        seconds: for measuring one provider on one case, unless the command line says otherwise.
    """

    name: str
    about: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    read: Callable[[Any], Answer]
    bytes_per_voxel: int
    yardsticks: tuple[str, ...]
    seconds: float = 2.0


def difference(answer: Answer, truth: Answer) -> str:
    """How `answer` differs from `truth`: integers exactly, floats beyond the tolerance; empty if it does not."""
    if len(answer) != len(truth):
        return f"{len(answer)} results instead of {len(truth)}"
    for number, (ours, theirs) in enumerate(zip(answer, truth, strict=True)):
        if ours.shape != theirs.shape:
            return f"result {number} has shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        theirs = theirs.to(ours.device)
        if not ours.is_floating_point():
            wrong = int((ours != theirs).sum())
            if wrong:
                return f"result {number} is wrong at {wrong} of {ours.numel()} places"
        else:
            error = float((ours.double() - theirs.double()).abs().max())
            allowed = TOLERANCE * max(float(theirs.abs().max()), 1.0 if ours.numel() == 1 else 0.0)
            if not error <= allowed:
                return f"result {number} is off by {error:.3g}, allowed {allowed:.3g}"
    return ""
