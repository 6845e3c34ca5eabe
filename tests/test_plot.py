"""The picture of what is matched, missed and false: what is painted where, which slices, and errors."""

import re

import numpy as np
import pytest
import torch
from test_matching import numbered
from test_metrics import LABELS, OUTPUTS, draw, random_batch

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from triton_instance_loss.plot import COLOURS, FALSE, LABEL, MATCHED, MISSED, OUTPUT, draw_instances  # noqa: E402

DRAWN = {"activation": "none", "spatial_dims": 2}
SKY, ORANGE = COLOURS[OUTPUT, MATCHED].lower(), COLOURS[OUTPUT, FALSE].lower()


def painted(axes):
    """The colour of each voxel of the last image of a panel, "" where there is none."""
    pixels = axes.images[-1].get_array()
    return np.array([[to_hex(pixel[:3]) if pixel[3] else "" for pixel in row] for row in pixels])


def length_of_outlines(axes):
    """How many voxel edges are drawn in each colour."""
    lengths = {to_hex(lines.get_colors()[0]): len(lines.get_segments()) for lines in axes.collections}
    return {colour: length for colour, length in lengths.items() if length}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_drawn(device):
    figure = draw_instances(OUTPUTS.to(device), LABELS.to(device), title="four labels", **DRAWN)
    (axes,) = figure.axes
    expected = np.full((7, 9), "", dtype=object)
    expected[OUTPUTS[0, 0] == 1] = SKY
    expected[6, 5:] = ORANGE
    assert (painted(axes) == expected).all()
    # Around a box of 2 x 4, one of 2 x 2 and one of 2 x 3; around one of 1 x 2.
    assert length_of_outlines(axes) == {COLOURS[LABEL, MATCHED].lower(): 12 + 8 + 10, COLOURS[LABEL, MISSED].lower(): 6}
    edges = np.concatenate([lines.get_segments() for lines in axes.collections])
    assert [[-0.5, 5.5], [-0.5, 6.5]] in edges.tolist()  # x, y: left of the missed label, at the border
    assert legend(figure) == ["label, matched (3)", "label, missed (1)", "output, matched (4)", "output, false (1)"]
    assert {"L1", "L4", "O1", "O5"} <= {text.get_text() for text in axes.texts}
    assert axes.yaxis_inverted()
    FigureCanvasAgg(figure).draw()  # as TensorBoard's add_figure does


def test_matching_and_numbers_of_instances():
    (outputs, of_outputs), (labels, of_labels) = numbered("1122. 1122."), numbered("1122. 11..2")
    options = {**DRAWN, "matching": "iou", "numbers": False}
    figure = draw_instances(outputs, labels, of_labels, cc_output_batch=of_outputs, **options)
    assert legend(figure) == ["label, matched (1)", "label, missed (1)", "output, matched (1)", "output, false (1)"]
    assert painted(figure.axes[0])[0].tolist() == [SKY, SKY, ORANGE, ORANGE, ""]
    assert not figure.axes[0].texts


def test_image_behind(device):
    """All of it is shown; without it the picture ends near the instances."""
    labels = torch.zeros(2, 1, 40, 50, device=device)
    labels[1, :, 10:14, 10:14] = 1
    image = torch.rand(2, 3, 40, 50, device=device, dtype=torch.bfloat16)
    (axes,) = draw_instances(labels, labels, image=image, sample=1, **DRAWN).axes
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 49.5), (39.5, -0.5))
    np.testing.assert_array_equal(axes.images[0].get_array(), image[1, 0].float().cpu())
    (axes,) = draw_instances(labels, labels, sample=1, **DRAWN).axes
    assert (axes.get_xlim(), axes.get_ylim()) == ((7.5, 15.5), (15.5, 7.5))


