"""Instance-level losses for segmenting many small objects in 2D and 3D medical images, on Triton kernels."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout that is not installed: the kernels are the folder beside this package.
    __path__.append(str(Path(__file__).parent.parent))

from . import metrics as metrics
from .component_losses import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss
from .components import connected_components
from .losses import InstanceCenterLoss, InstanceLoss, WeightedSum

__all__ = [
    "BlobLoss",
    "CCLoss",
    "ComponentTverskyLoss",
    "FalseComponentLoss",
    "InstanceCenterLoss",
    "InstanceLoss",
    "WeightedSum",
    "connected_components",
]
__version__ = "0.1.0"
