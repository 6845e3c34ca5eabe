"""Every kernel compiles for every GPU generation we support, and keeps its registers; needs no GPU."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ARCHITECTURES = (80, 90, 100)
# Kernels that may spill registers to memory, each with its reason.
SPILLS: dict[str, str] = {}


@pytest.fixture(scope="module")
def compiled():
    """One line for each compiled kernel, by kernel; compiled in a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton did before it could be set; silences a warning
    command = [sys.executable, str(SCRIPT), "--json", "--architectures", *map(str, ARCHITECTURES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = collections.defaultdict(list)
    for line in map(json.loads, result.stdout.splitlines()):
        kernels[line["kernel"]].append(line)
    return kernels


def test_every_kernel_compiles_everywhere(compiled):
    for kernel, lines in compiled.items():  # the script itself fails on a kernel that it does not know how to launch
        assert {line["architecture"] for line in lines} == set(ARCHITECTURES), kernel


def test_no_kernel_spills(compiled):
    spilling = {kernel for kernel, lines in compiled.items() if any(line["stack"] or line["local"] for line in lines)}
    assert spilling == set(SPILLS)
