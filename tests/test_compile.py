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
WARP_SIZES = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64, "gfx1100": 32}
# Kernels that may spill registers to memory, each with its reason.
SPILLS: dict[str, str] = {}


@pytest.fixture(scope="module")
def compiled():
    """One line for each compiled kernel, by kernel; compiled in a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton did before it could be set; silences a warning
    command = [sys.executable, str(SCRIPT), "--json", "--targets", *WARP_SIZES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = collections.defaultdict(list)
    for line in map(json.loads, result.stdout.splitlines()):
        kernels[line["kernel"]].append(line)
    return kernels


def test_every_kernel_compiles_everywhere(compiled):
    everywhere = {(target, alignment) for target in WARP_SIZES for alignment in ("aligned", "odd")}
    for kernel, lines in compiled.items():  # the script itself fails on a kernel that it does not know how to launch
        assert {(line["target"], line["alignment"]) for line in lines} == everywhere, kernel


def test_no_kernel_spills(compiled):
    spilling = {kernel for kernel, lines in compiled.items() if any(line["stack"] or line["local"] for line in lines)}
    assert spilling == set(SPILLS)


@pytest.mark.parametrize(
    ("kernel", "lanes"), [("components._merge_kernel", "BLOCK"), ("tables._sum_instances_kernel", "THREADS")]
)
def test_lanes_of_atomics_in_loops_follow_the_warp(compiled, kernel, lanes):
    for line in compiled[kernel]:  # of one warp
        assert f"{lanes}={WARP_SIZES[line['target']]}" in line["variant"].split()
