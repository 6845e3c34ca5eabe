"""The trainers; this file needs nnU-Net. A trainer of yours may be a subclass with other class attributes."""

from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from ..losses import InstanceCenterLoss, InstanceLoss
from .loss import OneAgainstTheRest, WithInstanceTerms


class nnUNetTrainerInstanceLoss(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer with the terms of `InstanceLoss` added to its own loss, on the full-resolution output.

    The mean of each term over the steps of an epoch, those of weight 0 left out, goes to the training log and to
    loggers of experiments; with several GPUs it is that of the first.

    Attributes:
        instance_family: `InstanceLoss` or `InstanceCenterLoss`.
        instance_options: further options of it.
        instance_ramp_epochs: the terms are multiplied by a factor that grows linearly from 0 in the first epoch to 1
            after so many; with 0 it is 1 from the start.
        instance_all_levels: look at every output of deep supervision, with the weights of nnU-Net's own loss.
        weight_instance_label, weight_instance_output, weight_center, weight_false_instances, weight_missed_instances,
        weight_proximity: the weight of each term; false and missed instances are rates, and proximity, a square of
            sums that can pass 1000 in the first epochs, has a small weight.
    """

    instance_family: ClassVar[type[InstanceLoss] | type[InstanceCenterLoss]] = InstanceLoss
    instance_options: ClassVar[dict[str, Any]] = {}
    instance_ramp_epochs = 50
    instance_all_levels = False
    weight_instance_label = 0.5
    weight_instance_output = 0.5
    weight_center = 0.25
    weight_false_instances = 0.25
    weight_missed_instances = 0.25
    weight_proximity = 0.001

    def _build_loss(self) -> WithInstanceTerms:
        own = super()._build_loss()
        names = [name for name in self.instance_family.terms._fields if name != "pixel"]
        instance = OneAgainstTheRest(
            self.instance_family,
            spatial_dims=len(self.configuration_manager.patch_size),
            num_channels=self.label_manager.num_segmentation_heads,
            regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            weights={name: getattr(self, f"weight_{name}") for name in names},
            **self.instance_options,
        )
        all_levels = self.instance_all_levels and self.enable_deep_supervision
        return WithInstanceTerms(own, instance, own.weight_factors if all_levels else None)

    def on_train_epoch_start(self) -> None:
        """Set the factor of the epoch."""
        super().on_train_epoch_start()
        self.loss.factor = 1.0
        if self.current_epoch < self.instance_ramp_epochs:
            self.loss.factor = self.current_epoch / self.instance_ramp_epochs
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


class nnUNetTrainerInstanceCenterLoss(nnUNetTrainerInstanceLoss):
    """The same with the terms of `InstanceCenterLoss`: without proximity."""

    instance_family = InstanceCenterLoss


class nnUNetTrainerInstanceLossAllLevels(nnUNetTrainerInstanceLoss):
    """The terms of `InstanceLoss` on every output of deep supervision."""

    instance_all_levels = True


class nnUNetTrainerInstanceCenterLossAllLevels(nnUNetTrainerInstanceCenterLoss):
    """The terms of `InstanceCenterLoss` on every output of deep supervision."""

    instance_all_levels = True
