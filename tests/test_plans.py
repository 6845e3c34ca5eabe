"""Plans are kept for all that they depend on (kernels/launches.py); needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("kept_plans.py")


def test_kept_plans():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.split("\n")[:-1]
    assert len(lines) == 14
    assert all(line.endswith(" ok") for line in lines)
