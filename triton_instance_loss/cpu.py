"""The operators on the CPU. Everything works on the foreground voxels alone, a list of one or two per cent of a patch.

Results equal those of the kernels: integers exactly, sums to the rounding of float64. All is deterministic.
SciPy is imported when the first mask is labelled.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import (
    COORDINATE_SUMS,
    COST,
    EXCESS,
    GEOMETRY_COLUMNS,
    HIGHS,
    INTERSECTION,
    LOWS,
    MASS,
    OVERLAP,
    SAMPLE_COLUMNS,
    SIZE,
    SUMS_COLUMNS,
    TOUCHED,
)
from .quantities import phi, phi_derivative

Indices = NDArray[np.int64]

# Up to this foreground fraction, joining runs of voxels beats a pass of scipy.ndimage.label over the whole volume.
SPARSE_FRACTION = 1 / 16
BOXES_AT_ONCE = 256  # output boxes compared with all label boxes in one go: bounds the memory of the distances
_NO_LOW, _NO_HIGH = 2**31 - 1, -1


def components(mask: Tensor, num_iterations: int) -> Tensor:
    """Operator `components` (ops.py)."""
    if num_iterations > 0:
        return _propagate(mask, num_iterations)
    voxels, names = _label(mask.numpy())
    last = _largest_voxel(voxels, names)
    ids = torch.zeros(mask.shape, dtype=torch.int32)
    ids.numpy().reshape(-1)[voxels] = last[names] % mask[0].numel() + 1
    return ids


def find_instances(mask: Tensor, num_iterations: int, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `find_instances` (ops.py)."""
    if num_iterations > 0:
        return number_instances(_propagate(mask, num_iterations), min_size, capacity)
    voxels, names = _label(mask.numpy())
    return _number(voxels, names, _largest_voxel(voxels, names), mask.shape, min_size, capacity)


def number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `number_instances` (ops.py)."""
    flat = ids.numpy().reshape(-1)
    voxels = np.flatnonzero(flat != 0)
    samples = voxels // ids[0].numel()
    # Names in the order of (sample, id).
    keys, names = np.unique(np.stack((samples, flat[voxels].astype(np.int64))), axis=1, return_inverse=True)
    order = np.arange(keys.shape[1])
    first_voxel_of_sample = keys[0] * ids[0].numel()
    return _number(voxels, names.reshape(-1), order, ids.shape, min_size, capacity, first_voxel_of_sample)


def _label(mask: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Foreground voxels (ascending, over the whole batch) and the component of each, named 0..n-1 in any order."""
    voxels = np.flatnonzero(mask)
    if len(voxels) <= SPARSE_FRACTION * mask.size:
        return voxels, _join_runs(voxels, mask.shape)
    from scipy import ndimage

    names = np.empty(len(voxels), dtype=np.int64)
    done = start = 0
    for sample in mask:
        labelled, count = ndimage.label(sample, structure=np.ones((3, 3, 3)))
        inside = labelled[sample]
        names[done : done + len(inside)] = inside.astype(np.int64) - 1 + start
        done, start = done + len(inside), start + count
    return voxels, names


