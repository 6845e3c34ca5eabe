"""Compare a segmentation with its ground truth, instance by instance: two NIfTI files in, terms and tables out.

python examples/inspect_nifti.py output.nii.gz label.nii.gz --png slices.png
"""

import argparse
import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from instance_picture import draw
from instance_report import Parser, Report, by_term, print_table, report, stdout_console, steps, terms_table
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from triton_instance_loss import InstanceLoss

# What an option is called here, and in the library.
OPTIONS = {
    "activation": "activation",
    "threshold": "segmentation_threshold",
    "iterations": "num_iterations",
    "max_outputs": "max_cc_out",
    "too_many": "mul_too_many",
    "min_size": "min_instance_size",
    "centroid_offset": "centroid_offset",
    "rates": "rate_instead_number",
}


class Problem(Exception):
    """Something that whoever called can put right; shown as one line."""


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The command line."""
    parser = Parser(description="Terms of the instance-level losses and a table of instances for two NIfTI files.")
    parser.add_argument("output", type=Path, help="segmentation: 0 and 1, probabilities, or logits; 2D or 3D")
    parser.add_argument("label", type=Path, help="ground truth of the same shape: 0 and 1")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the slices that show most instances")
    parser.add_argument("--activation", choices=("none", "sigmoid"), default="none", help="sigmoid for logits")
    parser.add_argument("--threshold", type=float, default=0.5, help="outputs of at least this are foreground (0.5)")
    parser.add_argument("--iterations", type=int, metavar="K", help="cut instances as K rounds of max-pooling do")
    parser.add_argument(
        "--max-outputs", type=int, default=4096, metavar="N", help="outputs used individually, 0 = all (4096)"
    )
    parser.add_argument(
        "--too-many", type=float, default=50, metavar="N", help="use none beyond N outputs a label (50)"
    )
    parser.add_argument("--min-size", type=int, default=0, metavar="N", help="drop instances of N voxels or fewer (0)")
    parser.add_argument("--centroid-offset", type=float, default=3, metavar="N", help="reach of the centre boxes (3)")
    parser.add_argument("--rates", action="store_true", help="false and missed instances as rates")
    return parser, parser.parse_args(arguments)


def read(path: Path, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The voxels of a NIfTI file, trailing axes of one voxel dropped until two are left, and its affine."""
    if not path.is_file():
        raise Problem(f"{name}: no file {path}")
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Pair):  # NIfTI-2 and single files are kinds of it
            raise Problem(f"{name}: {path} is not NIfTI but {type(image).__name__}")
        voxels = np.asarray(image.get_fdata(dtype=np.float64))
    except (ImageFileError, EOFError, zlib.error, OSError, ValueError, TypeError) as error:
        raise Problem(f"{name}: {path} is not a readable NIfTI file ({error})") from error
    shape = voxels.shape
    while voxels.ndim > 2 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim not in (2, 3) or voxels.size == 0:
        raise Problem(f"{name}: {path} must be 2D or 3D, got shape {shape}")
    wrong = int((~np.isfinite(voxels)).sum())
    if wrong:
        raise Problem(f"{name}: {path} must hold finite numbers, got NaN or infinity in {wrong} voxels")
    return voxels, image.affine


def check(output: NDArray[np.float64], label: NDArray[np.float64]) -> None:
    """The two fit each other, and the label is binary."""
    if output.shape != label.shape:
        raise Problem(f"output and label must have one shape, got {output.shape} and {label.shape}")
    other = np.unique(label[(label < -0.5) | (label > 1.5)])  # scaled by a header, 1 may be 0.9999999998
    if len(other):
        some = ", ".join(f"{value:g}" for value in other[:3]) + (", ..." if len(other) > 3 else "")
        raise Problem(f"label: only 0 (background) and 1 (foreground) are allowed, got {some}")


def make_loss(chosen: argparse.Namespace, spatial_dims: int) -> InstanceLoss:
    """The loss with the options of the command line; its errors name them as the command line does."""
    options = {theirs: getattr(chosen, ours) for ours, theirs in OPTIONS.items()}
    try:
        return InstanceLoss(spatial_dims=spatial_dims, gradients="reference", **options)
    except (ValueError, TypeError) as error:
        message = str(error)
        for ours, theirs in OPTIONS.items():
            message = message.replace(theirs, "--" + ours.replace("_", "-"))
        raise Problem(message) from error


def as_json(chosen: argparse.Namespace, terms: dict[str, float], found: Report) -> str:
    """Everything, as one JSON document."""
    document: dict[str, Any] = {
        "output": str(chosen.output),
        "label": str(chosen.label),
        "shape": list(found.labels.shape),
        "options": {ours: getattr(chosen, ours) for ours in OPTIONS},
        "terms": terms,
        "too_many": found.too_many,
        "instances": [asdict(one) for one in found.instances],
    }
    return json.dumps(document, indent=2)


def main(arguments: list[str] | None = None) -> None:
    """Read, check, compute, print, draw."""
    parser, chosen = parse(arguments)
    progress = steps()
    try:
        make_loss(chosen, 3)  # options first: files may be large
        if chosen.png and not chosen.png.absolute().parent.is_dir():
            raise Problem(f"--png: no folder {chosen.png.absolute().parent}")
        with progress:
            step = progress.add_task("reading")
            (output, affine), (label, label_affine) = read(chosen.output, "output"), read(chosen.label, "label")
            check(output, label)
            progress.update(step, description="computing the terms")
            loss = make_loss(chosen, output.ndim)
            outputs, labels = torch.from_numpy(output)[None, None], torch.from_numpy(label)[None, None]
            with torch.no_grad():
                terms = by_term(loss(outputs, labels))
            progress.update(step, description="listing the instances")
            found = report(outputs, labels, loss)
            if chosen.png:
                progress.update(step, description="drawing")
                draw(chosen.png, found, title=f"{chosen.output.name} against {chosen.label.name}")
    except Problem as problem:
        parser.error(str(problem))
    except OSError as error:
        parser.error(f"--png: {error}")
    if not np.allclose(affine, label_affine, atol=1e-3):
        print(f"{parser.prog}: warning: the affines differ; voxels are compared by their index", file=sys.stderr)
    if chosen.json:
        print(as_json(chosen, terms, found))
    else:
        print_table(stdout_console(), terms_table({"value": terms}), found)


if __name__ == "__main__":
    main()
