"""Which outputs no label claims, on the CPU: `unclaimed` of ops.py; kernels/claims.py says the rule."""

import numpy as np
from torch import Tensor

from ..ops import OUTPUTS, SIZE, first_rows
from .activation import ends_of_samples
from .instances import read_sites
from .tables import note_pairs


def unclaimed(x: Tensor, sites: list[Tensor], counts: Tensor, geometry: Tensor, pairs: int) -> Tensor:
    """Operator `unclaimed` (ops.py)."""
    capacity, (voxels, out, lab) = geometry.shape[1], read_sites(sites)
    sizes = geometry[:, :, SIZE].numpy().reshape(2, -1)  # of outputs, of labels, those of all samples in one row
    result = first_rows(counts[OUTPUTS], capacity)
    found, lengths = note_pairs(ends_of_samples(voxels, x), out, lab, counts[OUTPUTS].numpy(), capacity)
    touching, which = np.unique(found, return_inverse=True)
    outputs, labels = np.divmod(touching, capacity)
    labels += outputs // capacity * capacity
    dice = np.bincount(which, lengths, len(touching)) / (sizes[0, outputs] + sizes[1, labels])
    best, claims = np.zeros(sizes.shape[1]), np.full(sizes.shape[1], sizes.shape[1])
    np.maximum.at(best, labels, dice)
    claiming = dice == best[labels]
    np.minimum.at(claims, labels[claiming], outputs[claiming])
    result.numpy().reshape(-1)[claims[claims < len(claims)]] = False
    return result