def _join_runs(voxels: Indices, shape: tuple[int, ...]) -> Indices:
    """Name the components of a list of voxels: cut it into runs along W, join runs that touch, label that graph."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, depth, height, width = shape
    if len(voxels) == 0:
        return voxels
    line, x = np.divmod(voxels, width)
    begins = np.ones(len(voxels), dtype=bool)
    begins[1:] = (voxels[1:] != voxels[:-1] + 1) | (line[1:] != line[:-1])
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(voxels)) - 1
    run_line = line[firsts]
    # Two free places between lines, so that a run widened by one voxel never reaches into another line.
    first = run_line * (width + 2) + x[firsts]
    last = run_line * (width + 2) + x[lasts]
    h = run_line % height
    d = run_line // height % depth

    heads, tails = [], []
    for dd, dh in ((0, 1), (1, -1), (1, 0), (1, 1)):
        inside = np.flatnonzero((d + dd < depth) & (h + dh >= 0) & (h + dh < height))
        shift = (dd * height + dh) * (width + 2)
        low = np.searchsorted(last, first[inside] + shift - 1, side="left")
        high = np.searchsorted(first, last[inside] + shift + 1, side="right")
        met = np.maximum(high - low, 0)
        heads.append(np.repeat(inside, met))
        within = np.arange(met.sum()) - np.repeat(np.cumsum(met) - met, met)
        tails.append(np.repeat(low, met) + within)
    head, tail = np.concatenate(heads), np.concatenate(tails)
    graph = coo_matrix((np.ones(len(head), dtype=bool), (head, tail)), shape=(len(firsts), len(firsts)))
    _, run_names = connected_components(graph, directed=False)
    return np.repeat(run_names, lasts - firsts + 1).astype(np.int64)


def _largest_voxel(voxels: Indices, names: Indices) -> Indices:
    """The largest voxel of each component: what orders components, and their id less one."""
    largest = np.zeros(names.max(initial=-1) + 1, dtype=np.int64)
    largest[names] = voxels  # voxels ascend, and of several values for one name the last stays
    return largest


def _propagate(mask: Tensor, rounds: int) -> Tensor:
    """`rounds` of 3x3x3 max-pooling of the linear indices (from 1) inside the mask, until nothing changes."""
    voxels = mask[0].numel()
    # float64 holds every index exactly; max pooling has no integer version for volumes.
    current = torch.arange(1, voxels + 1, dtype=torch.float64).view(1, *mask.shape[1:]) * mask
    for _ in range(rounds):
        pooled = torch.nn.functional.max_pool3d(current.unsqueeze(1), 3, stride=1, padding=1).squeeze(1) * mask
        if torch.equal(pooled, current):
            break
        current = pooled
    return current.int()


def _number(
    voxels: Indices,
    names: Indices,
    order: Indices,
    shape: tuple[int, ...],
    min_size: int,
    capacity: int,
    voxel_of_name: Indices | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row map, counts and geometry of named voxels; instances are numbered by `order` within their sample."""
    batch, volume = shape[0], int(np.prod(shape[1:]))
    sample_of_name = (order if voxel_of_name is None else voxel_of_name) // volume
    sizes = np.bincount(names, minlength=len(order))
    large = sizes > min_size
    counts = np.bincount(sample_of_name[large], minlength=batch)

    ranked = np.argsort(order)
    ranked = ranked[large[ranked]]
    row_of_name = np.zeros(len(order), dtype=np.int64)
    row_of_name[ranked] = np.arange(len(ranked)) - (np.cumsum(counts) - counts)[sample_of_name[ranked]] + 1

    rows = torch.zeros(shape, dtype=torch.int32)
    row_of_voxel = row_of_name[names]
    rows.numpy().reshape(-1)[voxels] = row_of_voxel
    if min_size > 0:
        present = row_of_voxel > 0
        voxels, row_of_voxel = voxels[present], row_of_voxel[present]
    capacity = capacity or max(1, int(counts.max()))
    geometry = _measure(voxels, row_of_voxel, shape, capacity)
    return rows, torch.from_numpy(counts.astype(np.int32)), torch.from_numpy(geometry)


def _measure(voxels: Indices, rows: Indices, shape: tuple[int, ...], capacity: int) -> NDArray[np.int64]:
    """Size, coordinate sums and bounds of each instance."""
    batch, depth, height, width = shape
    line, w = np.divmod(voxels, width)
    plane, h = np.divmod(line, height)
    sample, d = np.divmod(plane, depth)
    at = sample * capacity + rows - 1
    table = np.zeros((batch * capacity, GEOMETRY_COLUMNS), dtype=np.int64)
    table[:, LOWS], table[:, HIGHS] = _NO_LOW, _NO_HIGH
    table[:, SIZE] = np.bincount(at, minlength=len(table))
    for axis, coordinate in enumerate((d, h, w)):
        # Coordinates are below 2^31 and their sums below 2^53: exact in float64.
        table[:, 1 + axis] = np.bincount(at, weights=coordinate, minlength=len(table))
        np.minimum.at(table[:, 4 + axis], at, coordinate)
        np.maximum.at(table[:, 7 + axis], at, coordinate)
    return table.reshape(batch, capacity, GEOMETRY_COLUMNS)


