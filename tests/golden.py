"""What the published code answered on 38 synthetic cases (tests/data), as tensors and losses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceLoss, TverskyLoss
from reference import TERMS, reference_components
from torch import Tensor

DATA = Path(__file__).parent / "data"
ARRAYS = np.load(DATA / "cases.npz")

CRITERIA = {
    "dice": DiceLoss(),
    "jaccard": DiceLoss(jaccard=True),
    "dice_squared": DiceLoss(squared_pred=True),
    "tversky": TverskyLoss(alpha=0.3, beta=0.7),
    "mse": torch.nn.MSELoss(),
    "bce": torch.nn.BCELoss(),
}


@dataclass
class GoldenCase:
    """One stored case; the losses are built by `options`, the volumes read by `tensors`."""

    name: str
    criterion: str
    label_components_given: bool
    arguments: dict[str, Any]
    values: dict[str, float]

    def options(self) -> dict[str, Any]:
        """Constructor arguments, losses included, that reproduce the published code."""
        return self.arguments | {
            "loss_function_pixel": DiceLoss(),
            "loss_function_instance": CRITERIA[self.criterion],
            "loss_function_center": DiceLoss(),
            "gradients": "reference",
        }

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs and labels in `dtype`, and the components of the labels as the case gave them, or None."""
        outputs = torch.from_numpy(ARRAYS[f"{self.name}/outputs"]).to(dtype)
        labels = torch.from_numpy(ARRAYS[f"{self.name}/labels"]).to(dtype)
        components = None
        if self.label_components_given:
            # The published code leaves out the plus one. No stored component ends at voxel 0.
            components = (reference_components(labels == 1) - 1).clamp(min=0)
        return outputs, labels, components

    def gradient(self, term: str) -> Tensor:
        """Published gradient of one term with respect to the outputs, float64; zero where none is stored."""
        key = f"{self.name}/grad_{term}"
        if key not in ARRAYS:
            return torch.zeros(ARRAYS[f"{self.name}/outputs"].shape, dtype=torch.float64)
        return torch.from_numpy(ARRAYS[key]).double()


CASES = [GoldenCase(**record) for record in json.loads((DATA / "cases.json").read_text())]

assert len(CASES) == 38
assert all(tuple(case.values) == TERMS for case in CASES)
