"""What the tests of the kernels share: masks, and plain statements of labelling and numbering."""

import importlib

import numpy as np
import torch
from scipy import ndimage

from triton_instance_loss import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**31 - 1
# Of a gradient, relative to its largest: ours is rounded once, the plain one adds ten terms in the precision of a.
GRADIENT_ERRORS = {torch.float32: 2e-6, torch.float64: 1e-14}
# 3D, 2D as D = 1, a line and a single voxel: odd, so co-prime with cells and blocks.
SHAPES = [(2, 5, 7, 9), (1, 1, 13, 11), (3, 1, 1, 1), (1, 1, 1, 17), (1, 11, 1, 3)]


def draw(*layers):
    """A mask (1, D, H, W) from drawings, one string a layer: '#' is foreground."""
    rows = [[[c == "#" for c in row] for row in layer.split()] for layer in layers]
    return torch.tensor(rows, device=DEVICE)[None]


def random_mask(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < density).to(DEVICE)


def spiral(n):
    """A path of one voxel that winds inwards, its windings one voxel apart."""
    mask = np.zeros((n, n), bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0] = True
    turns = 0
    while turns < 2:
        ahead = y + 2 * dy, x + 2 * dx
        blocked = not (0 <= y + dy < n and 0 <= x + dx < n)
        blocked |= 0 <= ahead[0] < n and 0 <= ahead[1] < n and mask[ahead]
        if blocked:
            dy, dx, turns = dx, -dy, turns + 1
            continue
        y, x, turns = y + dy, x + dx, 0
        mask[y, x] = True
    return mask


def plain_ids(mask):
    """Largest linear index + 1 of each component, by scipy."""
    ids = np.zeros(mask.shape, np.int32)
    for b, volume in enumerate(mask.cpu().numpy()):
        labels, n = ndimage.label(volume, np.ones((3, 3, 3)))
        index = np.arange(1, volume.size + 1).reshape(volume.shape)
        for i in range(1, n + 1):
            ids[b][labels == i] = index[labels == i].max()
    return torch.from_numpy(ids).to(mask.device)


def plain_pooling(mask, rounds):
    """Rounds of max-pooling of the ids inside the mask."""
    index = torch.arange(1, mask[0].numel() + 1, device=mask.device).view(mask.shape[1:])
    ids = (mask * index).double()
    for _ in range(rounds):
        ids = torch.nn.functional.max_pool3d(ids, 3, 1, 1) * mask
    return ids.int()


def plain_instances(ids, min_size, capacity):
    """Row map, counts and geometry of ids, one instance after the other."""
    rows = torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
    counts = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    geometry = torch.zeros((ids.shape[0], capacity, ops.GEOMETRY_COLUMNS), dtype=torch.int64, device=ids.device)
    for b, volume in enumerate(ids):
        for i in volume.unique():
            where = (volume == i).nonzero()
            if i > 0 and len(where) > min_size:
                line = [torch.tensor([len(where)], device=ids.device), where.sum(0), where.amin(0), where.amax(0)]
                geometry[b, counts[b]] = torch.cat(line)
                counts[b] += 1
                rows[b][volume == i] = counts[b]
    return rows, counts, geometry


def used(table, counts):
    """A table (sides, capacity, ...) with zeros in the rows that are not used, which hold anything."""
    rows = torch.arange(table.shape[1], device=table.device)
    here = rows < counts.view(-1, 1)
    return torch.where(here.view(*here.shape, *(1,) * (table.ndim - 2)), table, 0)


def assert_same_instances(result, capacity, expected):
    """Row map, counts and the used rows of geometry."""
    rows, counts, geometry = result
    assert geometry.shape[1] == capacity
    assert_same([rows, counts, used(geometry, counts)], expected)


def assert_same(result, expected):
    """Equal in value, dtype and shape, one by one."""
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def activate(*arguments):
    """`launch_activate`, its mask as foreground and y, its parts added up."""
    masks, parts = importlib.import_module("triton_instance_loss.kernels.activation").launch_activate(*arguments)
    sums, broken = parts.sum(1).split((ops.SAMPLE_COLUMNS, 1), 1)
    return *masks.chunk(2), sums.contiguous(), 1.0 + broken[:, 0]


