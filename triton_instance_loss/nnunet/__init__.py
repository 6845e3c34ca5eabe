"""Trainers for nnU-Net v2: its own Dice + CE, and the instance terms of every class or region.

nnU-Net finds them by the environment variable `nnUNet_extTrainer`, with the folder that
`python -m triton_instance_loss.nnunet` prints. `trainer` needs nnU-Net, `loss` does not.
"""

from pathlib import Path

TRAINERS_FOLDER = Path(__file__).parent / "trainers"