def test_slices_of_a_volume(device):
    """Two slices show all three instances; the third axis, on which they are, is the one to cut."""
    outputs, labels = torch.zeros(2, 1, 1, 20, 30, 9, device=device)
    outputs[..., 3:7, 3:8, 2:5] = labels[..., 4:8, 2:6, 2:5] = 1
    outputs[..., 15:18, 20:24, 6:8] = 1
    figure = draw_instances(outputs, labels, activation="none", spacing=(1, 2, 5))
    assert [axes.get_title() for axes in figure.axes] == ["axis 2 = 3", "axis 2 = 7"]
    assert [axes.get_aspect() for axes in figure.axes] == [0.5, 0.5]
    assert (painted(figure.axes[0]) == SKY).sum() == 20
    assert (painted(figure.axes[1]) == ORANGE).sum() == 12
    figure = draw_instances(outputs, labels, activation="none", panels=1)
    assert [axes.get_title() for axes in figure.axes] == ["axis 2 = 3"]


def test_other_axes_are_cut_where_that_shows_more():
    outputs = torch.zeros(1, 1, 12, 12, 12)
    outputs[:, :, 5, 1:3, 1:3] = outputs[:, :, 5, 6:8, 6:8] = outputs[:, :, 5, 10, 10] = 1
    (axes,) = draw_instances(outputs, 0 * outputs, activation="none", panels=1).axes
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == ("axis 0 = 5", "axis 1", "axis 2")
    assert (painted(axes) == ORANGE).sum() == 9


def test_nothing_and_everything():
    nothing, everything = torch.zeros(1, 1, 4, 5, 3), torch.ones(1, 1, 4, 5, 3)
    figure = draw_instances(nothing, nothing, activation="none")
    assert not figure.legends
    assert not (painted(figure.axes[0]) != "").any()
    figure = draw_instances(everything, everything, activation="none")
    assert legend(figure) == ["label, matched (1)", "output, matched (1)"]


def test_one_of_several_classes():
    outputs, labels = (volume.repeat(1, 2, 1, 1) for volume in random_batch((9, 11)))
    figure = draw_instances(outputs, labels, sample=2, object_chn=1, num_out_chn=2, spatial_dims=2)
    assert legend(figure)


WRONG = [
    ({"sample": 1}, ValueError, "sample must be one of the 1 of outputs, counted from 0, got 1"),
    ({"sample": -1}, ValueError, "sample must be an integer of at least 0, got -1"),
    ({"panels": 0}, ValueError, "panels must be an integer of at least 1, got 0"),
    ({"numbers": 1}, TypeError, "numbers must be True or False, got 1"),
    ({"image": LABELS[..., 1:]}, ValueError, "image must have shape (1, 1, 7, 9) beside outputs of (1, 1, 7, 9), got"),
    ({"image": "face"}, TypeError, "image must be a torch.Tensor, got str"),
    ({"labels": LABELS[..., 1:]}, ValueError, "labels must have shape (1, 1, 7, 9) beside outputs of"),
    ({"outputs": None}, TypeError, "outputs must be a torch.Tensor, got NoneType"),
    ({"outputs": OUTPUTS * torch.nan}, ValueError, "outputs must be finite, and labels 0 or 1, got NaN"),
    ({"object_chn": (0, 1), "num_out_chn": 2}, ValueError, "object_chn must be one class for a picture, got (0, 1)"),
    ({"sizes": (3,)}, TypeError, "unexpected keyword argument 'sizes'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_errors(wrong, error, message):
    right = {"outputs": OUTPUTS, "labels": LABELS, **DRAWN}
    with pytest.raises(error, match=re.escape(message)):
        draw_instances(**(right | wrong))


def test_without_matplotlib(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "triton_instance_loss.plot")
    with pytest.raises(ImportError, match=r"pip install 'triton_instance_loss\[examples\]'"):
        importlib.import_module("triton_instance_loss.plot")


def test_drawn_small():
    """A voxel at the corner."""
    figure = draw_instances(draw("#.. ..."), draw("#.. ..."), **DRAWN)
    assert length_of_outlines(figure.axes[0]) == {COLOURS[LABEL, MATCHED].lower(): 4}
