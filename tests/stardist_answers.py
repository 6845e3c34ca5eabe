"""What StarDist's `matching` answered on 60 random label maps (tests/data/stardist.npz), and how it was asked.

`make test-stardist` asks StarDist itself whether these still are its answers, in an environment of its own, since it
brings scikit-image and more along. `test_matching.py` compares ours with them.
`python tests/stardist_answers.py --store` makes the file anew.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "data" / "stardist.npz"
SHAPE = (60, 48, 56)
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Of each threshold: counts, the 2018 Data Science Bowl's average precision, which it calls accuracy, and PQ and SQ.
NAMES = ("tp", "fp", "fn", "accuracy", "f1", "panoptic_quality", "mean_matched_score")


def read() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Outputs and labels, (60, 48, 56), numbers of instances; and the answers, (60, thresholds, 7)."""
    stored = np.load(FILE)
    return stored["outputs"], stored["labels"], stored["answers"]


def draw(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Discs that touch, each voxel to the nearest centre; outputs are the same with other centres and radii."""
    random = np.random.default_rng(seed)
    at = np.stack(np.mgrid[: SHAPE[1], : SHAPE[2]], axis=-1)

    def discs(centres: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.uint8]:
        apart = np.linalg.norm(at[:, :, None] - centres, axis=-1)
        if not len(centres):
            return np.zeros(SHAPE[1:], dtype=np.uint8)
        near = apart.argmin(axis=-1)
        inside = apart.min(axis=-1) <= radii[near]
        _, numbers = np.unique(np.where(inside, near + 1, 0), return_inverse=True)  # 1..n, as StarDist wants them
        numbers = numbers.reshape(SHAPE[1:]) + (0 if (~inside).any() else 1)
        return numbers.astype(np.uint8)

    outputs, labels = np.zeros((2, *SHAPE), dtype=np.uint8)
    for output, label in zip(outputs, labels, strict=True):
        count = random.integers(1, 40)
        centres, radii = random.uniform((0, 0), SHAPE[1:], (count, 2)), random.uniform(1.5, 7, count)
        label[:] = discs(centres, radii)
        kept = random.random(count) < 0.85
        moved = centres + random.normal(0, random.uniform(0, 1.2), centres.shape)
        extra = random.uniform((0, 0), SHAPE[1:], (random.integers(0, 4), 2))
        output[:] = discs(
            np.concatenate((moved[kept], extra)), np.concatenate((radii[kept] * 1.05, np.full(len(extra), 3.0)))
        )
    outputs[::20] = 0
    labels[10::20] = 0
    return outputs, labels


def ask(outputs: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What StarDist says of one to one matches of IoU above each threshold."""
    from stardist.matching import matching

    # It takes an IoU equal to the threshold for a match, in float32.
    above: Any = [float(np.nextafter(np.float32(threshold), np.float32(1))) for threshold in THRESHOLDS]
    answers = [
        [[float(getattr(found, name)) for name in NAMES] for found in matching(label, output, thresh=above)]
        for output, label in zip(outputs.astype(int), labels.astype(int), strict=True)
    ]
    return np.array(answers)


def store() -> None:
    """Draw the label maps, ask, and make the file."""
    outputs, labels = draw(seed=0)
    np.savez_compressed(FILE, outputs=outputs, labels=labels, answers=ask(outputs, labels))


def check() -> None:
    """Ask about the stored label maps; it is an error if an answer is another one."""
    outputs, labels, answers = read()
    np.testing.assert_allclose(ask(outputs, labels), answers, rtol=1e-6)
    print(f"StarDist gives the stored answers on {len(answers)} label maps.")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--store"]):
        sys.exit(f"stardist_answers.py takes --store or nothing, got {sys.argv[1:]}")
    store() if sys.argv[1:] else check()
