"""What the files for upload hold: `python tests/distributions.py dist/*` fails where anything is missing or too much.

A wheel holds the package, its kernels among it, and nothing else; an sdist what a wheel is built from, the license and
the README. And all names of the version agree.
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def sources() -> set[str]:
    """Files of the package as a wheel has them."""
    package, kernels = ROOT / "triton_instance_loss", ROOT / "kernels"
    found = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"triton_instance_loss/py.typed"}
    return found | {f"triton_instance_loss/kernels/{path.name}" for path in kernels.glob("*.py")}


def check_wheel(path: Path) -> None:
    """The package, and what tells pip about it."""
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    assert names == sources(), f"{path.name} differs: {sorted(names ^ sources())}"


def check_sdist(path: Path) -> None:
    """The sources, and no tests, documents or results."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
    wanted = {re.sub("^triton_instance_loss/kernels/", "kernels/", name) for name in sources()}
    wanted |= {"LICENSE", "README.md", "pyproject.toml"}
    assert wanted <= names, f"{path.name} lacks {sorted(wanted - names)}"
    known = {"triton_instance_loss", "kernels", "triton_instance_loss.egg-info", "PKG-INFO", "setup.cfg", "MANIFEST.in"}
    others = {name.partition("/")[0] for name in names} - known - wanted
    assert not others, f"{path.name} holds {sorted(others)} too"


def check_versions(paths: list[Path]) -> None:
    """One version everywhere."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = {
        "triton_instance_loss/__init__.py": f'__version__ = "{version}"',
        "CITATION.cff": f"\nversion: {version}\n",
        "CHANGELOG.md": f"\n## {version} (",
    }
    for name, text in places.items():
        assert text in (ROOT / name).read_text(), f"{name} does not say {version}"
    assert all(f"-{version}" in path.name for path in paths), f"{[path.name for path in paths]} are not of {version}"


def main() -> None:
    """Check the files that are named."""
    paths = [Path(name) for name in sys.argv[1:]]
    wheels, sdists = ([path for path in paths if path.name.endswith(end)] for end in (".whl", ".tar.gz"))
    assert len(wheels) == len(sdists) == 1, f"one wheel and one sdist, got {[path.name for path in paths]}"
    check_versions(paths)
    check_wheel(wheels[0])
    check_sdist(sdists[0])
    print(f"{wheels[0].name} and {sdists[0].name} hold what they should.")


if __name__ == "__main__":
    main()
