"""What nnU-Net finds in this folder. It imports each file here by its bare name, and forgets it afterwards."""

from triton_instance_loss.nnunet.trainer import (
    nnUNetTrainerBiCCLoss,
    nnUNetTrainerBiCCLossAllLevels,
    nnUNetTrainerBlobLoss,
    nnUNetTrainerBlobLossAllLevels,
    nnUNetTrainerCCLoss,
    nnUNetTrainerCCLossAllLevels,
    nnUNetTrainerInstanceCenterLoss,
    nnUNetTrainerInstanceCenterLossAllLevels,
    nnUNetTrainerInstanceLoss,
    nnUNetTrainerInstanceLossAllLevels,
)

__all__ = [
    "nnUNetTrainerBiCCLoss",
    "nnUNetTrainerBiCCLossAllLevels",
    "nnUNetTrainerBlobLoss",
    "nnUNetTrainerBlobLossAllLevels",
    "nnUNetTrainerCCLoss",
    "nnUNetTrainerCCLossAllLevels",
    "nnUNetTrainerInstanceCenterLoss",
    "nnUNetTrainerInstanceCenterLossAllLevels",
    "nnUNetTrainerInstanceLoss",
    "nnUNetTrainerInstanceLossAllLevels",
]
