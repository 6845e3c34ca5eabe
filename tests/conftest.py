"""Set up the tests: Triton's interpreter where there is no GPU, the backends, and how hypothesis draws."""

import os

import torch

if not torch.cuda.is_available():
    # Before the first `import triton` of the process.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
from backends import BACKENDS, using_backend

# "stable" draws the same cases in each run; `--hypothesis-profile=random` draws new ones (and takes --hypothesis-seed).
hypothesis.settings.register_profile("stable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.load_profile("stable")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test once a backend; its value is the device that the tensors belong on."""
    with using_backend(request.param) as device:
        yield device
