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
    geometry = torch.tensor([0] * 4 + [FAR] * 3 + [-1] * 3, device=ids.device).repeat(ids.shape[0], capacity, 1)
    for b, volume in enumerate(ids):
        for i in volume.unique():
            where = (volume == i).nonzero()
            if i > 0 and len(where) > min_size:
                line = [torch.tensor([len(where)], device=ids.device), where.sum(0), where.amin(0), where.amax(0)]
                geometry[b, counts[b]] = torch.cat(line)
                counts[b] += 1
                rows[b][volume == i] = counts[b]
    return rows, counts, geometry


def assert_same(result, expected):
    """Equal in value, dtype and shape, one by one."""
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def activate(*arguments):
    """`launch_activate`, its mask as foreground and y."""
    masks, sums, health = importlib.import_module("triton_instance_loss.kernels.activation").launch_activate(*arguments)
    return *masks.chunk(2), sums, health


def sizes(lab_rows, capacity):
    """A geometry table of labels that holds their sizes, and elsewhere what nothing should read."""
    geometry = torch.full((len(lab_rows), capacity, ops.GEOMETRY_COLUMNS), -FAR, device=lab_rows.device)
    rows = torch.arange(1, capacity + 1, device=lab_rows.device)
    geometry[..., ops.SIZE] = (lab_rows.flatten(1)[:, None] == rows[:, None]).sum(2)
    return geometry


def touching(out_rows, lab_rows, kept):
    """The pairs (kept output, label) that touch, a set of each sample."""
    inside = (out_rows > 0) & (out_rows <= kept.view(-1, 1, 1, 1)) & (lab_rows > 0)
    sides = zip(out_rows, lab_rows, inside, strict=True)
    return [set(zip(out[here].tolist(), lab[here].tolist(), strict=True)) for out, lab, here in sides]


def sum_instances(a, y, out_rows, lab_rows, kept, quantity, no_tp, out_capacity, lab_capacity, pair_capacity):
    """`launch_sum_instances` of an activated output, bool (hard) or float, and of what its sites are made of."""
    hard = a.dtype == torch.bool
    sites = [torch.cat((a if hard else a > 0, y)), torch.cat((out_rows, lab_rows))]
    x, activation = (a.float(), ops.GIVEN) if hard else (a, ops.NONE)
    tables = importlib.import_module("triton_instance_loss.kernels.tables")
    case = (x, sites, kept, sizes(lab_rows, lab_capacity), activation, quantity, no_tp)
    return tables.launch_sum_instances(*case, out_capacity, pair_capacity)


def sum_instances_backward(*arguments):
    """`launch_sum_instances_backward`, its gradients with as many columns as the tables, the sites one by one."""
    (*grads, x, labels, foreground, y), (out_rows, lab_rows, kept, quantity, no_tp, activation, *pixel) = (
        arguments[:8],
        arguments[8:],
    )
    columns = (ops.GRADIENT_COLUMNS,) * 2 + (ops.SAMPLE_GRADIENT_COLUMNS,) * 2
    grads = [grad[..., :some].contiguous() for grad, some in zip(grads, columns, strict=True)]
    sites = [torch.cat((foreground, y)), torch.cat((out_rows, lab_rows))]
    pairs = torch.zeros((len(x), 64), dtype=torch.int64)
    for keys, found in zip(pairs, touching(out_rows, lab_rows, kept), strict=True):
        keys[3 : 3 + len(found)] = torch.tensor([out << 32 | lab for out, lab in sorted(found)])
    tables = importlib.import_module("triton_instance_loss.kernels.tables")
    case = (x, labels, sites, pairs.to(x.device), kept, activation, quantity, no_tp, *pixel)
    return tables.launch_sum_instances_backward(*grads, *case)
