"""Labelling, pairs, regions, claims, losses and metrics, by the code that a GPU would get, against the CPU backend."""

import pytest
from checks import check, check_claims, check_labelling, check_loss, check_pairs, check_regions
from machine import MODES

COUNTS = {check_labelling: 40, check_pairs: 30, check_regions: 40, check_claims: 20, check_loss: 45}
SMALL_COUNTS = {check_labelling: 8, check_pairs: 6, check_regions: 8, check_claims: 4, check_loss: 8}


def seeds(counts):
    return [
        pytest.param(which, seed, id=f"{which.__name__}-{seed}") for which, n in counts.items() for seed in range(n)
    ]


@pytest.mark.parametrize(("which", "seed"), seeds(COUNTS))
def test_sm_90(which, seed):
    for mode in MODES:
        check(which, seed, mode)


@pytest.mark.parametrize(("which", "seed"), seeds(SMALL_COUNTS))
def test_sm_80(which, seed):
    check(which, seed, "weak", arch=80)
