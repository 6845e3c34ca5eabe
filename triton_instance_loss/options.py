"""The options of the family: their defaults, and what each may be."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import checks


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options but the three criteria, checked; `dataclasses.replace` gives a changed and checked copy.

    The public classes say what each means (`InstanceLoss`). Names and defaults are the published ones, except
    `num_iterations` (whole components), `centroid_offset` (the documented 3), `max_cc_out` (50, which images of many
    objects exceed) and the last five, which are ours.
    """

    activation: str = "sigmoid"
    num_out_chn: int = 1
    object_chn: int | Sequence[int] = 1
    spatial_dims: int = 3
    reduce_segmentation: str = "mean"
    instance_wise_reduce: str = "instance"
    num_iterations: int | None = None
    segmentation_threshold: float | None = None
    max_cc_out: int = 4096
    mul_too_many: float = 50
    min_instance_size: int = 0
    centroid_offset: float = 3
    smoother: float = 1e-7
    instance_wise_loss_no_tp: bool = True
    rate_instead_number: bool = False
    gradients: str = "surrogate"
    to_onehot_y: bool = False
    ignore_index: float | None = None
    process_group: Any = None
    spacing: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            object.__setattr__(self, name, checks.plain(getattr(self, name)))
        checks.choice("activation", self.activation, ("sigmoid", "softmax", "none"))
        checks.choice("reduce_segmentation", self.reduce_segmentation, ("mean", "sum"))
        checks.choice("instance_wise_reduce", self.instance_wise_reduce, ("instance", "data"))
        checks.choice("gradients", self.gradients, ("surrogate", "log", "reference"))
        checks.integer("num_out_chn", self.num_out_chn, 2 if self.activation == "softmax" else 1)
        checks.channels("object_chn", self.object_chn, self.num_out_chn)
        checks.integer("spatial_dims", self.spatial_dims, 2)
        if self.spatial_dims > 3:
            raise ValueError(f"spatial_dims must be 2 or 3, got {self.spatial_dims!r}.")
        if self.num_iterations is not None:
            checks.integer("num_iterations", self.num_iterations, 1)
        if self.segmentation_threshold is not None:
            most = math.inf if self.activation == "none" else 1.0  # probabilities are at most 1
            checks.number("segmentation_threshold", self.segmentation_threshold, maximum=most)
        checks.integer("max_cc_out", self.max_cc_out, 0)
        checks.number("mul_too_many", self.mul_too_many, 0)
        checks.integer("min_instance_size", self.min_instance_size, 0)
        checks.number("centroid_offset", self.centroid_offset, 0)
        checks.number("smoother", self.smoother, 0, above_minimum=True)
        checks.flag("instance_wise_loss_no_tp", self.instance_wise_loss_no_tp)
        checks.flag("rate_instead_number", self.rate_instead_number)
        checks.flag("to_onehot_y", self.to_onehot_y)
        if self.ignore_index is not None:
            checks.number("ignore_index", self.ignore_index)
            foreground = self.classes if self.to_onehot_y else (1,)
            if self.ignore_index in foreground:
                raise ValueError(
                    f"ignore_index must not be a label of foreground, {foreground}, got {self.ignore_index!r}."
                )
            if self.ignore_index == 0 and not self.to_onehot_y:
                raise ValueError(
                    f"ignore_index must not be the background of labels that are 0 and 1 (to_onehot_y=False), got "
                    f"{self.ignore_index!r}."
                )
            self.check_ignoring()
        checks.process_group("process_group", self.process_group)
        if self.spacing is not None:
            object.__setattr__(self, "spacing", checks.spacing("spacing", self.spacing, self.spatial_dims))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Options":
        return self  # nothing in it changes, and a process group has no copy

    def check_ignoring(self) -> None:
        """Voxels can be ignored only if there is a value that is background."""
        if self.hard and self.threshold <= 0:
            raise ValueError(
                "segmentation_threshold must be above 0 where voxels are ignored, as any probability reaches it, "
                f"got {self.segmentation_threshold!r}."
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that are looked at, one against the rest."""
        return (self.object_chn,) if isinstance(self.object_chn, int) else tuple(self.object_chn)

    @property
    def channels(self) -> tuple[int, ...]:
        """Their channels in `outputs`, counted from 0."""
        return self.classes if self.num_out_chn > 1 else (0,)

    @property
    def threshold(self) -> float:
        """What an activated output is at least that is foreground."""
        if self.segmentation_threshold is not None:
            return float(self.segmentation_threshold)
        return 1.0 / self.num_out_chn if self.activation == "softmax" else 0.5

    @property
    def hard(self) -> bool:
        """Whether the activated output is 0 or 1."""
        return self.activation != "none"

    @property
    def surrogate(self) -> bool:
        """Whether every term has a gradient."""
        return self.gradients != "reference"


def of_volume(spacing: Sequence[float] | None, spatial_dims: int) -> tuple[float, ...]:
    """The size of a voxel of a volume along D, H and W; an image comes as a volume of one plane."""
    steps = (1.0,) * spatial_dims if spacing is None else tuple(spacing)
    return (1.0,) * (3 - spatial_dims) + steps


NAMES = tuple(field.name for field in dataclasses.fields(Options))
