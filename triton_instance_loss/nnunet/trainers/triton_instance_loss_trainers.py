"""What nnU-Net finds in this folder. It imports each file here by its bare name, and forgets it afterwards."""

from triton_instance_loss.nnunet.trainer import (
    nnUNetTrainerInstanceCenterLoss,
    nnUNetTrainerInstanceCenterLossAllLevels,
    nnUNetTrainerInstanceLoss,
    nnUNetTrainerInstanceLossAllLevels,
)

__all__ = [
    "nnUNetTrainerInstanceCenterLoss",
    "nnUNetTrainerInstanceCenterLossAllLevels",
    "nnUNetTrainerInstanceLoss",
    "nnUNetTrainerInstanceLossAllLevels",
]
