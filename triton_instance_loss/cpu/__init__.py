"""The operators on the CPU, room by room as in `kernels/`: plain loops, which Numba compiles when first called.

Everything works on *places*, the voxels of either foreground, a list of one or two per cent of a patch. Passes that
must see every voxel are left to PyTorch where formulas want to be vectorised; they use its threads, loops take one.
Results equal those of the kernels: integers exactly, sums to the rounding of float64. A loop adds in the order of
voxels: all is deterministic.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

_Loop = TypeVar("_Loop", bound=Callable[..., Any])
_SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "ops.py"]
_DIGEST = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()[:12]


def compiled(loop: _Loop) -> _Loop:
    """Have Numba compile a loop, and keep the result beside the source, or for the user if nobody may write there.

    Numba looks at the file of a loop only, not at those of the constants and loops that it uses: so the name that it is
    kept under has a digest of them all. Where nothing can be kept, it is compiled in each process.
    """
    loop.__qualname__ += "_" + _DIGEST
    try:
        return cast(_Loop, njit(nogil=True, error_model="numpy", cache=True)(loop))
    except RuntimeError:
        return cast(_Loop, njit(nogil=True, error_model="numpy")(loop))
