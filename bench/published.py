"""The published code, from a checkout that the user names; nothing of it is kept here."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace


def load(checkout: str) -> SimpleNamespace:
    """Its `InstanceLoss` and `connected_components`; it wants MONAI and nibabel.

    Raises:
        FileNotFoundError: `checkout` does not hold `losses/InstanceLoss.py`.
        ImportError: something it imports is missing.
    """
    root = Path(checkout).resolve()
    if not (root / "losses" / "InstanceLoss.py").is_file():
        raise FileNotFoundError(
            f"--reference must name a checkout that holds losses/InstanceLoss.py, got {checkout!r}."
        )
    sys.path.insert(0, str(root))
    try:
        loss = importlib.import_module("losses.InstanceLoss")
        tools = importlib.import_module("losses.tools")
    finally:
        sys.path.remove(str(root))
    return SimpleNamespace(InstanceLoss=loss.InstanceLoss, connected_components=tools.connected_components)
