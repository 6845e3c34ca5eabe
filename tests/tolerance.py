"""How far a result may lie from the truth, argued from the precision it was computed in. The same everywhere.

The truth is the reference in float64 on exactly the same inputs. A term is a mean of criteria, and a criterion of the
form 1 - ratio loses the digits that the ratio shares with 1: its error is a few roundings of 1, or of its own size
where that is larger. A few: one each for the sums, the products, the ratio, the difference and the means; for a
criterion summed by torch also log2(voxels), at most 12 here. ROUNDINGS is twice that of the longest path.
"""

import torch
from torch import Tensor

ROUNDINGS = 64


def tolerance(dtype: torch.dtype, scale: Tensor | float = 1.0) -> float:
    """Absolute tolerance of a result computed in `dtype` from intermediate results as large as `scale`."""
    return ROUNDINGS * torch.finfo(dtype).eps * max(1.0, float(scale))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0, what: str = ""):
    """Compare with the truth: values, and gradients relative to their largest element."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    allowed = tolerance(dtype, max(float(scale), expected.abs().max().item()))
    error = (actual - expected).abs().max().item()
    assert error <= allowed, (
        f"{what}: off by {error:.3g}, allowed {allowed:.3g} ({dtype})\ngot      {actual}\nexpected {expected}"
    )
