"""Which backend answers for a tensor, and how an operator finds it.

CPU tensors go to `cpu/`, CUDA tensors to `kernels/`, which have the same rooms. The environment variable
`TRITON_INSTANCE_LOSS_BACKEND` (`cpu` or `triton`), read at each call, overrides that. This module imports neither
Triton nor Numba.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BACKEND_VARIABLE = "TRITON_INSTANCE_LOSS_BACKEND"

# Which room of `cpu/` holds an operator, and of `kernels/` its launcher.
ROOMS = {
    "find": "instances",
    "row_maps": "instances",
    "components": "components",
    "find_instances": "components",
    "number_instances": "components",
    "sum_instances": "tables",
    "evaluate": "evaluate",
    "find_and_evaluate": "evaluate",
    "evaluate_backward": "evaluate",
    "center_volumes": "centers",
    "unclaimed": "claims",
    "cells": "cells",
    "region_loss": "regions",
    "region_loss_backward": "regions",
}

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
def _implementation(chosen: str, name: str) -> Any:
    """What answers for an operator in a backend; rooms are imported when they are first needed."""
    if chosen == "cpu":
        return getattr(importlib.import_module(f".cpu.{ROOMS[name]}", __package__), name)
    launcher = getattr(importlib.import_module(f".kernels.{ROOMS[name]}", __package__), f"launch_{name}")
    return functools.partial(importlib.import_module(".kernels.launches", __package__).planned, launcher)


def answer(name: str, first: Tensor, *args: Any) -> Any:
    """What an operator gives."""
    answers = _implementation(backend(first), name)
    device = first.device
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return answers(first, *args)
    with torch.cuda.device(device):
        return answers(first, *args)


def operator(name: str) -> Any:
    """An operator, called by itself where nothing between it and its backend wants to know: PyTorch takes 15 us."""
    registered = getattr(torch.ops.triton_instance_loss, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_overheard() or not _are_plain(args):
            return registered(*args)
        return answer(name, *args)

    return call


_NO_TENSORS = frozenset((int, float, bool, tuple, type(None)))  # what most arguments are; tuples hold numbers


def _is_overheard() -> bool:
    """Whether a mode, a transform or a profiler takes part in what PyTorch calls."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    )


def _are_plain(args: Iterable[Any]) -> bool:
    """Whether tensors among the arguments have nothing around them."""
    for arg in args:
        kind = type(arg)
        if kind in _NO_TENSORS:
            continue
        if kind is list:
            if not _are_plain(arg):
                return False
        elif kind is Tensor:
            # (a transform that is not active at this level may have wrapped it)
            if torch._C._functorch.is_functorch_wrapped_tensor(arg):
                return False
        elif issubclass(kind, Tensor):
            return False
    return True