class _Foreground:
    """The voxels of one row map: where they are, and what the volumes hold there."""

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.voxels = np.flatnonzero((rows != 0).numpy())
        self.where = torch.from_numpy(self.voxels)
        self.rows = rows.view(-1)[self.where].long()
        self.samples = self.where // rows[0].numel()
        self.at = self.samples * capacity + self.rows - 1
        self.shape = (rows.shape[0], capacity)

    def take(self, volume: Tensor) -> Tensor:
        """The values of `volume` at the voxels."""
        return volume.view(-1)[self.where]

    def table(self, columns: dict[int, Tensor]) -> Tensor:
        """Sums over each instance, one column a quantity, (B, capacity, columns)."""
        size = self.shape[0] * self.shape[1]
        table = torch.zeros((size, SUMS_COLUMNS), dtype=torch.float64)
        for column, values in columns.items():
            table[:, column] = torch.bincount(self.at, weights=values.double(), minlength=size)
        return table.view(*self.shape, SUMS_COLUMNS)


def _values(foreground: _Foreground, a: Tensor) -> Tensor:
    """Activated outputs at the voxels, as numbers."""
    values = foreground.take(a)
    return values.float() if values.dtype == torch.bool else values


def sum_instances(
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    out_capacity: int,
    lab_capacity: int,
    pair_capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operator `sum_instances` (ops.py)."""
    out = _Foreground(out_rows, out_capacity)
    values = _values(out, a)
    on_label = out.take(lab_rows) > 0
    zero = torch.zeros_like(values)
    excess = (
        torch.where(out.take(y), zero, phi(quantity, values * values, 0.0)) if no_tp else phi(quantity, values, 0.0)
    )
    out_sums = out.table(
        {
            MASS: values,
            INTERSECTION: torch.where(on_label, values, zero),
            COST: torch.where(on_label, phi(quantity, values, 1.0), phi(quantity, values, 0.0)),
            EXCESS: excess,
            OVERLAP: on_label,
        }
    )
    pairs = _pairs(out, out.take(lab_rows), kept, pair_capacity)

    lab = _Foreground(lab_rows, lab_capacity)
    values = _values(lab, a)
    output = lab.take(out_rows)
    inside = (output > 0) & (output <= kept[lab.samples])
    cost = phi(quantity, values, 1.0) if no_tp else phi(quantity, values, 1.0) - phi(quantity, values, 0.0)
    zero = torch.zeros_like(values)
    lab_sums = lab.table(
        {
            MASS: values,
            INTERSECTION: torch.where(inside, values, zero),
            COST: torch.where(inside, cost, zero),
            TOUCHED: output > 0,
            OVERLAP: inside,
        }
    )
    return out_sums, lab_sums, _sample_sums(a, y, quantity), pairs


def _pairs(out: _Foreground, labels: Tensor, kept: Tensor, capacity: int) -> Tensor:
    """Each pair of a kept output and a label that share a voxel, once."""
    batch = len(kept)
    meet = (labels > 0) & (out.rows <= kept[out.samples])
    keys = (out.rows[meet] << 32 | labels[meet]).numpy()
    samples = out.samples[meet].numpy()
    pairs = torch.zeros((batch, capacity), dtype=torch.int64)
    for sample in range(batch):
        found = np.unique(keys[samples == sample])
        pairs[sample, : len(found)] = torch.from_numpy(found)
    return pairs


def _sample_sums(a: Tensor, y: Tensor, quantity: int) -> Tensor:
    """Sums of a * y, phi(a, y) and y over each sample."""
    sums = torch.zeros((a.shape[0], SAMPLE_COLUMNS), dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for sample, (values, truth) in enumerate(zip(a.flatten(1), y.flatten(1), strict=True)):
        labelled = torch.from_numpy(np.flatnonzero(truth.numpy()))
        on_label = values[labelled]
        if a.dtype == torch.bool:
            both, ones = on_label.count_nonzero(), values.count_nonzero()
            intersection: Tensor = both.double()
            cost = both * phi(quantity, one, 1.0) + (ones - both) * phi(quantity, one, 0.0)
            cost = cost + (len(labelled) - both) * phi(quantity, 0.0 * one, 1.0)
        else:
            intersection = on_label.sum(dtype=torch.float64)
            cost = phi(quantity, values, 0.0).sum(dtype=torch.float64)
            change = phi(quantity, on_label, 1.0).double() - phi(quantity, on_label, 0.0).double()
            cost = cost + change.sum()
        sums[sample, 0], sums[sample, 1], sums[sample, 2] = intersection, cost, float(len(labelled))
    return sums


def sum_instances_backward(
    grad_out_sums: Tensor,
    grad_lab_sums: Tensor,
    grad_sample_sums: Tensor,
    a: Tensor,
    y: Tensor,
    out_rows: Tensor,
    lab_rows: Tensor,
    kept: Tensor,
    quantity: int,
    no_tp: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Operator `sum_instances_backward` (ops.py)."""
    grad = torch.zeros(a.shape, dtype=dtype)

    out = _Foreground(out_rows, grad_out_sums.shape[1])
    grads = grad_out_sums.reshape(-1, SUMS_COLUMNS)[out.at]
    values = _values(out, a)
    on_label = out.take(lab_rows) > 0
    at_one, at_zero = phi_derivative(quantity, values, 1.0), phi_derivative(quantity, values, 0.0)
    if no_tp:
        squared = phi_derivative(quantity, values * values, 0.0) * values
        excess = torch.where(out.take(y), torch.zeros_like(values), squared)
    else:
        excess = at_zero
    slope = grads[:, MASS] + on_label * grads[:, INTERSECTION]
    slope = slope + grads[:, COST] * torch.where(on_label, at_one, at_zero) + grads[:, EXCESS] * excess
    grad.view(-1)[out.where] = slope.to(dtype)

    lab = _Foreground(lab_rows, grad_lab_sums.shape[1])
    grads = grad_lab_sums.reshape(-1, SUMS_COLUMNS)[lab.at]
    values = _values(lab, a)
    output = lab.take(out_rows)
    inside = (output > 0) & (output <= kept[lab.samples])
    cost = phi_derivative(quantity, values, 1.0)
    if not no_tp:
        cost = cost - phi_derivative(quantity, values, 0.0)
    slope = grads[:, MASS] + torch.where(inside, grads[:, INTERSECTION] + grads[:, COST] * cost, 0.0)
    grad.view(-1)[lab.where] += slope.to(dtype)

    for sample, (on_intersection, on_cost, _) in enumerate(grad_sample_sums.tolist()):
        if on_intersection != 0.0 or on_cost != 0.0:
            values, truth = a[sample].to(dtype), y[sample].to(dtype)
            grad[sample] += on_intersection * truth + on_cost * phi_derivative(quantity, values, truth)
    return grad


def sum_neighbours(values: Tensor, pairs: Tensor, to_labels: bool, capacity: int) -> Tensor:
    """Operator `sum_neighbours` (ops.py)."""
    sample, slot = pairs.nonzero(as_tuple=True)
    keys = pairs[sample, slot]
    out, lab = (keys >> 32) - 1, (keys & 0xFFFFFFFF) - 1
    source, target = (out, lab) if to_labels else (lab, out)
    sums = torch.zeros((values.shape[0], capacity), dtype=values.dtype)
    return sums.index_put_((sample, target), values[sample, source], accumulate=True)


Box = tuple[slice, slice, slice]


def _paint_centers(geometry: Tensor, count: int, shape: list[int], offsets: list[int]) -> tuple[list[Box], Indices]:
    """The centre boxes of the first `count` instances of a sample, and the row painted last over each voxel."""
    used = geometry[:count].numpy()
    centers = -(-used[:, COORDINATE_SUMS] // used[:, SIZE, None])  # rounded up
    lows = np.maximum(centers - np.array(offsets) - 1, 0).tolist()
    highs = np.minimum(centers + np.array(offsets), np.array(shape)).tolist()
    boxes: list[Box] = [
        (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
        for low, high in zip(lows, highs, strict=True)
    ]
    owner = np.zeros(shape, dtype=np.int32)
    for row, box in enumerate(boxes, start=1):
        owner[box] = row
    return boxes, owner


def center_volumes(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_volumes` (ops.py)."""
    owners, covered = [], []
    for sample in range(len(kept)):
        _, owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets)
        _, label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets)
        owners.append(torch.from_numpy(owner))
        covered.append(torch.from_numpy(label > 0))
    return torch.stack(owners), torch.stack(covered)


def center_overlaps(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Operator `center_overlaps` (ops.py)."""
    owned = torch.zeros((*out_geometry.shape[:2], 2), dtype=torch.int64)
    alone = torch.zeros(len(kept), dtype=torch.int64)
    for sample in range(len(kept)):
        boxes, owner = _paint_centers(out_geometry[sample], int(kept[sample]), shape, offsets)
        label_boxes, label = _paint_centers(lab_geometry[sample], int(num_labels[sample]), shape, offsets)
        for row, box in enumerate(boxes):
            mine = owner[box] == row + 1
            inside = np.count_nonzero(mine & (label[box] > 0))
            owned[sample, row, 0] = np.count_nonzero(mine) - inside
            owned[sample, row, 1] = inside
        for row, box in enumerate(label_boxes):
            # A voxel under several label boxes counts in the one painted last.
            alone[sample] += np.count_nonzero((label[box] == row + 1) & (owner[box] == 0))
    return owned, alone


Boxes = tuple[Tensor, Tensor, Tensor]  # low, high (exclusive) and centre, each (boxes, axes) float64


def proximity_minima(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], planar: bool
) -> tuple[Tensor, Tensor]:
    """Operator `proximity_minima` (ops.py)."""
    for_outputs = torch.zeros(out_geometry.shape[:2], dtype=torch.float64)
    for_labels = torch.zeros(lab_geometry.shape[:2], dtype=torch.float64)
    axes = slice(1, 3) if planar else slice(0, 3)
    for sample in range(len(kept)):
        out = _extended_boxes(out_geometry[sample], int(kept[sample]), shape, axes)
        lab = _extended_boxes(lab_geometry[sample], int(num_labels[sample]), shape, axes)
        nearest_output = for_labels[sample, : len(lab[0])].fill_(torch.inf)
        for start in range(0, len(out[0]), BOXES_AT_ONCE):
            part = slice(start, start + BOXES_AT_ONCE)
            distances = _distances((out[0][part], out[1][part], out[2][part]), lab)
            for_outputs[sample, part][: len(distances)] = distances.amin(1)
            torch.minimum(nearest_output, distances.amin(0), out=nearest_output)
    return for_outputs, for_labels


def _extended_boxes(geometry: Tensor, count: int, shape: list[int], axes: slice) -> Boxes:
    """The extended boxes of the first `count` instances; without any, one box in the middle of the volume."""
    dims = torch.tensor(shape, dtype=torch.float64)[axes]
    if count == 0:
        middle = torch.floor(dims / 2)[None]
        return middle - 1, middle + 1, middle
    lows = geometry[:count, LOWS].double()[:, axes]
    highs = geometry[:count, HIGHS].double()[:, axes]
    extent = (highs - lows).clamp(min=1)
    low = (lows - extent - 1).clamp(min=0)
    high = torch.minimum(highs + extent, dims)
    return low, high, low + torch.ceil((high - low) / 2)


def _distances(out: Boxes, lab: Boxes) -> Tensor:
    """DIoU between each output box (rows) and each label box (columns)."""
    low, high, center = (corner[:, None] for corner in out)
    lows, highs, centers = lab
    shared = (torch.minimum(high, highs) - torch.maximum(low, lows)).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (highs - lows).prod(-1) - shared
    apart = ((center - centers) ** 2).sum(-1)
    diagonal = ((torch.maximum(high, highs) - torch.minimum(low, lows)) ** 2).sum(-1)
    return 1.0 - shared / union + apart / (diagonal + 1e-7)
