"""The operators: what each one takes and gives, and which backend answers.

A volume is (B, D, H, W) and contiguous; an image comes as a volume with D = 1. `V = D * H * W`.
A *row map* holds at each voxel the number of its instance, 1..n in id order, or 0; row r of a table is instance r + 1.
Tables have a fixed number of rows, `capacity`, so that no shape depends on data and Python never reads a count.
CPU tensors go to `cpu/`, CUDA tensors to `kernels/`, which have the same rooms. The environment variable
`TRITON_INSTANCE_LOSS_BACKEND` (`cpu` or `triton`), read at each call, overrides that. This module imports neither
Triton nor SciPy.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKEND_VARIABLE = "TRITON_INSTANCE_LOSS_BACKEND"

# Activations: the activated output a of x, and what the gradient flows into.
NONE = 0  # a = x; foreground where x >= threshold, or x == 1 if the threshold is 0 or less
SIGMOID = 1  # a = foreground = [sigmoid(x) >= threshold]; sigmoid(x)
GIVEN = 2  # a = foreground = [x >= threshold] of a probability x; x

# What the pixel term, where it is fused, sees as prediction u and truth w.
NOT_FUSED = -1
RAW = 0  # x, and the labels as they are
PROBABILITY = 1  # sigmoid(x) with SIGMOID, else x; and y
HARD = 2  # a, with the derivative of what the gradient flows into; and the labels as they are

# Columns of a geometry table (int64). Bounds are inclusive; unused rows hold size 0, low 2^31 - 1, high -1.
SIZE, COORDINATE_SUMS, LOWS, HIGHS = 0, slice(1, 4), slice(4, 7), slice(7, 10)
GEOMETRY_COLUMNS = 10

# Columns of a sums table (float64). a is the activated output, phi the quantity of the criterion (see criteria.py).
MASS = 0  # sum of a over the instance
INTERSECTION = 1  # output: sum of a where a label instance is; label: sum of a inside kept outputs
COST = 2  # output: sum of phi(a, 1 where a label instance is); label: sum of phi(a, 1) inside kept outputs (*)
EXCESS = 3  # output: phi over the voxels it brings into each label it touches: phi(a * stopgrad(a), 0) where y = 0 (*)
TOUCHED = 3  # label: voxels inside any output, kept or not
OVERLAP = 4  # output: voxels on a label instance; label: voxels inside kept outputs
SUMS_COLUMNS = 5
# (*) without no_tp: EXCESS is phi(a, 0) over the whole output, and a label's COST is phi(a, 1) - phi(a, 0).
# Columns of the sample table (float64): sums over all voxels of a * y, of phi(a, y) and of y.
SAMPLE_COLUMNS = 3
# Lines of the sites of the CPU backend (int64), one column a voxel of the foreground of either side, in linear order:
# its index in the batch (-1 from the first column that is not used), rows of its instances, bits of cpu/instances.py.
SITE_LINES = 4

_library = torch.library.Library("triton_instance_loss", "DEF")

_SCHEMAS = {
    # x float32 or float64, labels of any real dtype but half, precomputed ids (int64, 0 outside y) or none
    # -> sites: where the instances are, as the same backend's operators below want it; sums (B, 3) float64 of u * w,
    # phi(u, w) and truth w of the pixel term, zeros with pixel=-1; health, 0-d float64: 1, or NaN if any x is NaN or
    # infinite; and counts (2 B,) int32 and geometry, as in find_instances, outputs before labels: (2 B, capacity, 10),
    # or with ids one tensor a side. The codes are those above
    "find": "(Tensor x, Tensor labels, Tensor? ids, int activation, float threshold, int pixel, int pixel_quantity,"
    " int num_iterations, int min_size, int out_capacity, int lab_capacity)"
    " -> (Tensor[], Tensor, Tensor, Tensor, Tensor[])",
    # sites -> foreground of the outputs and y, bool, and the two row maps, int32, as volumes
    "row_maps": "(Tensor x, Tensor[] sites) -> (Tensor, Tensor, Tensor, Tensor)",
    # mask bool -> ids int32: largest linear index + 1 of the component (0 rounds: whole components), 0 = background
    "components": "(Tensor mask, int num_iterations) -> Tensor",
    # mask bool -> row map int32, counts (B,) int32, geometry (B, capacity, 10) int64; capacity 0: as many rows as the
    # largest count, at least 1 (the CPU backend alone, where counting costs nothing)
    "find_instances": "(Tensor mask, int num_iterations, int min_size, int capacity) -> (Tensor, Tensor, Tensor)",
    # the same from given ids (an integer dtype, any positive number): instances are the sets of equal ids
    "number_instances": "(Tensor ids, int min_size, int capacity) -> (Tensor, Tensor, Tensor)",
    # kept (B,) int32: outputs 1..kept are used individually
    # -> output sums (B, out_capacity, 5), label sums (B, lab_capacity, 5), sample sums (B, 3; read only of samples
    #    without labels or kept outputs), all float64, and pairs (B, pair_capacity) int64: each (kept output row, label
    #    row) that touch, once, as out << 32 | lab (rows counted from 1); 0 = no pair; any order
    "sum_instances": "(Tensor x, Tensor[] sites, Tensor kept, int activation, int quantity, bool no_tp,"
    " int out_capacity, int lab_capacity, int pair_capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    # gradients of the three tables, and of the sums of the pixel term -> gradient of x, of its shape and dtype
    "sum_instances_backward": "(Tensor grad_out_sums, Tensor grad_lab_sums, Tensor grad_sample_sums,"
    " Tensor grad_pixel_sums, Tensor x, Tensor labels, Tensor[] sites, Tensor kept, int activation, int quantity,"
    " bool no_tp, int pixel, int pixel_quantity) -> Tensor",
    # values (B, R) float64 of one side -> for each row of the other side, the sum over the rows it is paired with
    "sum_neighbours": "(Tensor values, Tensor pairs, bool to_labels, int capacity) -> Tensor",
    # centre boxes of outputs 1..kept and labels 1..n -> owned (B, out_capacity, 2) int64: voxels whose box of largest
    # row is this output's, outside [0] and inside [1] the label boxes; alone (B,) int64: voxels of label boxes only
    "center_overlaps": "(Tensor out_geometry, Tensor lab_geometry, Tensor kept, Tensor num_labels, int[3] shape,"
    " int[3] offsets) -> (Tensor, Tensor)",
    # the same as volumes: owner (B, D, H, W) int32 = largest output row whose box covers the voxel, 0 = none;
    # covered (B, D, H, W) bool = inside a label box
    "center_volumes": "(Tensor out_geometry, Tensor lab_geometry, Tensor kept, Tensor num_labels, int[3] shape,"
    " int[3] offsets) -> (Tensor, Tensor)",
    # extended boxes -> for each output (1..kept) the smallest DIoU to a label, and for each label to an output,
    # (B, out_capacity) and (B, lab_capacity) float64, 0 in unused rows. A side with count 0 is one box in the middle.
    "proximity_minima": "(Tensor out_geometry, Tensor lab_geometry, Tensor kept, Tensor num_labels, int[3] shape,"
    " bool planar) -> (Tensor, Tensor)",
}


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(tensor: Tensor) -> str:
    """Name of the backend that answers for `tensor`: "cpu" or "triton".

    Raises:
        ValueError: the environment variable holds anything else, or asks for the CPU backend on a CUDA tensor.
        RuntimeError: Triton is asked for and is missing, or has to run on CPU tensors without its interpreter.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "cpu", "triton"):
        raise ValueError(f"{BACKEND_VARIABLE} must be 'cpu' or 'triton' (or unset), got {wanted!r}.")
    device = tensor.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}.")
    chosen = wanted or ("triton" if device == "cuda" else "cpu")
    if chosen == "cpu" and device == "cuda":
        raise ValueError(f"{BACKEND_VARIABLE}='cpu' works on CPU tensors only, got a tensor on {tensor.device}.")
    if chosen == "triton":
        if not _triton_is_installed():
            raise RuntimeError(
                f"Tensors on {tensor.device} need the package 'triton', which is not installed: `pip install triton` "
                "(Linux), or move the tensors to the CPU."
            )
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{BACKEND_VARIABLE}='triton' on CPU tensors runs Triton's interpreter: set TRITON_INTERPRET=1 before "
                "the process first imports triton."
            )
    return chosen


