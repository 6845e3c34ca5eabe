"""Which backend answers for a tensor, and how an operator finds it.

CPU tensors go to `cpu/`, CUDA tensors to `kernels/`, which have the same rooms. The environment variable
`TRITON_INSTANCE_LOSS_BACKEND` (`cpu` or `triton`), read at each call, overrides that. This module imports neither
Triton nor Numba.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKEND_VARIABLE = "TRITON_INSTANCE_LOSS_BACKEND"

# Looked up here: torch.compile traces `backend`, and up to torch 2.12 it cannot trace a search for packages.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def backend(tensor: Tensor) -> str:
    """Name of the backend that answers for `tensor`: "cpu" or "triton".

    Raises:
        ValueError: the environment variable holds anything else, or asks for the CPU backend on a CUDA tensor.
        RuntimeError: Triton is asked for and is missing, or has to run on CPU tensors without its interpreter.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "cpu", "triton"):
        raise ValueError(f"{BACKEND_VARIABLE} must be 'cpu' or 'triton' (or unset), got {wanted!r}.")
    device = tensor.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}.")
    chosen = wanted or ("triton" if device == "cuda" else "cpu")
    if chosen == "cpu" and device == "cuda":
        raise ValueError(f"{BACKEND_VARIABLE}='cpu' works on CPU tensors only, got a tensor on {tensor.device}.")
    if chosen == "triton":
        if not _TRITON_IS_INSTALLED:
            raise RuntimeError(
                f"Tensors on {tensor.device} need the package 'triton', which is not installed: `pip install triton` "
                "(Linux), or move the tensors to the CPU."
            )
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{BACKEND_VARIABLE}='triton' on CPU tensors runs Triton's interpreter: set TRITON_INTERPRET=1 before "
                "the process first imports triton."
            )
    return chosen


@functools.cache
def _implementation(chosen: str, name: str, room: str) -> Any:
    """What answers for an operator in a backend; rooms are imported when they are first needed."""
    if chosen == "cpu":
        return getattr(importlib.import_module(f".cpu.{room}", __package__), name)
    return getattr(importlib.import_module(f".kernels.{room}", __package__), f"launch_{name}")


def dispatch(name: str, room: str) -> Any:
    """The operator `name`, which both backends have in the same room, on the device of its tensors."""

    def run(*args: Any) -> Any:
        first: Tensor = args[0] if isinstance(args[0], Tensor) else args[2]
        answer = _implementation(backend(first), name, room)
        if first.device.type == "cpu" or first.device.index == torch.cuda.current_device():
            return answer(*args)
        with torch.cuda.device(first.device):
            return answer(*args)

    return run
