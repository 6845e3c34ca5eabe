"""Instance-level losses for segmenting many small objects in 2D and 3D medical images, on Triton kernels."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout that is not installed: the kernels are the folder beside this package.
    __path__.append(str(Path(__file__).parent.parent))

from . import metrics as metrics
from .combined import CombinedLoss
from .component_losses import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss
from .components import connected_components
from .ici_losses import ICILoss, dICILoss
from .losses import InstanceCenterLoss, InstanceLoss, WeightedSum

__all__ = [
    "BlobLoss",
    "CCLoss",
    "CombinedLoss",
    "ComponentTverskyLoss",
    "FalseComponentLoss",
    "ICILoss",
    "InstanceCenterLoss",
    "InstanceLoss",
    "WeightedSum",
    "connected_components",
    "dICILoss",
]
__version__ = "0.1.0"
