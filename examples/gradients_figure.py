"""The picture of docs/gradients.md: the gradient of each term on a drawn image, as published and as here.

python examples/gradients_figure.py docs/images/gradients.png
"""

from pathlib import Path

import torch
from instance_report import Parser
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from triton_instance_loss import InstanceLoss

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


def main(arguments: list[str] | None = None) -> None:
    """Draw a row for each term, a column for each mode."""
    parser = Parser(description="Draw the gradient of each term, as published and as here.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/images/gradients.png"))
    path = parser.parse_args(arguments).path
    if not path.absolute().parent.is_dir():
        parser.error(f"no folder {path.absolute().parent}")

    logits, labels = scene()
    found = {mode: gradients(**options) for mode, options in MODES.items()}
    terms = list(found['here, "sigmoid"'])
    figure = Figure(figsize=(13.6, 9.6), dpi=110, layout="constrained")
    for axes_row, term in zip(figure.subplots(len(terms), len(MODES)), terms, strict=True):
        largest = max(float(by_term[term].abs().max()) for by_term in found.values())
        for axes, (mode, by_term) in zip(axes_row, found.items(), strict=True):
            # Brown where a step of training raises the output, purple where it lowers it; one scale a row.
            axes.imshow(-by_term[term], cmap="PuOr_r", vmin=-largest, vmax=largest)
            axes.contour(labels[0, 0], levels=[0.5], colors="#222222", linewidths=1.3)
            axes.contour(logits[0, 0], levels=[0.0], colors="#222222", linewidths=1, linestyles=":")
            axes.set(xticks=[], yticks=[])
            if not by_term[term].any():
                axes.text(0.5, 0.06, "zero", ha="center", fontsize=9, color="#777777", transform=axes.transAxes)
            if term == terms[0]:
                axes.set_title(mode, fontsize=12, pad=20)
                axes.xaxis.tick_top()
                axes.set_xticks(list(PLACES.values()), list(PLACES), fontsize=9)
                axes.tick_params(length=0)
        axes_row[0].set_ylabel(term, fontsize=9)
    lines = [
        Line2D([], [], color="#222222", linewidth=1.3, label="label"),
        Line2D([], [], color="#222222", linewidth=1, linestyle=":", label="output"),
        Line2D([], [], color="#B35806", linewidth=6, label="training raises the output"),
        Line2D([], [], color="#542788", linewidth=6, label="training lowers it"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=11)
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
