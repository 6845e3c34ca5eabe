"""Print the folder that nnU-Net is to look for trainers in."""

from . import TRAINERS_FOLDER

print(TRAINERS_FOLDER)
