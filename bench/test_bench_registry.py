"""The registry under pytest-benchmark, on tiny inputs: `pytest bench` times every provider that is right here."""

import pytest
import torch

from . import measure, run
from .entry import SEED, Setup
from .registry import ENTRIES

pytest.importorskip("pytest_benchmark")

SETUP = Setup(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
# Cases that differ in nothing but their size are one case when they are tiny.
TINY = {
    f"{entry.name}-{case.name}-{provider.name}": (entry, case, provider)
    for entry, cases in [
        (entry, {(case.draw, case.tiny): case.shrunk() for case in entry.cases}.values()) for entry in ENTRIES.values()
    ]
    for case in cases
    for provider in entry.providers
}


@pytest.mark.parametrize("name", TINY)
def test_provider(benchmark, name):
    entry, case, provider = TINY[name]
    status, detail = provider.reason_to_skip(case, SETUP)
    if status:
        pytest.skip(f"{status}: {detail}")
    inputs = case.draw(case.shape, SEED).to(SETUP.device)
    function = provider.build(inputs, SETUP)
    answer = entry.read(function())
    if provider.truth is not None:
        assert run.difference(answer, provider.truth(inputs, SETUP)) == ""
    benchmark.group = f"{entry.name}, {case.name}"

    def synchronised():
        function()
        if SETUP.device.type == "cuda":
            torch.cuda.synchronize()

    measure.use_threads()
    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)
