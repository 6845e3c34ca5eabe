"""Set up the tests on the PTX machine: kernels as compiled for a GPU, carried out on CPU tensors.

`make test-ptx` runs them by themselves: in a process, kernels are either compiled or interpreted.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

os.environ.pop("TRITON_INTERPRET", None)

import torch
from machine import COMPILER, MACHINE, install

from bench.absent_gpu import define_kernels

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
    define_kernels()
    assert not importlib.import_module("triton_instance_loss.kernels.blocks").INTERPRETED
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def machine():
    """As it is at first: blocks in order, nothing spoilt."""
    MACHINE.use()
    yield MACHINE
    MACHINE.spoil = None