# Which room of `cpu/` holds an operator, and of `kernels/` its launcher.
_ROOMS = {
    "find": "instances",
    "row_maps": "instances",
    "components": "components",
    "find_instances": "components",
    "number_instances": "components",
    "sum_instances": "tables",
    "sum_instances_backward": "tables",
    "sum_neighbours": "tables",
    "center_overlaps": "centers",
    "center_volumes": "centers",
    "proximity_minima": "proximity",
}


def _dispatch(name: str) -> Any:
    def run(*args: Any) -> Any:
        first: Tensor = args[0]
        if backend(first) == "cpu":
            return getattr(importlib.import_module(f".cpu.{_ROOMS[name]}", __package__), name)(*args)
        launch = getattr(importlib.import_module(f".kernels.{_ROOMS[name]}", __package__), f"launch_{name}")
        if first.device.type == "cpu":
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return run


def _fake_find(
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
    batch, *shape = x.shape
    if backend(x) == "cpu":
        sites = [x.new_empty((SITE_LINES, x.numel()), dtype=torch.int64)]
    else:
        sites = [x.new_empty((2 * batch, *shape), dtype=dtype) for dtype in (torch.bool, torch.int32)]
    sides = [(2 * batch, out_capacity)] if ids is None else [(batch, out_capacity), (batch, lab_capacity)]
    return (
        sites,
        x.new_empty((batch, SAMPLE_COLUMNS), dtype=torch.float64),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((2 * batch,), dtype=torch.int32),
        [x.new_empty((*side, GEOMETRY_COLUMNS), dtype=torch.int64) for side in sides],
    )


def _fake_row_maps(x: Tensor, sites: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    foreground, y = (x.new_empty(x.shape, dtype=torch.bool) for _ in range(2))
    out_rows, lab_rows = (x.new_empty(x.shape, dtype=torch.int32) for _ in range(2))
    return foreground, y, out_rows, lab_rows


def _fake_components(mask: Tensor, num_iterations: int) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int32)


def _fake_find_instances(
    mask: Tensor, num_iterations: int, min_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_number_instances(mask, min_size, capacity)


def _fake_number_instances(ids: Tensor, min_size: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = ids.shape[0]
    return (
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty((batch,), dtype=torch.int32),
        ids.new_empty((batch, capacity, GEOMETRY_COLUMNS), dtype=torch.int64),
    )


def _fake_sum_instances(
    x: Tensor,
    sites: list[Tensor],
    kept: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    out_capacity: int,
    lab_capacity: int,
    pair_capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    return (
        x.new_empty((batch, out_capacity, SUMS_COLUMNS), dtype=torch.float64),
        x.new_empty((batch, lab_capacity, SUMS_COLUMNS), dtype=torch.float64),
        x.new_empty((batch, SAMPLE_COLUMNS), dtype=torch.float64),
        x.new_empty((batch, pair_capacity), dtype=torch.int64),
    )


def _fake_sum_instances_backward(
    grad_out_sums: Tensor,
    grad_lab_sums: Tensor,
    grad_sample_sums: Tensor,
    grad_pixel_sums: Tensor,
    x: Tensor,
    labels: Tensor,
    sites: list[Tensor],
    kept: Tensor,
    activation: int,
    quantity: int,
    no_tp: bool,
    pixel: int,
    pixel_quantity: int,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_sum_neighbours(values: Tensor, pairs: Tensor, to_labels: bool, capacity: int) -> Tensor:
    return values.new_empty((values.shape[0], capacity))


def _fake_center_overlaps(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    batch, rows, _ = out_geometry.shape
    return out_geometry.new_empty((batch, rows, 2)), out_geometry.new_empty((batch,))


def _fake_center_volumes(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], offsets: list[int]
) -> tuple[Tensor, Tensor]:
    volume = (out_geometry.shape[0], *shape)
    return out_geometry.new_empty(volume, dtype=torch.int32), out_geometry.new_empty(volume, dtype=torch.bool)


def _fake_proximity_minima(
    out_geometry: Tensor, lab_geometry: Tensor, kept: Tensor, num_labels: Tensor, shape: list[int], planar: bool
) -> tuple[Tensor, Tensor]:
    return (
        out_geometry.new_empty(out_geometry.shape[:2], dtype=torch.float64),
        lab_geometry.new_empty(lab_geometry.shape[:2], dtype=torch.float64),
    )


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _dispatch(_name), _key)
    torch.library.register_fake(f"triton_instance_loss::{_name}", globals()[f"_fake_{_name}"], lib=_library)

find = torch.ops.triton_instance_loss.find.default
row_maps = torch.ops.triton_instance_loss.row_maps.default
components = torch.ops.triton_instance_loss.components.default
find_instances = torch.ops.triton_instance_loss.find_instances.default
number_instances = torch.ops.triton_instance_loss.number_instances.default
sum_instances = torch.ops.triton_instance_loss.sum_instances.default
sum_instances_backward = torch.ops.triton_instance_loss.sum_instances_backward.default
sum_neighbours = torch.ops.triton_instance_loss.sum_neighbours.default
center_overlaps = torch.ops.triton_instance_loss.center_overlaps.default
center_volumes = torch.ops.triton_instance_loss.center_volumes.default
proximity_minima = torch.ops.triton_instance_loss.proximity_minima.default
