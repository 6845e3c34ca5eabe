"""Spoilt kernels fail: what the tests would say of code that is wrong."""

import itertools
import re

import pytest
from checks import check, check_claims, check_labelling, check_loss, check_pairs, check_regions
from machine import MACHINE, MODES
from ptx import PtxError


class Spoil:
    """Replaces a piece of PTX in each kernel that has it."""

    def __init__(self, pattern, replacement, count=0):
        self.pattern, self.replacement, self.count, self.spoilt = pattern, replacement, count, set()

    def __call__(self, name, ptx):
        ptx, times = re.subn(self.pattern, self.replacement, ptx, count=self.count)
        self.spoilt.update([name] * (times > 0))
        return ptx


SPOILT = {
    "components are united without an atomic": (
        check_labelling,
        Spoil(
            r"(@%p\d+) atom\.global\.gpu\.relaxed\.max\.s32 (%r\d+), (\[.*?\]), (%r\d+);",
            r"\1 ld.global.b32 \2, \3; \1 st.global.b32 \3, \4;",
        ),
        AssertionError,
        "check_labelling",
    ),
    "a slot is taken without a look at it": (
        check_pairs,
        Spoil(
            r"atom\.global\.relaxed\.gpu\.cas\.b64 (%rd\d+), (\[.*?\]), %rd\d+,", r"atom.global.gpu.exch.b64 \1, \2,"
        ),
        AssertionError,
        "sums",
    ),
    "a barrier is left out": (check_loss, Spoil(r"bar\.sync\s+0;", "", count=1), PtxError, "since the last barrier"),
    "a load has lost its mask": (
        check_labelling,
        Spoil(r"@!?%p\d+ (ld\.global)", r"\1"),
        PtxError,
        "outside of all arguments",
    ),
    "a sum over a region is stored, not added": (
        check_regions,
        Spoil(r"red\.global\.gpu\.relaxed\.add\.f64", "st.global.b64"),
        AssertionError,
        "off by",
    ),
    "the last claim counts, not the best": (
        check_claims,
        Spoil(r"red\.global\.gpu\.relaxed\.max\.s64", "st.global.b64"),
        AssertionError,
        "off by",
    ),
    "who is last does not see what the others wrote": (
        check_loss,
        Spoil(r"atom\.global\.gpu\.acq_rel\.add", "atom.global.gpu.relaxed.add"),
        AssertionError,
        "off by|not finite",
    ),
    "a sum is stored, not added": (
        check_loss,
        Spoil(r"red\.global\.gpu\.relaxed\.add\.f64", "st.global.b64"),
        AssertionError,
        "off by",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_kernels_fail(what):
    which, MACHINE.spoil, error, message = SPOILT[what]

    def check_some():
        for seed, mode in itertools.product(range(8), MODES):
            check(which, seed, mode)

    with pytest.raises(error, match=message):
        check_some()
    assert MACHINE.spoil.spoilt
