"""The whole loss with many programs at once, and whether running them at once shows what it should."""

import pytest
import torch
from backends import using_backend

pytest.importorskip("triton")

import triton
import triton.language as tl

from triton_instance_loss import InstanceLoss

PROGRAMS = 40


@triton.jit
def _count_kernel(counters_ptr, ATOMIC: tl.constexpr):
    lane = tl.arange(0, 4)
    if ATOMIC:
        tl.atomic_add(counters_ptr + lane, 1, sem="relaxed")
    else:
        tl.store(counters_ptr + lane, tl.load(counters_ptr + lane) + 1)


@triton.jit
def _name_kernel(names_ptr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(names_ptr + program, tl.load(names_ptr + program) + program)


@triton.jit
def _fail_kernel(names_ptr):
    tl.load(names_ptr)
    tl.static_assert(False, "this program fails")


def counted(atomic):
    counters = torch.zeros(4, dtype=torch.int32)
    _count_kernel[PROGRAMS,](counters, atomic)
    return counters


@pytest.mark.usefixtures("interleaved")
def test_what_is_not_atomic_loses():
    assert (counted(True) == PROGRAMS).all()
    lost = counted(False)
    assert (lost < PROGRAMS).all()
    assert len(lost.unique()) > 1  # lanes do not move together


@pytest.mark.usefixtures("interleaved")
def test_each_program_keeps_its_place():
    names = torch.zeros(5, 7, dtype=torch.int32)
    _name_kernel[names.shape](names)
    assert torch.equal(names.flatten(), torch.arange(35, dtype=torch.int32))


@pytest.mark.usefixtures("interleaved")
def test_errors_of_programs_arrive():
    with pytest.raises(Exception, match="this program fails"):
        _fail_kernel[PROGRAMS,](torch.zeros(1))


def test_a_seed_gives_the_same_run_again(gpu_blocks, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU runs its programs at once by itself")
    from interleaving import Interleaving

    results = []
    for seed in (0, 0, 1):
        with monkeypatch.context() as patch:
            interleaving = Interleaving(patch, seed)
            results.append([*counted(False).tolist(), interleaving.switches])
            assert interleaving.switches > PROGRAMS
    assert results[0] == results[1] != results[2]


@pytest.mark.usefixtures("interleaved")
@pytest.mark.parametrize("options", [{}, {"max_cc_out": 2, "min_instance_size": 2}, {"num_iterations": 2}], ids=str)
def test_loss_at_once(options):
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn((2, 1, 7, 6, 5), generator=generator) - 0.8
    labels = (torch.rand(outputs.shape, generator=generator) < 0.15).float()
    results = []
    for backend in ("cpu", "triton", "triton"):
        with using_backend(backend):
            x = outputs.clone().requires_grad_()
            terms = InstanceLoss(**options)(x, labels)
            sum(terms).backward()
            results.append([torch.stack(terms).detach(), x.grad])
    cpu, *runs = results
    for run in runs:
        torch.testing.assert_close(run, cpu)
    for one, other in zip(*runs, strict=True):  # outputs are binary: nothing depends on who is first
        assert torch.equal(one, other)
