"""The instances of both sides on the CPU: `find` and `row_maps` of ops.py.

Their *sites* are a list of the voxels of either foreground, with what the sums and the gradient ask about each.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import SITE_LINES
from .activation import Foreground, Indices, find_foreground, pixel_sums
from .components import fill, find_rows, number_rows

OUT, LAB, LABELLED = 1, 2, 4  # bits of the last column: a is, y is, labels are not 0


class Sites(NamedTuple):
    """The lines of the sites."""

    voxels: Indices
    out: Indices
    lab: Indices
    bits: Indices

    @classmethod
    def read(cls, sites: Tensor) -> "Sites":
        """From the tensor, without the columns at its end that are not used."""
        lines = sites.numpy()
        used = len(lines[0])
        if used and lines[0][-1] < 0:
            used = int(np.argmax(lines[0] < 0))
        return cls(*lines[:, :used])

    def has(self, bit: int) -> Indices:
        """Where a bit is set, as positions in the list."""
        return np.flatnonzero(self.bits & bit)

    def foreground(self, labels: Tensor) -> Foreground:
        """The foreground they were made of."""
        labelled = self.voxels[self.has(LABELLED)]
        truth = labels.numpy().reshape(-1)[labelled]
        return Foreground(self.voxels[self.has(OUT)], labelled, truth, self.voxels[self.has(LAB)])


def find(
    x: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    activation: int,
    threshold: float,
    pixel: int,
    pixel_quantity: int,
    num_iterations: int,
    min_size: int,
    max_kept: int,
    too_many: float,
    capacity: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Operator `find` (ops.py)."""
    foreground = find_foreground(x, labels, activation, threshold)
    (batch, *shape), search = x.shape, (num_iterations, min_size, capacity)
    if ids is None:
        # One labelling for both sides: outputs first, then labels.
        both = np.concatenate((foreground.out, foreground.lab + x.numel()))
        rows, found, geometry = find_rows(both, (2 * batch, *shape), *search)
        out_rows, lab_rows = np.split(rows, [len(foreground.out)])
    else:
        out_rows, out_found, out_geometry = find_rows(foreground.out, (batch, *shape), *search)
        given = ids.numpy().reshape(-1)[foreground.lab]
        named = given != 0
        rows, lab_found, lab_geometry = number_rows(
            foreground.lab[named], given[named], (batch, *shape), min_size, capacity
        )
        lab_rows = np.zeros(len(given), dtype=np.int64)
        lab_rows[named] = rows
        found = torch.cat((out_found, lab_found))
        geometry = torch.nn.utils.rnn.pad_sequence([*out_geometry, *lab_geometry], batch_first=True)
    sums, health = pixel_sums(x, foreground, activation, pixel, pixel_quantity)
    sites = torch.from_numpy(_merge(foreground, out_rows, lab_rows, x.numel() if capacity else 0))
    return [sites], sums, health, _count(found.numpy(), max_kept, too_many), geometry


def _count(found: NDArray[np.int32], max_kept: int, too_many: float) -> Tensor:
    """Outputs, kept outputs and labels of each sample."""
    outputs, labels = np.split(found, 2)
    kept = np.minimum(outputs, max_kept) if max_kept else outputs
    return torch.from_numpy(
        np.stack((outputs, np.where((labels > 0) & (outputs > labels * too_many), 0, kept), labels))
    )


def _merge(foreground: Foreground, out_rows: Indices, lab_rows: Indices, padded: int) -> Indices:
    """The sites, `padded` of them, or as many as there are."""
    voxels = np.concatenate((foreground.out, foreground.labelled))
    order = np.argsort(voxels, kind="stable")  # two ascending lists: they are merged
    ascending = voxels[order]
    new = np.ones(len(voxels), dtype=bool)
    new[1:] = np.diff(ascending) != 0
    place = np.empty(len(voxels), dtype=np.int64)
    place[order] = np.cumsum(new) - 1
    of_out, of_labelled = np.split(place, [len(foreground.out)])
    of_lab = of_labelled[foreground.truth == 1]

    count = int(np.count_nonzero(new))
    sites = np.zeros((SITE_LINES, padded or count), dtype=np.int64)
    sites[0, :count], sites[0, count:] = ascending[new], -1
    sites[1, of_out], sites[2, of_lab] = out_rows, lab_rows
    sites[3, of_labelled] = LABELLED
    sites[3, of_lab] += LAB
    sites[3, of_out] += OUT
    return sites


def row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `row_maps` (ops.py)."""
    read, shape = Sites.read(sites[0]), tuple(x.shape)
    foreground, y = (fill(shape, read.voxels, (read.bits & bit) != 0).bool() for bit in (OUT, LAB))
    return (foreground, y, fill(shape, read.voxels, read.out), fill(shape, read.voxels, read.lab))
