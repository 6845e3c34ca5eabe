"""Which outputs no label claims, on the CPU: `unclaimed` of ops.py; kernels/claims.py says the rule."""

import numpy as np
import torch
from torch import Tensor

from ..ops import OUTPUTS, SIZE
from . import compiled
from .activation import Indices, Rows
from .instances import read_sites


@compiled
def _runs(voxels: Indices, out: Rows, lab: Rows, volume: int, capacity: int) -> tuple[Indices, Indices]:
    """The pairs of rows at places that follow each other, each as one number, and how many places these are."""
    pairs, lengths, count, last = np.empty(len(out), np.int64), np.empty(len(out), np.int64), 0, -1
    for place in range(len(out)):
        if out[place] > 0 and lab[place] > 0:
            sample = voxels[place] // volume
            pair = (sample * capacity + out[place] - 1) * capacity + lab[place] - 1
            if pair != last:
                pairs[count], lengths[count], last = pair, 0, pair
                count += 1
            lengths[count - 1] += 1
    return pairs[:count], lengths[:count]


def unclaimed(x: Tensor, sites: list[Tensor], counts: Tensor, geometry: Tensor, pairs: int) -> Tensor:
    """Operator `unclaimed` (ops.py)."""
    batch, capacity = len(x), geometry.shape[1]
    sizes = geometry[:, :, SIZE].numpy().reshape(2, -1)  # of outputs, of labels, those of all samples in one row
    result = np.arange(capacity) < counts[OUTPUTS].numpy()[:, None]
    found, lengths = _runs(*read_sites(sites), x[0].numel() if batch else 0, capacity)
    touching, which = np.unique(found, return_inverse=True)
    outputs, labels = np.divmod(touching, max(capacity, 1))
    labels += outputs // max(capacity, 1) * capacity
    dice = np.bincount(which, lengths, len(touching)) / (sizes[0, outputs] + sizes[1, labels])
    best, claims = np.zeros(sizes.shape[1]), np.full(sizes.shape[1], sizes.shape[1])
    np.maximum.at(best, labels, dice)
    claiming = dice == best[labels]
    np.minimum.at(claims, labels[claiming], outputs[claiming])
    result.reshape(-1)[claims[claims < len(claims)]] = False
    return torch.from_numpy(result)
