"""Rules that hold for the package as a whole: what importing costs, who imports whom, and that words are kept."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triton_instance_loss
from triton_instance_loss import dispatch, functional, ops

PACKAGE = Path(triton_instance_loss.__file__).parent
ROOT = Path(__file__).parents[1]
# Imports point down this list.
ORDER = [
    "nnunet",
    "combined",
    "ici_losses",
    "losses",
    "component_losses",
    "functional",
    "torchmetrics",
    "plot",
    "table",
    "regions",
    "metrics",
    "matching",
    "slow",
    "terms",
    "criteria",
    "instances",
    "components",
    "activation",
    "cpu",
    "ops",
    "dispatch",
    "options",
    "quantities",
    "checks",
]


def python(code, **environment):
    """Run `code` in a fresh interpreter; what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_nothing_heavy():
    loaded = python(
        "import sys, triton_instance_loss, triton_instance_loss.functional, triton_instance_loss.nnunet\n"
        "import triton_instance_loss.table\n"
        "heavy = ('triton', 'monai', 'nnunetv2', 'numba', 'scipy', 'matplotlib', 'torchmetrics')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_import_takes_no_longer_than_torch():
    seconds = python(
        "import time\n"
        "start = time.perf_counter(); import torch; middle = time.perf_counter()\n"
        "import triton_instance_loss; end = time.perf_counter()\n"
        "print(middle - start, end - middle)"
    )
    torch_alone, ours = map(float, seconds.split())
    assert ours < torch_alone


def test_cpu_way_works_without_triton():
    printed = python(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from triton_instance_loss import InstanceLoss\n"
        "outputs = torch.randn(1, 1, 8, 8, 8, requires_grad=True)\n"
        "sum(InstanceLoss()(outputs, (outputs > 1).float())).backward()\n"
        "print(outputs.grad.shape)",
        TRITON_INSTANCE_LOSS_BACKEND="",
    )
    assert "[1, 1, 8, 8, 8]" in printed


def test_cpu_way_works_where_nothing_can_be_kept():
    """No folder for what Numba compiles: it compiles in each process."""
    printed = python(
        "import torch\n"
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from triton_instance_loss import connected_components\n"
        "print(connected_components(torch.tensor([[[[1, 1, 0, 1]]]])).tolist())",
        TRITON_INSTANCE_LOSS_BACKEND="",
    )
    assert "[[[[2, 2, 0, 4]]]]" in printed


def imported_rooms(path):
    """Rooms of the package that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and path.parent != PACKAGE:
            continue  # within a room that is a folder
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            rooms.update(names)
        elif isinstance(node, ast.Import):
            rooms.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            rooms.add(node.module.split(".")[0])
    return rooms


def files_of(room):
    path = PACKAGE / room
    return sorted(path.glob("*.py")) if path.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_down(room):
    above = set(ORDER[: ORDER.index(room)])
    for path in files_of(room):
        assert not imported_rooms(path) & above, path.name


def test_only_kernels_import_triton():
    for path in PACKAGE.rglob("*.py"):
        if "kernels" not in path.parts:
            assert "triton" not in imported_rooms(path), path.name


def test_only_the_trainers_import_nnunet():
    importing = [path.name for path in PACKAGE.rglob("*.py") if "nnunetv2" in imported_rooms(path)]
    assert importing == ["trainer.py"]


@pytest.mark.parametrize(("library", "room"), [("torchmetrics", "torchmetrics.py"), ("matplotlib", "plot.py")])
def test_one_room_imports(library, room):
    importing = [path.name for path in PACKAGE.rglob("*.py") if library in imported_rooms(path)]
    assert importing == [room]


def kernel_files():
    folder = ROOT / "kernels" if (ROOT / "kernels").is_dir() else PACKAGE / "kernels"
    return {path.stem: path for path in folder.glob("*.py")}


def test_kernels_and_cpu_do_not_know_each_other():
    for path in files_of("cpu"):
        assert "kernels" not in imported_rooms(path), path.name
    for path in kernel_files().values():
        assert "cpu" not in imported_rooms(path), path.name


def test_kernels_folder_is_no_package():
    assert "__init__" not in kernel_files()


@pytest.mark.parametrize("name", list(ops._SCHEMAS))
def test_each_operator_has_both_backends_in_one_room(name):
    room = dispatch.ROOMS[name]
    assert f"def {name}(" in (PACKAGE / "cpu" / f"{room}.py").read_text()
    assert f"def launch_{name}(" in kernel_files()[room].read_text()


def test_public_names():
    assert set(triton_instance_loss.__all__) == {
        "BlobLoss",
        "CCLoss",
        "CombinedLoss",
        "ComponentTverskyLoss",
        "FalseComponentLoss",
        "ICILoss",
        "InstanceLoss",
        "InstanceCenterLoss",
        "WeightedSum",
        "connected_components",
        "dICILoss",
    }
    assert (PACKAGE / "py.typed").exists()


def test_one_version_everywhere():
    places = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## (\S+)",
    }
    for file, line in places.items():
        assert re.search(line, (ROOT / file).read_text(), re.M).group(1) == triton_instance_loss.__version__


def test_public_names_are_on_the_api_page():
    page = (ROOT / "docs" / "api.rst").read_text()
    functions = [name for name, value in vars(functional).items() if name.endswith("_loss") and callable(value)]
    assert len(functions) == 4
    metrics = ("instance_metrics", "average_precision", "aggregated_jaccard_index", "instance_table", "draw_instances")
    others = ("InstanceMetric", "register_criterion")
    for name in (*triton_instance_loss.__all__, *functions, *metrics, *others):
        assert re.search(rf"\b{name}\b", page), name
