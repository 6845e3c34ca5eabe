"""What panoptica answered on 100 random volumes (tests/data/panoptica.npz), and how it was asked.

`make test-panoptica` asks panoptica itself whether these still are its answers, in an environment of its own, since it
brings plotly, pandas and scikit-image along and wants NumPy below 2.3. `test_metrics.py` compares ours with them.
`python tests/panoptica_answers.py --store` makes the file anew.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "data" / "panoptica.npz"
SHAPE = (100, 12, 11, 10)
# Names of the answers there and here; panoptica has NaN where both volumes are empty.
NAMES = {
    "n_pred_instances": "num_outputs",
    "n_ref_instances": "num_labels",
    "tp": "matched",
    "fn": "missed",
    "fp": "false",
    "rq": "recognition_quality",
    "sq": "segmentation_quality",
    "pq": "panoptic_quality",
    "sq_dsc": "dice",
}


def read() -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Outputs and labels, (100, 12, 11, 10), and the answers, (100, 9)."""
    stored = np.load(FILE)
    volumes = (np.unpackbits(stored[name], count=np.prod(SHAPE)) for name in ("outputs", "labels"))
    outputs, labels = (volume.reshape(SHAPE).astype(bool) for volume in volumes)
    return outputs, labels, stored["answers"]


def draw(seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Blobs, and blobs of the same field with noise; a few volumes are empty on one side or both."""
    from scipy import ndimage

    random = np.random.default_rng(seed)
    outputs, labels = np.zeros((2, *SHAPE), dtype=bool)
    for output, label in zip(outputs, labels, strict=True):
        field, noise = (ndimage.gaussian_filter(random.standard_normal(SHAPE[1:]), 1.0) for _ in range(2))
        noisy = field + 0.7 * random.random() * noise
        label[:] = field > np.quantile(field, random.uniform(0.85, 1.0))
        output[:] = noisy > np.quantile(noisy, random.uniform(0.85, 1.0))
    outputs[::20] = False
    labels[10::20] = False
    labels[40] = False
    return outputs, labels


def ask(outputs: NDArray[np.bool_], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What panoptica says: components with 26 neighbours, one to one matches of IoU above 0.5."""
    import panoptica
    from panoptica import InputType, Metric

    panoptica.disable_citation_reminder()
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),  # cc3d in 3D
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5, strict_threshold=True),
        instance_metrics=[Metric.IOU, Metric.DSC],
        global_metrics=[],
    )
    answers = []
    for output, label in zip(outputs, labels, strict=True):
        volumes: Any = (output.astype(np.uint8), label.astype(np.uint8))
        result = evaluator.evaluate(*volumes, result_all=False)["ungrouped"]
        answers.append([float(getattr(result, name)) for name in NAMES])
    return np.array(answers)


def store() -> None:
    """Draw the volumes, ask, and make the file."""
    drawn = draw(seed=0)
    packed = {name: np.packbits(volume) for name, volume in zip(("outputs", "labels"), drawn, strict=True)}
    np.savez_compressed(FILE, **packed, answers=ask(*drawn))


def check() -> None:
    """Ask about the stored volumes; it is an error if an answer is another one."""
    outputs, labels, answers = read()
    np.testing.assert_allclose(ask(outputs, labels), answers, rtol=1e-12)
    print(f"panoptica gives the stored answers on {len(answers)} volumes.")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--store"]):
        sys.exit(f"panoptica_answers.py takes --store or nothing, got {sys.argv[1:]}")
    store() if sys.argv[1:] else check()
