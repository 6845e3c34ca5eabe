"""The seven terms on a drawn 3D patch: their values, their gradients, and which lesion was found by what.

python examples/quickstart.py --out quickstart.png
"""

from pathlib import Path

import numpy as np
import torch
from instance_picture import draw
from instance_report import Parser, by_term, print_table, report, stdout_console, steps, terms_table
from numpy.typing import NDArray

from triton_instance_loss import InstanceLoss

try:
    from monai.losses import DiceLoss
except ImportError:  # MONAI is only shown beside the default criterion
    DiceLoss = None

RADII = (8, 6, 5, 4, 3, 3, 2, 2, 1, 1)


def drawn_patch(size: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and labels (size, size, size): lesions of radius 1 to 8; some found, some missed, some invented.

    The largest lesion is found in two pieces. Every third of the others is missed; what is found is shifted and of
    another size. Three outputs are invented.
    """
    generator = np.random.default_rng(seed)
    at = np.indices((size, size, size), dtype=np.float32)
    distance = np.full((size, size, size), np.float32(size))  # to the surface of the nearest output, negative inside
    labels = np.zeros_like(distance)
    taken: list[tuple[NDArray[np.float64], float]] = []

    def place(radius: float) -> NDArray[np.float64] | None:
        for _ in range(200):
            center = generator.uniform(radius + 1, size - radius - 2, 3)
            if all(np.linalg.norm(center - other) > 1.3 * (radius + far) + 2 for other, far in taken):
                taken.append((center, radius))
                return center
        return None  # the patch is full

    def from_surface(center: NDArray[np.float64], radius: float) -> NDArray[np.float32]:
        surface: NDArray[np.float32] = np.sqrt(((at - center.reshape(3, 1, 1, 1)) ** 2).sum(0)) - radius
        return surface

    radii = [radius for radius in RADII if 4 * radius < size]
    for number, radius in enumerate(radii):
        center = place(radius)
        if center is None:
            continue
        center = center.round()
        labels[from_surface(center, radius) <= 0] = 1
        if number == 0:
            for side in (-0.55, 0.55):
                half = from_surface(center + np.array((side * radius, 0, 0)), 0.4 * radius)
                np.minimum(distance, half, out=distance)
        elif number % 3:
            shift = generator.uniform(-0.35, 0.35, 3) * radius
            np.minimum(distance, from_surface(center + shift, radius * generator.uniform(0.85, 1.2)), out=distance)
    for radius in radii[-3:]:
        center = place(radius)
        if center is not None:
            np.minimum(distance, from_surface(center.round(), radius), out=distance)
    noise = generator.normal(scale=0.2, size=distance.shape)
    return np.clip(0.5 - 2 * distance, -6, 6) + noise.astype(np.float32), labels


def gradient_norms(loss: InstanceLoss, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The norm of the gradient of each term with respect to the outputs."""
    outputs = outputs.detach().requires_grad_()
    norms = {}
    for name, value in loss(outputs, labels)._asdict().items():
        gradient = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)[0]
        norms[name] = 0.0 if gradient is None else gradient.norm().item()
    return norms


def main(arguments: list[str] | None = None) -> None:
    """Draw a patch, evaluate the terms, print and draw what was found."""
    parser = Parser(description="The seven terms of InstanceLoss on a drawn 3D patch.")
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis, at least 16 (64)")
    parser.add_argument("--seed", type=int, default=0, help="another patch for each seed (0)")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the picture (quickstart.png)")
    chosen = parser.parse_args(arguments)
    if chosen.size < 16:
        parser.error(f"--size must be at least 16, got {chosen.size}")
    if chosen.seed < 0:
        parser.error(f"--seed must be at least 0, got {chosen.seed}")
    if not chosen.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {chosen.out.absolute().parent}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = stdout_console()
    progress = steps()
    with progress:
        step = progress.add_task("drawing lesions")
        logits, truth = drawn_patch(chosen.size, chosen.seed)
        outputs = torch.from_numpy(logits)[None, None].to(device)
        labels = torch.from_numpy(truth)[None, None].to(device)

        progress.update(step, description="evaluating the terms")
        loss = InstanceLoss()  # on logits: the activation is "sigmoid"
        columns = {"value": by_term(loss(outputs, labels))}
        if DiceLoss is not None:
            # The pixel criterion sees the logits themselves, the other two what the activation made of them.
            monai = InstanceLoss(DiceLoss(sigmoid=True), DiceLoss(), DiceLoss())
            columns["MONAI DiceLoss"] = by_term(monai(outputs, labels))
        columns["gradient norm"] = gradient_norms(loss, outputs, labels)
        columns["as published"] = gradient_norms(InstanceLoss(gradients="reference"), outputs, labels)

        progress.update(step, description="listing the instances")
        found = report(outputs, labels, loss)
        progress.update(step, description="drawing")
        try:
            draw(chosen.out, found, title="Labels are outlines, outputs are areas")
        except OSError as error:
            progress.stop()
            parser.error(f"--out: {error}")

    norms = {"gradient norm": ".2e", "as published": ".2e"}
    print_table(console, terms_table(columns, norms), found)
    console.print('"gradient norm" is with respect to the outputs; "as published" is that with gradients="reference".')
    console.print(f"On {device}; picture: {chosen.out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
