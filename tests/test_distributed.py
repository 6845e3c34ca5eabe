"""Two processes: gradients are those of one process on the joint batch, and an empty patch leaves nobody waiting."""

import math
import multiprocessing
import time

import pytest
import ranks
import torch
from ranks import DATA, RUNS

# Both sides are float64; they differ by the order in which samples, voxels and ranks are added up.
CLOSE = {"rtol": 1e-10, "atol": 1e-14}


@pytest.fixture(scope="module", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def runs(request, tmp_path_factory):
    """A device, and for each rank the gradients of RUNS; all from one pair of processes, whose start takes longest."""
    return request.param, ranks.run_ranks(ranks.gradients_of_runs, tmp_path_factory.mktemp("ranks"), request.param)


def gradients(device, batch, steps=ranks.one_step, **options):
    """Those of one process."""
    network, loss = ranks.network_and_loss(device, **options)
    steps(network, loss, *batch)
    return ranks.gradients(network)


@pytest.mark.parametrize("number", range(len(RUNS) - 1), ids=[" ".join((*run[:2], *run[2])) for run in RUNS[:-1]])
def test_gradients_are_those_of_the_joint_batch(runs, number):
    device, results = runs
    if RUNS[number][0] == "fsdp" and device != "cpu":
        pytest.skip("gloo joins CPU tensors here; two ranks of NCCL need two GPUs")
    options = DATA if RUNS[number][2] == DATA else {}  # one process has no group
    expected = gradients(device, ranks.joint_batch(device), **options)
    assert all(grad.any() for grad in expected)
    for result in results:
        torch.testing.assert_close(result[number], expected, **CLOSE)


def test_accumulated_gradients_are_those_of_the_joint_batch(device):
    batch = ranks.joint_batch(device)
    torch.testing.assert_close(
        gradients(device, batch, ranks.two_steps, **DATA), gradients(device, batch, **DATA), **CLOSE
    )


def test_instance_reduction_without_a_group_is_within_each_rank(runs):
    """Where ranks have different numbers of instances, the mean of their means is not the joint mean."""
    device, results = runs
    batch = ranks.joint_batch(device)
    alone = [gradients(device, ranks.share(rank, *batch)) for rank in range(ranks.RANKS)]
    means = [torch.stack(grads).mean(0) for grads in zip(*alone, strict=True)]
    for result in results:
        torch.testing.assert_close(result[-1], means, **CLOSE)
    joint = gradients(device, batch)
    assert any(not torch.allclose(mean, grad, rtol=1e-3) for mean, grad in zip(means, joint, strict=True))


def test_a_rank_with_an_empty_patch_leaves_nobody_waiting(device, tmp_path):
    (full, parameters), (empty, same_parameters) = ranks.run_ranks(
        ranks.steps_with_an_empty_rank, tmp_path, device.type
    )
    torch.testing.assert_close(parameters, same_parameters, rtol=0, atol=0)
    assert len(empty) == len(ranks.losses_for_empty_patches()) * len(ranks.EMPTY)
    for seen in (full, empty):
        for case, (value, connected, finite) in seen.items():
            assert math.isfinite(value), case
            assert connected, case
            assert finite, case
    assert full["all terms", "both"][0] != empty["all terms", "both"][0]


def test_a_rank_without_lesions_weighs_no_more_than_the_others(device, tmp_path):
    """Its own gradient is at most three times that of the rank with lesions, where both have false outputs.

    Where nothing is found it is far smaller. (It was 1e7 times as large when hard outputs had a gradient everywhere.)
    """
    full, empty = ranks.run_ranks(ranks.gradients_beside_an_empty_rank, tmp_path, device.type)
    assert len(full) == 2 * len(ranks.SHIFTS)
    for case, (own, joint) in full.items():
        of_empty, same = empty[case]
        torch.testing.assert_close(joint, same, rtol=0, atol=0)
        for grads in (own, of_empty, joint):
            assert len(grads) == 4
            assert all(grad.isfinite().all() for grad in grads), case
        assert all(grad.any() for grad in joint), case
        norm, norm_of_empty = (torch.cat([grad.flatten() for grad in grads]).norm() for grads in (own, of_empty))
        assert norm_of_empty <= 3 * norm, case


def sleep(rank):
    time.sleep(600)


def test_ranks_that_hang_are_ended(tmp_path):
    before = set(multiprocessing.active_children())
    with pytest.raises(TimeoutError, match="sleep did not end within 1 s"):
        ranks.run_ranks(sleep, tmp_path, seconds=1)
    assert set(multiprocessing.active_children()) <= before
