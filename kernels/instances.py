"""The instances of both sides: `find` and `row_maps` of ops.py, made of the launches of other rooms.

Their *sites* are four volumes: foreground, y and the two row maps.
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
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sites, sums of the pixel term, health, and counts and geometry of both sides."""
    foreground, y, sums, health = launch_activate(x, labels, activation, threshold, pixel, pixel_quantity)
    if ids is None:
        # One labelling for both sides: outputs first, then labels.
        both = launch_find_instances(torch.cat((foreground, y)), num_iterations, min_size, out_capacity)
        sides = [side for pair in both for side in pair.clone().chunk(2)]
        out_rows, lab_rows, num_outputs, num_labels, out_geometry, lab_geometry = sides
    else:
        out_rows, num_outputs, out_geometry = launch_find_instances(foreground, num_iterations, min_size, out_capacity)
        lab_rows, num_labels, lab_geometry = launch_number_instances(ids, min_size, lab_capacity)
    return [foreground, y, out_rows, lab_rows], sums, health, num_outputs, num_labels, out_geometry, lab_geometry


def launch_row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sites as they are, copied: an operator may not return what it was given."""
    foreground, y, out_rows, lab_rows = (site.clone() for site in sites)
    return foreground, y, out_rows, lab_rows
