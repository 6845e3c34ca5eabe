"""Which backends the tests run on, and how one is selected."""

import contextlib
import os
from collections.abc import Iterator

import torch

BACKENDS = ("cpu", "triton")
VARIABLE = "TRITON_INSTANCE_LOSS_BACKEND"


@contextlib.contextmanager
def using_backend(name: str) -> Iterator[torch.device]:
    """Select a backend; gives the device its tensors belong on: for "triton" CUDA, or else the CPU (interpreted)."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
