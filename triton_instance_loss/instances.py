"""The instances of a batch: where they are, how many, how large, and which outputs are used individually."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .activation import to_volume
from .components import capacity_bound, rows_of_tables
from .options import Options


class Found(NamedTuple):
    """The instances of a batch."""

    out_rows: Tensor  # (B, D, H, W) int32: number of the output instance at each voxel, 0 = none
    lab_rows: Tensor  # (B, D, H, W) int32: number of the label instance at each voxel, 0 = none
    num_outputs: Tensor  # (B,) int32
    num_labels: Tensor  # (B,) int32
    too_many: Tensor  # (B,) bool: more outputs than mul_too_many for each label
    kept: Tensor  # (B,) int32: outputs 1..kept are used individually
    out_geometry: Tensor  # (B, rows, 10) int64, columns as ops.py names them
    lab_geometry: Tensor  # (B, rows, 10) int64


def first_rows(counts: Tensor, rows: int) -> Tensor:
    """(B,) -> (B, rows) bool: True in the first `counts` rows of each sample."""
    return torch.arange(rows, device=counts.device) < counts[:, None]


def find(foreground: Tensor, y: Tensor, cc_label_batch: Tensor | None, options: Options) -> tuple[Found, int]:
    """Label both volumes, number and measure their instances, and decide which outputs are kept.

    Also says how many slots the pairs (kept output, label) that touch need.
    """
    pairs = capacity_bound(foreground.shape, options.num_iterations)
    rows = rows_of_tables(foreground, pairs)
    search = (options.num_iterations or 0, options.min_instance_size)
    if cc_label_batch is None:
        # One labelling for both sides: outputs first, then labels.
        both, counts, geometry = ops.find_instances(torch.cat((foreground, y)), *search, rows)
        (out_rows, lab_rows), (num_outputs, num_labels) = both.chunk(2), counts.chunk(2)
        out_geometry, lab_geometry = geometry.chunk(2)
    else:
        out_rows, num_outputs, out_geometry = ops.find_instances(foreground, *search, rows)
        ids = to_volume(cc_label_batch).long() * y
        pairs = ids[0].numel()
        lab_rows, num_labels, lab_geometry = ops.number_instances(
            ids, options.min_instance_size, rows_of_tables(ids, pairs)
        )
    too_many = (num_labels > 0) & (num_outputs > num_labels.double() * options.mul_too_many)
    kept = num_outputs.clamp(max=options.max_cc_out) if options.max_cc_out else num_outputs
    kept = torch.where(too_many, 0, kept).int()
    # A voxel makes at most one pair, and whole components at most one a 2x2x2 block. The table is a hash set: it is
    # half empty, and a power of two.
    if rows == 0:
        pairs = min(pairs, out_geometry.shape[1] * lab_geometry.shape[1])
    found = Found(out_rows, lab_rows, num_outputs, num_labels, too_many, kept, out_geometry, lab_geometry)
    return found, 2 ** (2 * pairs - 1).bit_length()
