"""Set up the tests: Triton's interpreter where there is no GPU, the backends, and how hypothesis draws."""

import dataclasses
import importlib
import importlib.util
import os

import torch

# Inductor's cache on disk does not know when an operator gives other shapes than before.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
if not torch.cuda.is_available():
    # Before the first `import triton` of the process.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
from backends import BACKENDS, using_backend

collect_ignore = ["ptx"]  # which wants compiled kernels: `make test-ptx`

# "stable" draws the same cases in each run; `--hypothesis-profile=random` draws new ones (and takes --hypothesis-seed).
hypothesis.settings.register_profile("stable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.load_profile("stable")


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    """Leave out what takes Triton's interpreter more than half its time and shows nothing here.

    It puts its builtins in place for each call of a device function. Once is enough: a launch does it for those of
    `tl`, and the first call of one of Triton's own functions for those it sees under another name, which stay. And it
    looks for overflows by doing each sum and product twice; our numbers are compared with the true ones.
    """
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    whole_call, in_place = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if "tl" in self.fn.__globals__ or self.fn.__module__ in in_place:
            return self.rewrite()(*args, **kwargs)
        in_place.add(self.fn.__module__)
        return whole_call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test once a backend; its value is the device that the tensors belong on."""
    with using_backend(request.param) as device:
        yield device


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Run the test once a device, as a user would: the backend is the one of the device."""
    return torch.device(request.param)


@pytest.fixture
def poison(monkeypatch):
    """Fill what `torch.empty` returns with NaN and the largest integers, so that no test passes by luck."""
    if importlib.util.find_spec("triton") is not None:  # memory alone is meant, not the kernels' deterministic way
        monkeypatch.setattr("triton_instance_loss.kernels.blocks.deterministic", lambda: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu_blocks(monkeypatch):
    """Programs as small as on a GPU, so that instances cross them."""
    from triton_instance_loss.kernels import blocks

    monkeypatch.setattr(blocks, "INTERPRETED", False)
    monkeypatch.setattr(blocks, "TABLE_PROGRAMS", 3)


@pytest.fixture(params=[0, 1])
def interleaved(request, monkeypatch, gpu_blocks):
    """Programs as on a GPU, several at once: none of them may count on another one, nor on its own lanes."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs its programs at once by itself")
    return importlib.import_module("interleaving").Interleaving(monkeypatch, request.param)
