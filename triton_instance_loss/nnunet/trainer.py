"""The trainers; this file needs nnU-Net. `WithInstanceLoss` makes one of any trainer."""

from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from ..component_losses import BlobLoss, CCLoss, ComponentLoss
from ..losses import Family, InstanceCenterLoss, InstanceLoss
from .loss import OneAgainstTheRest, WithInstanceTerms


class WithInstanceLoss(nnUNetTrainer):  # type: ignore[misc]
    """A mixin: nnU-Net's trainer, or yours, with a loss of instances added to its own loss.

    Written first, `class Mine(WithInstanceLoss, nnUNetTrainerDA5): ...`, it adds to the loss of the trainer behind it.
    The mean of each term over the steps of an epoch, those of weight 0 left out, goes to the training log and to
    loggers of experiments; with several GPUs it is that of the first.

    Attributes:
        instance_loss: the class of the loss: `InstanceLoss`, `InstanceCenterLoss`, `BlobLoss`, `CCLoss`,
            `ComponentTverskyLoss` or `FalseComponentLoss`.
        instance_options: further arguments of it.
        instance_weight: what it is multiplied by, at least 0.
        instance_ramp_epochs: that weight grows linearly from 0 in the first epoch to all of it after so many; with 0 it
            is there from the start.
        instance_all_levels: look at every output of deep supervision, with the weights of nnU-Net's own loss; False:
            at the full resolution only.
        instance_spacing: give the loss the size of a voxel in mm, from the plans, and at coarser levels the size of
            theirs; False: voxels count as if they were cubes. `CCLoss`, `InstanceLoss` and `InstanceCenterLoss` have
            such an argument.
        weight_instance_label, weight_instance_output, weight_center, weight_false_instances, weight_missed_instances,
        weight_proximity: the weight of each term of `InstanceLoss` and `InstanceCenterLoss`; false and missed instances
            are rates, and proximity, a square of sums that can pass 1000 in the first epochs, has a small weight.
    """

    instance_loss: ClassVar[type[Family] | type[ComponentLoss]] = InstanceLoss
    instance_options: ClassVar[dict[str, Any]] = {}
    instance_weight = 1.0
    instance_ramp_epochs = 50
    instance_all_levels = False
    instance_spacing = False
    weight_instance_label = 0.5
    weight_instance_output = 0.5
    weight_center = 0.25
    weight_false_instances = 0.25
    weight_missed_instances = 0.25
    weight_proximity = 0.001

    def _build_loss(self) -> WithInstanceTerms:
        own = super()._build_loss()
        if not (self.instance_all_levels and self.enable_deep_supervision):
            return WithInstanceTerms(own, self._instance_loss_of([1.0] * len(self.configuration_manager.patch_size)))
        full, *coarser = [self._instance_loss_of(scales) for scales in self._get_deep_supervision_scales()]
        return WithInstanceTerms(own, full, own.weight_factors, coarser if self.instance_spacing else ())

    def _instance_loss_of(self, scales: list[float]) -> OneAgainstTheRest:
        """The loss of a level, which has so many voxels along each axis for one of the full resolution."""
        options = dict(self.instance_options)
        if self.instance_spacing:
            full = self.configuration_manager.spacing
            options["spacing"] = [step / scale for step, scale in zip(full, scales, strict=True)]
        weights = None
        if issubclass(self.instance_loss, Family):
            names = [name for name in self.instance_loss.terms._fields if name != "pixel"]
            weights = {name: getattr(self, f"weight_{name}") for name in names}
        return OneAgainstTheRest(
            self.instance_loss,
            spatial_dims=len(self.configuration_manager.patch_size),
            num_channels=self.label_manager.num_segmentation_heads,
            regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            weights=weights,
            **options,
        )

    def on_train_epoch_start(self) -> None:
        """Set the factor of the epoch."""
        super().on_train_epoch_start()
        ramp = 1.0
        if self.current_epoch < self.instance_ramp_epochs:
            ramp = self.current_epoch / self.instance_ramp_epochs
        self.loss.factor = self.instance_weight * ramp
        self.print_to_log_file(f"Factor of the instance terms: {self.loss.factor:.4f}")
        self._terms_of_steps: list[dict[str, Tensor]] = []

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A step; its terms are kept on the device."""
        result: dict[str, Any] = super().train_step(batch)
        self._terms_of_steps.append(self.loss.instance.terms)
        return result

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the terms of the training steps."""
        super().on_train_epoch_end(train_outputs)
        self._log_terms("train")

    def on_validation_epoch_start(self) -> None:
        """Forget the terms of the training steps."""
        super().on_validation_epoch_start()
        self._terms_of_steps = []

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A step without gradients; its terms are kept on the device."""
        result: dict[str, Any] = super().validation_step(batch)
        self._terms_of_steps.append(self.loss.instance.terms)
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the terms of the validation steps."""
        super().on_validation_epoch_end(val_outputs)
        self._log_terms("val")

    def _log_terms(self, steps: str) -> None:
        names = list(self._terms_of_steps[0])
        if not names:  # all weights are 0
            return
        table = torch.stack([torch.stack(list(terms.values())) for terms in self._terms_of_steps])
        means = dict(zip(names, table.mean(dim=0).tolist(), strict=True))
        self.print_to_log_file(f"{steps}_terms", {name: round(mean, 4) for name, mean in means.items()})
        for logger in self.logger.loggers:
            for name, mean in means.items():
                logger.log(f"{steps}_terms/{name}", mean, self.current_epoch)


class nnUNetTrainerInstanceLoss(WithInstanceLoss):
    """The terms of `InstanceLoss`, on the full-resolution output."""


class nnUNetTrainerInstanceCenterLoss(WithInstanceLoss):
    """The terms of `InstanceCenterLoss`: without proximity."""

    instance_loss = InstanceCenterLoss


class nnUNetTrainerBlobLoss(WithInstanceLoss):
    """Blob loss, Dice and cross entropy, at half the weight of nnU-Net's own loss, as its authors weigh the two."""

    instance_loss = BlobLoss
    instance_weight = 0.5


class nnUNetTrainerCCLoss(WithInstanceLoss):
    """CC-DiceCE, in cells that are nearest in mm."""

    instance_loss = CCLoss
    instance_spacing = True


class nnUNetTrainerBiCCLoss(nnUNetTrainerCCLoss):
    """BiCC: CC-DiceCE in the cells of labels and in those of outputs."""

    instance_options: ClassVar[dict[str, Any]] = {"alpha": 0.5}


class nnUNetTrainerInstanceLossAllLevels(nnUNetTrainerInstanceLoss):
    """The same on every output of deep supervision."""

    instance_all_levels = True


class nnUNetTrainerInstanceCenterLossAllLevels(nnUNetTrainerInstanceCenterLoss):
    """The same on every output of deep supervision."""

    instance_all_levels = True


class nnUNetTrainerBlobLossAllLevels(nnUNetTrainerBlobLoss):
    """The same on every output of deep supervision."""

    instance_all_levels = True


class nnUNetTrainerCCLossAllLevels(nnUNetTrainerCCLoss):
    """The same on every output of deep supervision."""

    instance_all_levels = True


class nnUNetTrainerBiCCLossAllLevels(nnUNetTrainerBiCCLoss):
    """The same on every output of deep supervision."""

    instance_all_levels = True