def found(lab_rows, kept, capacity):
    """Counts and geometry that tell how many outputs are kept and how large labels are; all rows are in use."""
    batch = len(lab_rows)
    geometry = torch.full((2 * batch, capacity, ops.GEOMETRY_COLUMNS), -FAR, device=lab_rows.device)
    rows = torch.arange(1, capacity + 1, device=lab_rows.device)
    geometry[batch:, :, ops.SIZE] = (lab_rows.flatten(1)[:, None] == rows[:, None]).sum(2)
    return torch.stack((torch.full_like(kept, capacity), kept, torch.full_like(kept, capacity))), geometry


def touching(out_rows, lab_rows, kept):
    """The pairs (kept output, label) that touch, a set of each sample."""
    inside = (out_rows > 0) & (out_rows <= kept.view(-1, 1, 1, 1)) & (lab_rows > 0)
    sides = zip(out_rows, lab_rows, inside, strict=True)
    return [set(zip(out[here].tolist(), lab[here].tolist(), strict=True)) for out, lab, here in sides]


def boxes(geometry, counts, shape, reach=None, planar=False, spacing=None):
    """What `prepare` makes of geometry: voxels that rows own, and distances to the nearest row."""
    prepare = importlib.import_module("triton_instance_loss.kernels.prepare").prepare
    return prepare(geometry, counts, 0, 0, shape, reach, planar, spacing)[1:]


def sites_of(foreground, y, out_rows, lab_rows, rest_sizes=None):
    """The sites of masks, which hold at least the instances, and row maps; unless given, no outputs beyond tables."""
    if rest_sizes is None:
        rest_sizes = out_rows.new_empty((len(out_rows), 0))
    masks, rows = torch.cat((foreground, y)), torch.cat((out_rows, lab_rows))
    assert masks[rows > 0].all()
    return [torch.where(masks & (rows == 0), -1, rows), rest_sizes]


def sum_instances(a, y, out_rows, lab_rows, kept, quantity, no_tp, capacity, pair_capacity):
    """`launch_sum_instances` of an activated output, bool (hard) or float, and of what its sites are made of.

    Sums of outputs, of labels and of samples, and the pairs.
    """
    hard = a.dtype == torch.bool
    sites = sites_of(a if hard else out_rows > 0, y, out_rows, lab_rows)
    x, activation = (a.float(), ops.GIVEN) if hard else (a, ops.NONE)
    tables = importlib.import_module("triton_instance_loss.kernels.tables")
    case = (x, sites, *found(lab_rows, kept, capacity), activation, quantity, no_tp)
    sums, sample_sums, pairs, _ = tables.launch_sum_instances(*case, pair_capacity)
    return *sums.chunk(2), sample_sums, pairs


def sum_instances_backward(*arguments):
    """`launch_sum_instances_backward`, its gradients with as many columns as the tables, the sites one by one."""
    (*grads, x, labels, foreground, y), (out_rows, lab_rows, kept, quantity, no_tp, activation, *pixel) = (
        arguments[:8],
        arguments[8:],
    )
    of_rows = torch.cat(grads[:2])[..., : ops.GRADIENT_COLUMNS].contiguous()
    of_whole, of_pixel = (grad[:, : ops.SAMPLE_GRADIENT_COLUMNS].contiguous() for grad in grads[2:])
    of_whole = torch.nn.functional.pad(of_whole, (0, ops.WHOLE_GRADIENT_COLUMNS - ops.SAMPLE_GRADIENT_COLUMNS))
    sites = sites_of(foreground, y, out_rows, lab_rows)
    counts, _ = found(lab_rows, kept, of_rows.shape[1])
    tables = importlib.import_module("triton_instance_loss.kernels.tables")
    of_excess = torch.zeros(of_rows[: len(x), :, 0].shape, dtype=torch.float64, device=x.device)
    for sample, pairs in enumerate(touching(out_rows, lab_rows, kept)):
        for out, lab in pairs:
            of_excess[sample, out - 1] += of_rows[len(x) + sample, lab - 1, ops.COST]
    untouched = torch.empty((len(x), 0), dtype=torch.bool, device=x.device)
    case = (x, labels, sites, untouched, counts, activation, quantity, no_tp, *pixel)
    no_terms = torch.full((7,), float("nan"), dtype=torch.float64, device=x.device)
    slopes = torch.full((*of_rows.shape[:2], ops.SLOPES_COLUMNS), float("nan"), dtype=torch.float64, device=x.device)
    grads = of_rows, of_excess, of_whole, of_pixel
    return tables.launch_sum_instances_backward(no_terms, slopes, *grads, *case, ops.NO_GRADIENT)
