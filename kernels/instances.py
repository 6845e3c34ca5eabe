"""The instances of both sides: `find` and `row_maps` of ops.py, made of the launches of other rooms.

Their *sites* are two volumes, each of the outputs' side first, then of the labels': the foreground and the row map.
"""

import torch
from torch import Tensor

from .activation import launch_activate
from .components import launch_find_instances, launch_number_instances


def launch_find(
    x: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    activation: int,
    threshold: float,
    pixel: int,
    pixel_quantity: int,
    num_iterations: int,
    min_size: int,
    out_capacity: int,
    lab_capacity: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """Sites, sums of the pixel term, health, and counts and geometry of both sides."""
    masks, sums, health = launch_activate(x, labels, activation, threshold, pixel, pixel_quantity)
    if ids is None:
        # One labelling for both sides.
        rows, counts, geometry = launch_find_instances(masks, num_iterations, min_size, out_capacity)
        return [masks, rows], sums, health, counts, [geometry]
    out = launch_find_instances(masks[: len(x)], num_iterations, min_size, out_capacity)
    lab = launch_number_instances(ids, min_size, lab_capacity)
    rows, counts = (torch.cat(pair) for pair in zip(out[:2], lab[:2], strict=True))
    return [masks, rows], sums, health, counts, [out[2], lab[2]]


def launch_row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sites, copied: an operator may not return what it was given."""
    foreground, y, out_rows, lab_rows = (side.clone() for site in sites for side in site.chunk(2))
    return foreground, y, out_rows, lab_rows
