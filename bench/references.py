"""Authors' code, from checkouts that the user names; nothing of it is kept here."""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _import_from(root: Path, *names: str) -> list[Any]:
    sys.path.insert(0, str(root))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(root))


def _instance_loss(root: Path) -> SimpleNamespace:
    """`InstanceLoss` and `connected_components` of the family's authors; they want MONAI and nibabel."""
    loss, tools = _import_from(root, "losses.InstanceLoss", "losses.tools")
    return SimpleNamespace(InstanceLoss=loss.InstanceLoss, connected_components=tools.connected_components)


def _blob_loss(root: Path) -> SimpleNamespace:
    """`compute_loss` of the authors of blob loss."""
    (module,) = _import_from(root, "blob_loss")
    return SimpleNamespace(compute_loss=module.compute_loss)


# For each name a file that a checkout holds, and what is taken of it.
KNOWN: dict[str, tuple[str, Callable[[Path], SimpleNamespace]]] = {
    "instance_loss": ("losses/InstanceLoss.py", _instance_loss),
    "blob_loss": ("blob_loss.py", _blob_loss),
}


def load(given: Iterable[str]) -> dict[str, SimpleNamespace]:
    """Authors' code by name, of arguments NAME=CHECKOUT.

    Raises:
        ValueError: an argument is not of that form, or names code that is not known.
        FileNotFoundError: a checkout does not hold what it should.
        ImportError: something that the code imports is missing.
    """
    references = {}
    for argument in given:
        name, equals, checkout = argument.partition("=")
        if not equals or name not in KNOWN:
            known = ", ".join(f"{each}=CHECKOUT" for each in KNOWN)
            raise ValueError(f"--reference must be one of {known}, got {argument!r}.")
        file, take = KNOWN[name]
        root = Path(checkout).resolve()
        if not (root / file).is_file():
            raise FileNotFoundError(f"--reference {name}= must name a checkout that holds {file}, got {checkout!r}.")
        references[name] = take(root)
    return references
