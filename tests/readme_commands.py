"""Run every command and every Python block of README.md as a newcomer would, in a fresh clone of this checkout.

`make demo` makes the environment that the rest runs in.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "make test": "the checks run it before anything else",
    "pip install .": "the checks build and install a wheel",
    'pip install ".[nnunet]"': "make test-nnunet runs this and the next two",
    "export nnUNet_extTrainer=$(python -m triton_instance_loss.nnunet)": "see above",
    "nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerInstanceLoss": "see above",
}
EXAMPLE_FILES = ("output-0.nii.gz", "label-0.nii.gz")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def provide_example_files(folder: Path) -> None:
    """Put the pair of files that the README speaks of into `folder`: the published one if given, else a drawn one."""
    given = os.environ.get("INSTANCE_LOSS_EXAMPLE")
    if given:
        for name in EXAMPLE_FILES:
            shutil.copy(Path(given) / name, folder / name)
        return
    import nibabel
    import numpy as np

    volume = np.zeros((24, 20, 22), dtype=np.uint8)
    volume[3:8, 4:9, 5:10] = 1
    for shift, name in enumerate(EXAMPLE_FILES):
        nibabel.save(nibabel.Nifti1Image(np.roll(volume, shift, 0), np.eye(4)), folder / name)


def run(command: list[str] | str, folder: Path) -> None:
    """Run one command in `folder`; stop everything if it fails."""
    shown = command if isinstance(command, str) else "the Python block"
    print(f"$ {shown}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}
    result = subprocess.run(command, shell=isinstance(command, str), cwd=folder, env=environment)
    if result.returncode:
        sys.exit(f"README.md: {shown!r} ended with {result.returncode}")


def main() -> None:
    """Run all of them."""
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if "VENV" in os.environ:  # an environment that has most of what is needed, afterwards it is the clone's
            (clone / ".venv").symlink_to(os.environ["VENV"])
        provide_example_files(clone)
        commands = [line for block in blocks("bash") for line in block.splitlines() if line and line[0] != "#"]
        for command in commands:
            if command in ELSEWHERE:
                print(f"$ {command}   # not here: {ELSEWHERE[command]}")
            else:
                run(command, clone)
        for block in blocks("python"):
            run([str(clone / ".venv/bin/python"), "-c", block], clone)
        print(f"README.md: {len(commands)} commands and {len(blocks('python'))} Python blocks work.")


if __name__ == "__main__":
    main()
