"""The options of the family: their defaults, and what each may be."""

import dataclasses
import math
from dataclasses import dataclass

from . import checks


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options but the three criteria, checked; `dataclasses.replace` gives a changed and checked copy.

    The public classes say what each means (`InstanceLoss`). Names and defaults are the published ones, except
    `num_iterations` (whole components), `centroid_offset` (the documented 3) and `gradients`, which is ours.
    """

    activation: str = "sigmoid"
    num_out_chn: int = 1
    object_chn: int = 1
    spatial_dims: int = 3
    reduce_segmentation: str = "mean"
    instance_wise_reduce: str = "instance"
    num_iterations: int | None = None
    segmentation_threshold: float = 0.5
    max_cc_out: int = 50
    mul_too_many: float = 50
    min_instance_size: int = 0
    centroid_offset: float = 3
    smoother: float = 1e-7
    instance_wise_loss_no_tp: bool = True
    rate_instead_number: bool = False
    gradients: str = "surrogate"

    def __post_init__(self) -> None:
        checks.choice("activation", self.activation, ("sigmoid", "softmax", "none"))
        checks.choice("reduce_segmentation", self.reduce_segmentation, ("mean", "sum"))
        checks.choice("instance_wise_reduce", self.instance_wise_reduce, ("instance", "data"))
        checks.choice("gradients", self.gradients, ("surrogate", "reference"))
        checks.integer("num_out_chn", self.num_out_chn, 2 if self.activation == "softmax" else 1)
        checks.integer("object_chn", self.object_chn, 0)
        if self.num_out_chn > 1 and self.object_chn >= self.num_out_chn:
            raise ValueError(
                f"object_chn must be a channel from 0 to {self.num_out_chn - 1} (num_out_chn={self.num_out_chn}), "
                f"got {self.object_chn!r}."
            )
        checks.integer("spatial_dims", self.spatial_dims, 2)
        if self.spatial_dims > 3:
            raise ValueError(f"spatial_dims must be 2 or 3, got {self.spatial_dims!r}.")
        if self.num_iterations is not None:
            checks.integer("num_iterations", self.num_iterations, 1)
        most = math.inf if self.activation == "none" else 1.0  # activated outputs are 0 or 1
        checks.number("segmentation_threshold", self.segmentation_threshold, maximum=most)
        checks.integer("max_cc_out", self.max_cc_out, 0)
        checks.number("mul_too_many", self.mul_too_many, 0)
        checks.integer("min_instance_size", self.min_instance_size, 0)
        checks.number("centroid_offset", self.centroid_offset, 0)
        checks.number("smoother", self.smoother, 0, above_minimum=True)
        checks.flag("instance_wise_loss_no_tp", self.instance_wise_loss_no_tp)
        checks.flag("rate_instead_number", self.rate_instead_number)

    @property
    def channel(self) -> int:
        """The channel of `outputs` that is looked at, counted from 0."""
        return self.object_chn if self.num_out_chn > 1 else 0

    @property
    def hard(self) -> bool:
        """Whether the activated output is 0 or 1."""
        return self.activation != "none"

    @property
    def surrogate(self) -> bool:
        """Whether every term has a gradient."""
        return self.gradients == "surrogate"


NAMES = tuple(field.name for field in dataclasses.fields(Options))
