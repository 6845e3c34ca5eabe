"""Everything that is measured, by name."""

from . import components, labelling, steps
from .cases import blobs, cells, giant, lesions, noise, one_instance, small_instances, spirals, untrained
from .entry import Case, Entry

# Outputs and labels read once, the gradient written once, in float32; a mask read, ids in int32 written.
STEP_BYTES, LABELLING_BYTES = 12, 5
TINY_3D, TINY_2D = (2, 1, 16, 18, 20), (2, 1, 24, 28)

MASKS = {
    "noise 1 %": noise(0.01),
    "noise 10 %": noise(0.1),
    "noise 50 %": noise(0.5),
    "blobs": blobs,
    "giant": giant,
    "spirals": spirals,
}


def _cube(side: int, batch: int = 1) -> tuple[int, ...]:
    return (batch, 1, side, side, side)


def _step(name: str, about: str, cases: list[Case], slow_truth: bool = True, **options: float) -> Entry:
    truth = steps.volume_by_volume if slow_truth else steps.by_cpu
    providers = steps.providers(truth)
    return Entry(name, about, tuple(cases), providers, steps.read, STEP_BYTES, steps.YARDSTICKS, **options)


def _lesions(side: int, batch: int = 1) -> Case:
    return Case(f"lesions {batch} x {side}^3", _cube(side, batch), lesions, TINY_3D)


def _labelling() -> Entry:
    shapes = [_cube(128, 2), (16, 1, 512, 512), _cube(256), _cube(512)]
    cases = tuple(
        Case(f"{name}, {shape[0]} x {shape[-1]}^{len(shape) - 2}", shape, draw, TINY_3D if len(shape) == 5 else TINY_2D)
        for shape in shapes
        for name, draw in MASKS.items()
    )
    about = "whole components of a binary mask"
    yardsticks = ("scipy",)
    return Entry("labelling", about, cases, labelling.PROVIDERS, labelling.canonical, LABELLING_BYTES, yardsticks, 1.0)


ENTRIES = {
    entry.name: entry
    for entry in (
        _step("step", "all seven terms, forward and backward, of a training batch", [_lesions(128, 2)]),
        _step("step_cpu", "the same for one patch", [_lesions(128), _lesions(192)], seconds=6.0),
        Entry(
            "step_small",
            "the same and instance_metrics where little is to be done, or much: patches, images of cells, noise",
            (
                _lesions(64),
                Case("150 cells each, 4 x 512^2", (4, 1, 512, 512), cells, TINY_2D),
                Case("untrained 1 x 96^3", _cube(96), untrained, TINY_3D),
            ),
            steps.SMALL,
            steps.read_any,
            STEP_BYTES,
            steps.YARDSTICKS,
        ),
        _labelling(),
        Entry(
            "instance_terms",
            "the two instance terms against labels of others and torch's own sums",
            (_lesions(128, 2),),
            steps.INSTANCE_TERMS,
            steps.read,
            STEP_BYTES,
            steps.YARDSTICKS,
        ),
        Entry(
            "component_losses",
            "blob loss, CC-DiceCE, BiCC, CAT and false components, forward and backward",
            (_lesions(128), _lesions(128, 2)),
            components.PROVIDERS,
            steps.read,
            STEP_BYTES,
            steps.YARDSTICKS,
        ),
        Entry(
            "reference",
            "all seven terms as the published code computes them, on probabilities",
            (_lesions(32), _lesions(128)),
            steps.REFERENCE,
            steps.read,
            STEP_BYTES,
            steps.YARDSTICKS,
        ),
        Entry(
            "determinism",
            "what asking PyTorch for deterministic algorithms costs; only soft outputs need it",
            (_lesions(128, 2),),
            steps.DETERMINISM,
            steps.read,
            STEP_BYTES,
            steps.YARDSTICKS,
        ),
        _step(
            "scaling",
            "all seven terms for larger volumes, one large and many small instances",
            [
                Case("one instance of 10^6 voxels", _cube(128), one_instance, TINY_3D),
                Case("5,000 instances of 5 voxels", _cube(128), small_instances, TINY_3D),
                *(_lesions(side) for side in (128, 256, 512)),
            ],
            slow_truth=False,
        ),
        _step(
            "memory",
            "peak memory of all seven terms, by size",
            [_lesions(side) for side in (64, 128, 192, 256, 384)],
            slow_truth=False,
            seconds=0.2,
        ),
    )
}
