"""The slow way: criteria that are no functions of sums, called on full volumes. It reads counts, so it synchronises."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .activation import activated, straight_through
from .instances import Found
from .options import Options, of_volume

Criterion = Callable[..., Any]


class Volumes(NamedTuple):
    """What the criteria are shown, as volumes (B, D, H, W)."""

    a: Tensor  # the activated output, differentiable
    y: Tensor  # bool
    out_rows: Tensor  # int32: number of the output instance at each voxel, 0 = none
    lab_rows: Tensor  # int32


def volumes(x: Tensor, carrier: Tensor, found: Found, options: Options) -> Volumes:
    """The volumes of a call."""
    maps = ops.row_maps(x.detach(), list(found.sites))
    (foreground, y), (out_rows, lab_rows) = (maps != 0).chunk(2), maps.clamp(min=0).chunk(2)
    return Volumes(activated(x, carrier, foreground, y, options), y, out_rows, lab_rows)


def instance_values(volumes: Volumes, found: Found, criterion: Criterion, options: Options) -> Tensor:
    """The criterion of each kept output and of each label, from one pair of volumes an instance; (2 B, rows) float64.

    A sample without labels, or without usable outputs, has the value of the whole sample in row 0 of that side.
    """
    a, y, out_rows, lab_rows = volumes
    shape = a.shape[2:] if options.spatial_dims == 2 else a.shape[1:]

    def call(predicted: Tensor, true: Tensor) -> Tensor:
        pair = (volume.reshape(1, 1, *shape) for volume in (predicted, true.to(a.dtype)))
        return checks.scalar("loss_function_instance", criterion(*pair)).double()

    labels, outputs = [], []
    for sample in range(a.shape[0]):
        prediction, truth = a[sample], y[sample]
        out, lab = out_rows[sample], lab_rows[sample]
        # (no `tolist`: under torch.func there is no memory to read, in PyTorch 2.6)
        _, num_kept, num_labels = [int(count) for count in found.counts[:, sample]]
        kept = (out > 0) & (out <= num_kept)
        values = []
        for row in range(1, num_labels + 1):
            mine = lab == row
            use = torch.isin(out, out[kept & mine].unique()).to(a.dtype)
            if options.instance_wise_loss_no_tp:
                use = use * torch.where(truth, mine.to(a.dtype), prediction.detach())
            values.append(call(prediction * use, mine))
        labels.append(torch.stack(values) if values else call(prediction, truth)[None])
        values = []
        for row in range(1, num_kept + 1):
            mine = out == row
            values.append(call(prediction * mine, torch.isin(lab, lab[mine & (lab > 0)].unique())))
        outputs.append(torch.stack(values) if values else call(prediction, truth)[None])
    rows = found.geometry.shape[1]
    return torch.stack([torch.nn.functional.pad(each, (0, rows - len(each))) for each in outputs + labels])


def center(volumes: Volumes, found: Found, criterion: Criterion, options: Options) -> Tensor:
    """The criterion on the two volumes of centre boxes of each sample."""
    a, shape = volumes.a, list(volumes.a.shape[1:])
    steps = of_volume(options.spacing, options.spatial_dims)
    offsets = ops.reach_of_boxes(shape, options.spatial_dims == 2, options.centroid_offset, steps)
    owner, covered = ops.center_volumes(found.geometry, found.counts, shape, offsets)
    peak = 1.0 + options.smoother
    values = []
    for sample in range(owner.shape[0]):
        sizes = found.geometry[sample, :, ops.SIZE]
        sizes = torch.cat((sizes.new_ones(1), sizes.clamp(min=1)))
        rows = volumes.out_rows[sample].flatten().long()
        rows = torch.where(rows < len(sizes), rows, 0)  # beyond the table there are no boxes
        means = a.new_zeros(len(sizes)).index_add(0, rows, a[sample].flatten()) / sizes
        heights = straight_through(torch.full_like(means, peak), means, options)
        heights = torch.cat((heights.new_zeros(1), heights[1:]))
        pair = heights[owner[sample].long()], covered[sample].to(a.dtype) * peak
        size = shape if options.spatial_dims == 3 else shape[1:]
        value = criterion(*(volume.reshape(1, 1, *size) for volume in pair))
        values.append(checks.scalar("loss_function_center", value))
    return torch.stack(values).mean()
