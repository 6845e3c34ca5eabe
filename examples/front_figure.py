"""The picture at the top of the README: two real test images, with and without the family of losses.

python examples/front_figure.py FOLDER front.png    # nuclei.npz and ms_lesions.npz, as for train.py; some minutes

Networks are those of `train.py` with the first seed. Which images are shown was fixed before they were looked at: the
first test image of nuclei with 20 objects or more, and the test slice with the most lesions.
"""

from pathlib import Path

from instance_report import Parser
from matplotlib.figure import Figure
from train import ARMS, Setting, probabilities, train
from train_data import LESIONS, DataError, ImageSet, load
from train_pictures import draw_image
from train_report import bars

from triton_instance_loss.metrics import instance_metrics

SHOWN = ("ce", "log")
# As in docs/study.md: steps, and the share of empty patches.
RUNS = {"nuclei": (250, None), LESIONS: (1500, 0.5)}


def chosen(images: ImageSet) -> int:
    """Which test image is shown."""
    counts = [len(each.unique()) - 1 for each in images.test.instances]
    if images.name == LESIONS:
        return counts.index(max(counts))
    return next(index for index, count in enumerate(counts) if count >= 20)


def main(arguments: list[str] | None = None) -> None:
    """Train, and draw."""
    parser = Parser(description="Two real test images, with and without the family.")
    parser.add_argument("folder", help="with nuclei.npz and ms_lesions.npz")
    parser.add_argument("out", type=Path, help="the picture")
    given = parser.parse_args(arguments)
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    rows = figure.subplots(len(RUNS), len(SHOWN) + 1, squeeze=False, height_ratios=(1.0, 0.45))
    with bars() as progress:
        for axes_row, (name, (steps, empty)) in zip(rows, RUNS.items(), strict=True):
            try:
                images = load(given.folder, name, 2)
            except DataError as error:
                parser.error(str(error))
            index = chosen(images)
            setting = Setting(name, 2, SHOWN, 1, steps, empty, (16, 32, 64))
            draw_image(axes_row[0], images, index, None)
            axes_row[0].set_title("image", fontsize=10)
            for axes, arm in zip(axes_row[1:], SHOWN, strict=True):
                network, _ = train(arm, 0, images, setting, progress)
                found = probabilities(network, images.test)
                draw_image(axes, images, index, found)
                truth = images.test.instances[index : index + 1]
                options = {"activation": "none", "spatial_dims": 2}
                of_image = instance_metrics(found[index : index + 1], (truth > 0).float(), truth, **options)
                counts = (of_image.matched, of_image.num_labels, of_image.false)
                axes.set_title("{}: {} of {} found, {} false".format(ARMS[arm], *map(int, counts)), fontsize=10)
    figure.savefig(given.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
