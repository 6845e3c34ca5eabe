"""The instances of a batch: where they are, how many, how large, and which outputs are used individually."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .activation import activation_of, to_volume
from .components import capacity_bound, rows_of_tables
from .options import Options


class Found(NamedTuple):
    """The instances of a batch."""

    sites: tuple[Tensor, ...]  # where they are, as the backend likes it
    num_outputs: Tensor  # (B,) int32
    num_labels: Tensor  # (B,) int32
    too_many: Tensor  # (B,) bool: more outputs than mul_too_many for each label
    kept: Tensor  # (B,) int32: outputs 1..kept are used individually
    out_geometry: Tensor  # (B, rows, 10) int64, columns as ops.py names them
    lab_geometry: Tensor  # (B, rows, 10) int64


def first_rows(counts: Tensor, rows: int) -> Tensor:
    """(B,) -> (B, rows) bool: True in the first `counts` rows of each sample."""
    return torch.arange(rows, device=counts.device) < counts[:, None]


def find(
    x: Tensor, labels: Tensor, cc_label_batch: Tensor | None, pixel: tuple[int, int], options: Options
) -> tuple[Found, int, Tensor, Tensor]:
    """Label both volumes, number and measure their instances, and decide which outputs are kept.

    `pixel` says what the pixel term sees, and the code of its quantity. Also gives how many slots the pairs (kept
    output, label) that touch need, the sums of the pixel term, and the health of x.
    """
    out_bound = lab_bound = capacity_bound(x.shape, options.num_iterations)
    ids = None
    if cc_label_batch is not None:
        ids = to_volume(cc_label_batch).long() * (labels == 1)
        lab_bound = x[0].numel()
    rows = rows_of_tables(x, out_bound), rows_of_tables(x, lab_bound)
    search = (options.num_iterations or 0, options.min_instance_size)
    sites, pixel_sums, health, counts, geometry = ops.find(
        x, labels, ids, *activation_of(options), *pixel, *search, *rows
    )
    num_outputs, num_labels = counts.chunk(2)
    out_geometry, lab_geometry = geometry[0].chunk(2) if ids is None else geometry
    too_many = (num_labels > 0) & (num_outputs > num_labels.double() * options.mul_too_many)
    kept = num_outputs.clamp(max=options.max_cc_out) if options.max_cc_out else num_outputs
    kept = torch.where(too_many, 0, kept).int()
    # A voxel makes at most one pair, and whole components at most one a 2x2x2 block. The table is a hash set: it is
    # half empty, and a power of two.
    pairs = max(out_bound, lab_bound)
    if rows[0] == 0:
        pairs = min(pairs, out_geometry.shape[1] * lab_geometry.shape[1])
    found = Found(tuple(sites), num_outputs, num_labels, too_many, kept, out_geometry, lab_geometry)
    return found, 2 ** (2 * pairs - 1).bit_length(), pixel_sums, health
