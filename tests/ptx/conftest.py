"""Set up the tests on the PTX machine: kernels as compiled for a GPU, carried out on CPU tensors.

`make test-ptx` runs them by themselves: in a process, kernels are either compiled or interpreted.
"""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

os.environ.pop("TRITON_INTERPRET", None)

import torch
from backends import VARIABLE
from machine import COMPILER, MACHINE, install

# What Triton did before it could be set; silences a warning.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def pytest_collection_modifyitems(items):
    if COMPILER is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="gcc is not installed, which compiles the machine"))


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels():
    """The Triton backend for CPU tensors, with its kernels as a GPU has them."""
    install()
    package = importlib.import_module("triton_instance_loss.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    assert not importlib.import_module("triton_instance_loss.kernels.blocks").INTERPRETED
    # Lets CPU tensors pass; that the kernels are compiled has been decided when they were defined.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ[VARIABLE] = "triton"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def machine():
    """As it is at first: blocks in order, nothing spoilt."""
    MACHINE.use()
    yield MACHINE
    MACHINE.spoil = None
