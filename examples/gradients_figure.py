"""The pictures of docs/gradients.md and docs/losses.md: gradients on a drawn image, of each term and of each loss.

python examples/gradients_figure.py docs/images/gradients.png docs/images/losses.png
"""

from pathlib import Path
from typing import Any

import torch
from instance_report import Parser
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.losses import DiceCELoss

from triton_instance_loss import BlobLoss, CCLoss, ComponentTverskyLoss, FalseComponentLoss, InstanceLoss, WeightedSum

HEIGHT, WIDTH = 18, 56
# Row, column, radius. From left to right: a matched label, a missed one, a false output, two labels under one output.
PLACES = {"matched": 7, "missed": 20, "false": 33, "merged pair": 47}
LABELS = ((8, 7, 5.2), (9, 20, 3.2), (9, 43, 3.2), (9, 51, 2.2))
OUTPUTS = ((10, 9, 4.2), (9, 33, 3.2), (9, 43, 3.2), (9, 51, 2.2), (9, 47, 1.5))
# With "none" the loss sees probabilities. All gradients are by logits, so that they compare.
MODES = {
    'published, "sigmoid"': {"activation": "sigmoid", "gradients": "reference"},
    'published, "none"': {"activation": "none", "gradients": "reference"},
    'here, "sigmoid"': {"activation": "sigmoid", "gradients": "surrogate"},
    'here, "sigmoid", "log"': {"activation": "sigmoid", "gradients": "log"},
}


def discs(places: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """(1, 1, H, W): 1 inside the discs."""
    row, column = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    inside = [(row - r) ** 2 + (column - c) ** 2 <= radius**2 for r, c, radius in places]
    return torch.stack(inside).any(0)[None, None].double()


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels: probability 0.8 in the outputs, 0.3 on what is missed of the labels, 0.1 elsewhere."""
    labels, outputs = discs(LABELS), discs(OUTPUTS)
    likely = torch.where(outputs == 1, 0.8, torch.where(labels == 1, 0.3, 0.1))
    return likely.double().logit(), labels


def gradients(activation: str, gradients: str) -> dict[str, torch.Tensor]:
    """By term, the gradient by the logits, (H, W); rates, and the default criteria."""
    logits, labels = scene()
    logits.requires_grad_()
    loss = InstanceLoss(spatial_dims=2, rate_instead_number=True, activation=activation, gradients=gradients)
    terms = loss(logits.sigmoid() if activation == "none" else logits, labels)._asdict()
    if activation == "none":  # the pixel criterion, too, sees probabilities
        terms["pixel"] = InstanceLoss(spatial_dims=2)(logits, labels).pixel
    found = {}
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        found[name] = gradient[0, 0]
    return found


LOSSES = {
    "Dice + cross entropy": DiceCELoss(sigmoid=True),
    "WeightedSum(InstanceLoss)": WeightedSum(InstanceLoss(spatial_dims=2, rate_instead_number=True)),
    "BlobLoss": BlobLoss(spatial_dims=2),
    "ComponentTverskyLoss (CATMIL)": ComponentTverskyLoss(spatial_dims=2),
    "CCLoss (CC-DiceCE)": CCLoss(spatial_dims=2),
    "CCLoss(alpha=0.5) (BiCC)": CCLoss(alpha=0.5, spatial_dims=2),
    "FalseComponentLoss": FalseComponentLoss(spatial_dims=2),
}


def gradients_of_losses() -> dict[str, torch.Tensor]:
    """By loss, the gradient by the logits, (H, W)."""
    found = {}
    for name, loss in LOSSES.items():
        logits, labels = scene()
        logits.requires_grad_()
        loss(logits, labels).backward()
        found[name] = logits.grad[0, 0]
    return found


def draw(axes: Any, gradient: torch.Tensor, largest: float, title: str | None) -> None:
    """One gradient: brown where a step of training raises the output, purple where it lowers it."""
    logits, labels = scene()
    axes.imshow(-gradient, cmap="PuOr_r", vmin=-largest, vmax=largest)
    axes.contour(labels[0, 0], levels=[0.5], colors="#222222", linewidths=1.3)
    axes.contour(logits[0, 0], levels=[0.0], colors="#222222", linewidths=1, linestyles=":")
    axes.set(xticks=[], yticks=[])
    if not gradient.any():
        axes.text(0.5, 0.06, "zero", ha="center", fontsize=9, color="#777777", transform=axes.transAxes)
    if title is not None:
        axes.set_title(title, fontsize=12, pad=20)
        axes.xaxis.tick_top()
        axes.set_xticks(list(PLACES.values()), list(PLACES), fontsize=9)
        axes.tick_params(length=0)


def with_legend(figure: Figure) -> Figure:
    """The figure with what its lines and colours mean."""
    lines = [
        Line2D([], [], color="#222222", linewidth=1.3, label="label"),
        Line2D([], [], color="#222222", linewidth=1, linestyle=":", label="output"),
        Line2D([], [], color="#B35806", linewidth=6, label="training raises the output"),
        Line2D([], [], color="#542788", linewidth=6, label="training lowers it"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=11)
    return figure


def figure_of_terms() -> Figure:
    """A row for each term with one scale, a column for each mode."""
    found = {mode: gradients(**options) for mode, options in MODES.items()}
    terms = list(found['here, "sigmoid"'])
    figure = Figure(figsize=(13.6, 9.6), dpi=110, layout="constrained")
    for axes_row, term in zip(figure.subplots(len(terms), len(MODES)), terms, strict=True):
        largest = max(float(by_term[term].abs().max()) for by_term in found.values())
        for axes, (mode, by_term) in zip(axes_row, found.items(), strict=True):
            draw(axes, by_term[term], largest, mode if term == terms[0] else None)
        axes_row[0].set_ylabel(term, fontsize=9)
    return with_legend(figure)


def figure_of_losses() -> Figure:
    """A panel for each loss, with a scale of its own."""
    found = gradients_of_losses()
    figure = Figure(figsize=(9, 8.2), dpi=110, layout="constrained")
    panels = figure.subplots((len(found) + 1) // 2, 2).ravel()
    for axes in panels[len(found) :]:
        axes.axis("off")
    for axes, (name, gradient) in zip(panels, found.items(), strict=False):
        draw(axes, gradient, float(gradient.abs().max()), name)
    return with_legend(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draw both pictures."""
    parser = Parser(description="Draw the gradient of each term, as published and as here, and of each loss.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/images/gradients.png"), help="of the terms")
    parser.add_argument("losses", type=Path, nargs="?", help="of the losses; left out, they are not drawn")
    given = parser.parse_args(arguments)
    for path, make in ((given.path, figure_of_terms), (given.losses, figure_of_losses)):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            parser.error(f"no folder {path.absolute().parent}")
        try:
            make().savefig(path, format="png", metadata={"Software": None})
        except OSError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
