"""Compile every kernel for NVIDIA's and AMD's GPUs, without one, and say how many registers each takes.

The launchers are called on fake tensors, with `JITFunction.run` replaced by one that notes what would be launched:
the types, constants, blocks and warps are those of a real launch. A launcher that asks for a value, and so would wait
for the device, fails on a fake tensor. Where a pointer is aligned to 16 bytes, or a number a multiple of 16, Triton
emits other code, with wide accesses. So each launch is compiled twice: *aligned*, with what a launch on a patch with
sides of 16 n would find, and *odd*, with nothing that is known. `python tests/compile_kernels.py` prints a table;
`--json` one line for each compiled kernel, as `test_compile.py` reads it. Must not run under TRITON_INTERPRET.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

try:
    from triton.backends.compiler import AttrsDescriptor
except ImportError:
    AttrsDescriptor = None

from triton_instance_loss.ops import (  # noqa: E402
    BLOB,
    BY_INSTANCE,
    BY_MEAN,
    BY_SUM,
    CELLS,
    FALSE,
    GIVEN,
    HARD,
    NO_GRADIENT,
    NONE,
    NOT_FUSED,
    NUMBERS,
    OF_LOGARITHM,
    OF_MEAN,
    PROBABILITY,
    RAW,
    SIGMOID,
    TVERSKY,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# Sides of a volume, rows of its tables, outputs beyond them.
SHAPES = {"aligned": ((16, 32, 48), 32, 64), "odd": ((9, 41, 51), 21, 51)}
TYPES = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
# Sums: type of a, quantity, no_tp. Every quantity, and every type with the dearest one.
SUMS = [
    (torch.bool, 0, True),
    (torch.bool, 4, False),
    (torch.float32, 1, False),
    (torch.float32, 2, True),
    (torch.float32, 3, True),
    (torch.float32, 4, True),
    (torch.float64, 4, True),
]
# Activation: types of x and labels, activation, threshold, what the pixel term sees, its quantity. Every activation and
# pixel term, with the dearest types too.
ACTIVATIONS = [
    (torch.float32, torch.bool, SIGMOID, 0.5, PROBABILITY, 1),
    (torch.float32, torch.uint8, SIGMOID, 0.5, RAW, 2),
    (torch.float32, torch.float32, SIGMOID, 0.5, NOT_FUSED, 4),
    (torch.float32, torch.int32, NONE, 0.0, RAW, 3),
    (torch.float32, torch.int64, GIVEN, 0.3, HARD, 0),
    (torch.float64, torch.float64, SIGMOID, 0.3, RAW, 3),
    (torch.float64, torch.float64, SIGMOID, 0.3, HARD, 3),
    (torch.float64, torch.float64, NONE, 2.0, PROBABILITY, 2),
]
# Losses on regions: types of x and labels, activation, kind, its numbers. Every kind, each type with the dearest one.
REGIONS = [
    (torch.float32, torch.float32, SIGMOID, BLOB, [1.0, 1.0, 1e-5, 0.0]),
    (torch.float32, torch.uint8, SIGMOID, CELLS, [1.0, 1.0, 0.0, 0.5]),
    (torch.float32, torch.int64, NONE, CELLS, [1.0, 1.0, 0.0, 0.5]),
    (torch.float32, torch.bool, SIGMOID, TVERSKY, [0.3, 0.7, 1.0, 5.0, 0.1, 1e-5]),
    (torch.float32, torch.int32, NONE, FALSE, []),
    (torch.float64, torch.float64, SIGMOID, CELLS, [1.0, 1.0, 0.0, 0.5]),
    (torch.float64, torch.float32, NONE, CELLS, [1.0, 1.0, 0.0, 0.5]),
]


def rooms():
    """The modules of `kernels/`."""
    package = importlib.import_module("triton_instance_loss.kernels")  # wherever it is installed
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def kernels():
    """Names of all kernels. What is called from kernels is compiled with them, and by our rule not called a kernel."""
    return [
        f"{room}.{name}"
        for room, module in rooms().items()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    ]


def call_launchers(sides, capacity, rest):
    """Call each launcher with each kind of argument that changes what is compiled, on volumes of `sides`."""
    room = rooms()
    for depth in (sides[0], 1):
        shape = (2, depth, *sides[1:])
        mask = torch.zeros(shape, dtype=torch.bool)
        for rounds, min_size in ((0, 0), (3, 2)):
            room["components"].launch_find_instances(mask, rounds, min_size, capacity)
        room["components"].launch_number_instances(mask.long(), 0, capacity)
        geometry, counts = torch.zeros((4, capacity, 10), dtype=torch.int64), torch.zeros((3, 2), dtype=torch.int32)
        boxes = (geometry, counts, list(shape[1:]), [min(depth, 2), 2, 2])
        room["centers"].launch_center_volumes(*boxes)
        for reach, spacing in ((boxes[3], [1.0, 1.0, 1.0]), (boxes[3], None), (None, [1.0, 1.0, 1.0])):
            cleared, *_ = room["prepare"].prepare(*boxes[:2], 64, rest, boxes[2], reach, depth == 1, spacing)
        for spacing in ([1.0, 1.0, 1.0], [3.0, 1.0, 0.5]):
            room["cells"].launch_cells(mask.int(), spacing)
    sites = [torch.zeros(size, dtype=torch.int32) for size in ((4, *shape[1:]), (2, rest))]
    for dtype, quantity, no_tp in SUMS:
        x = torch.zeros(shape, dtype=torch.float32 if dtype == torch.bool else dtype)
        activation = SIGMOID if dtype == torch.bool else NONE
        case = (x, sites, counts, geometry, activation, quantity, no_tp, 64)
        *sums, pairs, touched = room["tables"].launch_sum_instances(*case)
    room["claims"].launch_unclaimed(x, sites, counts, geometry, 64)
    per_row, health = torch.zeros((4, capacity), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    owned, numbers = torch.zeros((4, capacity, 2), dtype=torch.int64), [0.0] * NUMBERS
    for given, *average in (
        ((None, None, None, None), BY_INSTANCE, False),
        ((None, None, None, per_row[:, :2]), BY_INSTANCE, False),
        ((owned, per_row, None, None), BY_MEAN, True),
        ((None, None, per_row, None), BY_SUM, True),
    ):
        case = (*sums, sums[1], health, counts, geometry, *given, numbers, 2, *average)
        _, _, *slopes = room["terms"].launch_terms(*case, (), x.dtype, cleared.finished)
    of_terms = per_row[0, :7]
    for *given, masses, values in (
        (of_terms, None, (), True, True),
        (None, health[0], (1.0,) * 7, True, True),
        (of_terms, None, (), False, False),
    ):
        _, *grads = room["terms_backward"].launch_terms_backward(*given, *slopes, pairs, counts, masses, values)
    for dtype, label_dtype, activation, threshold, *pixel in ACTIVATIONS:
        volumes = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=label_dtype)
        room["instances"].launch_find(
            *volumes, None, activation, threshold, *pixel, 0, 0, 50 * (dtype == torch.float32), 50.0, capacity, rest
        )
        room["instances"].launch_find(  # "as many as there are"
            *volumes, None, activation, threshold, *pixel, 0, 0, 2**40, 50.0, capacity, rest
        )
        room["instances"].launch_find(*volumes, None, activation, threshold, *pixel, 0, 2, 50, 50.0, capacity, rest)
        for quantity, no_tp, mistakes in ((4, True, OF_LOGARITHM), (3, False, OF_MEAN), (0, True, NO_GRADIENT)):
            case = (*volumes, sites, touched, counts, activation, quantity, no_tp, *pixel, mistakes)
            room["tables"].launch_sum_instances_backward(of_terms, slopes[0], *grads, *case)
    call_region_launchers(shape, capacity)
    wide = torch.zeros((1, 1, 3, 2**16), dtype=torch.int32)  # whose squares need 64 bits
    room["cells"].launch_cells(wide, [1.0, 1.0, 1.0])


def call_region_launchers(shape, capacity):
    """The same of losses on regions."""
    room = rooms()["regions"]
    rows, counts = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[:1], dtype=torch.int32)
    for dtype, label_dtype, activation, kind, numbers in REGIONS:
        volumes = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=label_dtype)
        chosen = torch.zeros((shape[0], capacity), dtype=torch.bool) if kind == FALSE else None
        for sides in (1, 2) if kind == CELLS else (1,):
            given = *volumes, rows.repeat(sides, 1, 1, 1)
            value, *kept = room.launch_region_loss(
                *given, counts.repeat(sides), chosen, activation, kind, numbers, 2, capacity
            )
            room.launch_region_loss_backward(value, *given, *kept, activation, kind)


def is_aligned(value):
    """Whether Triton would tell the compiler that a pointer or number is a multiple of 16."""
    if isinstance(value, torch.Tensor):  # itself, memory begins at more than that
        return value.storage_offset() * value.element_size() % 16 == 0
    return value % 16 == 0


def multiples_of_16(places):
    """That the arguments at some places are multiples of 16, as Triton notes it; up to 3.2 in an object."""
    if AttrsDescriptor is not None:
        return AttrsDescriptor.from_hints(dict.fromkeys(places, 16))
    return {(place,): [["tt.divisibility", 16]] for place in places}


def launches(alignment, warp_size=32):
    """What the launchers would launch: {(kernel, variant): (function, signature, constants, attributes, options)}."""
    noted = {}
    rooms()["blocks"].warp_size = lambda: warp_size

    def note(self, *args, grid, warmup=False, **options):
        signature, constants, multiples = {}, {}, []
        for place, (parameter, value) in enumerate(zip(self.params, args, strict=True)):
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                # (a launch makes constants of these, too)
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            else:
                signature[parameter.name] = parameter.annotation_type or "i32"
            if alignment == "aligned" and is_aligned(value):
                multiples.append(place)
        types = [kind[1:] for name, kind in signature.items() if name in ("a_ptr", "x_ptr", "labels_ptr")]
        variant = " ".join([*types, *(f"{name}={value}" for name, value in constants.items())])
        kernel = f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}"
        noted[kernel, variant] = self, signature, constants, multiples_of_16(multiples), options

    original, triton.JITFunction.run = triton.JITFunction.run, note
    try:
        with FakeTensorMode():
            call_launchers(*SHAPES[alignment])
    finally:
        triton.JITFunction.run = original
    return noted


def usage(assembly):
    """Registers a thread, and bytes of its stack and local memory, where spilled registers go.

    A stack that no instruction touches counts as none: LLVM at times leaves a byte behind.
    """
    if "amdgcn" in assembly:
        text, keys = assembly["amdgcn"], (r"\.vgpr_count", r"\.private_segment_fixed_size", r"\.vgpr_spill_count")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(assembly["cubin"])
            file.flush()
            text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
            if not re.search(r"\bSTACK:0\b", text):
                code = subprocess.check_output([CUOBJDUMP, "--dump-sass", file.name], text=True)
                if not re.search(r"\b(STL|LDL)\b", code):
                    text = re.sub(r"\bSTACK:\d+", "STACK:0", text)
        keys = r"\bREG", r"\bSTACK", r"\bLOCAL"
    numbers = (int(re.search(rf"{key}:\s*(\d+)", text)[1]) for key in keys)
    return dict(zip(("registers", "stack", "local"), numbers, strict=True))


def compile_for(target):
    """Compile every launch for one target."""
    # AMD's assembly will do: early Tritons have no linker of their own, and ask for the version of one.
    backends["amd"].compiler.make_hsaco = lambda self, *rest: b""
    os.environ["TRITON_HIP_LLD_PATH"] = sys.executable
    lines = []
    for alignment in SHAPES:
        noted = launches(alignment, TARGETS[target].warp_size)
        for (kernel, variant), (function, signature, constants, attributes, options) in noted.items():
            source = ASTSource(function, signature, constants, attributes)
            compiled = triton.compile(source, target=TARGETS[target], options=options)
            line = {"target": target, **usage(compiled.asm), "alignment": alignment}
            lines.append({**line, "kernel": kernel, "variant": variant})
    return lines


def main():
    """Compile for all targets, side by side, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    missing = set(kernels()) - {kernel for kernel, _ in launches("odd")}
    if missing:
        sys.exit(f"call_launchers() launches no {', '.join(sorted(missing))}: add a call to it.")
    with multiprocessing.get_context("spawn").Pool(min(2, len(options.targets))) as pool:
        lines = list(itertools.chain.from_iterable(pool.imap(compile_for, options.targets)))
    for line in lines:
        if options.json:
            print(json.dumps(line))
        else:
            usages = "{registers:4} registers {stack} stack {local} local".format(**line)
            print("{target:7} {0}  {alignment:7}  {kernel}  {variant}".format(usages, **line))


if __name__ == "__main__":
    main()
