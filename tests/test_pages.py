"""What docs/gradients.md says holds; each row of docs/differences.md and line of docs/troubleshooting.md does, too."""

import doctest
import re
import runpy
from pathlib import Path

import pytest
import torch
from monai.losses import DiceCELoss

import triton_instance_loss
from triton_instance_loss import (
    BlobLoss,
    CCLoss,
    ComponentTverskyLoss,
    FalseComponentLoss,
    InstanceLoss,
    WeightedSum,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "differences.md").read_text()
INSTANCE_TERMS = {"instance_label", "instance_output", "proximity"}
NO_DERIVATIVE = {"center", "false_instances", "missed_instances"}


@pytest.fixture
def figure(monkeypatch):
    """What is in examples/gradients_figure.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return runpy.run_path(str(ROOT / "examples" / "gradients_figure.py"))


def at(figure, place):
    """The middle of a situation of the picture."""
    return 9, figure["PLACES"][place]


def test_published_gradients(figure):
    """With sigmoid the pixel term's alone; with probabilities those of the instance terms, inside outputs only."""
    modes = figure["MODES"]
    nothing = {n for n, g in figure["gradients"](**modes['published, "sigmoid"']).items() if not g.any()}
    assert nothing == INSTANCE_TERMS | NO_DERIVATIVE
    soft = figure["gradients"](**modes['published, "none"'])
    assert {name for name, gradient in soft.items() if not gradient.any()} == NO_DERIVATIVE
    outputs = figure["discs"](figure["OUTPUTS"])[0, 0] == 1
    for name in INSTANCE_TERMS:
        assert not soft[name][~outputs].any()
        assert abs(soft[name][at(figure, "false")]) < 1e-9


def test_surrogate_gradients_of_a_missed_label_and_a_false_output(figure):
    """-1 / |L| on the missed label, +1 / |O| on the false output, divided as the rates are, and 0 elsewhere."""
    logits, labels = figure["scene"]()
    for rates, divisors in ((False, (1, 1)), (True, (4, 3))):
        a = logits.sigmoid().requires_grad_()
        loss = InstanceLoss(spatial_dims=2, activation="none", rate_instead_number=rates, max_cc_out=2)
        terms = loss(a, labels)
        missed, false = figure["discs"](figure["LABELS"][1:2]), figure["discs"](figure["OUTPUTS"][1:2])
        for term, where, sign, divisor in (
            (terms.missed_instances, missed, -1, divisors[0]),
            (terms.false_instances, false, 1, divisors[1]),
        ):
            (gradient,) = torch.autograd.grad(term, a, retain_graph=True)
            torch.testing.assert_close(gradient, sign * where / where.sum() / divisor)


def test_surrogate_gradients_in_the_situations(figure):
    here = figure["gradients"](**figure["MODES"]['here, "sigmoid"'])
    assert all(gradient.any() for gradient in here.values())
    overlap, spill, uncovered = (9, 9), (13, 11), (4, 7)
    larger, bridge, smaller = (9, 43), at(figure, "merged pair"), (9, 51)
    for name in ("instance_label", "instance_output"):
        gradient = here[name]
        assert gradient[overlap] < 0 < gradient[spill]
        assert gradient[uncovered] == gradient[at(figure, "missed")] == 0
        assert gradient[larger] < 0 < gradient[bridge]
    assert here["instance_label"][smaller] < 2 * here["instance_label"][larger]
    # The box of the merged output meets one of a label, so all of the output is raised; the false one's meets none.
    assert here["center"][bridge] == pytest.approx(here["center"][larger].item()) != 0
    assert here["center"][bridge] < 0 < here["center"][at(figure, "false")]
    assert not here["center"][figure["discs"](figure["OUTPUTS"])[0, 0] == 0].any()


def pulls(gradients, logit):
    """Total pull by the logits on a label of 27 voxels that is missed, and push on such an output that is false."""
    box = torch.zeros(1, 1, 32, 32, 32, dtype=torch.float64)
    box[..., 4:7, 9:12, 20:23] = 1
    found = []
    for x, labels, name in (
        (torch.where(box == 1, logit, -30.0), box, "missed_instances"),
        (torch.where(box == 1, -logit, -30.0), 0 * box, "false_instances"),
    ):
        x = x.double().requires_grad_()
        term = getattr(InstanceLoss(gradients=gradients)(x, labels), name)
        assert term == 1
        (gradient,) = torch.autograd.grad(term, x)
        assert not gradient[box == 0].any()
        found.append(abs(gradient.sum().item()))
    return found


def test_the_table_of_pulls():
    page = (ROOT / "docs" / "gradients.md").read_text()
    rows = re.findall(r"^\| (-\d+) \| (.+) \|$", page, re.M)
    assert [int(logit) for logit, _ in rows] == [-2, -8, -12]
    for logit, cells in rows:
        p = torch.tensor(float(logit), dtype=torch.float64).sigmoid().item()
        both = [pulls(gradients, float(logit)) for gradients in ("surrogate", "log")]
        assert all(missed == pytest.approx(false) for missed, false in both)
        numbers = (p, both[0][0], both[1][0], (1 - p) * 27 / 32**3)
        assert cells == " | ".join(f"{number:.1e}" for number in numbers)


def test_log_gives_each_missed_label_the_same_total():
    """Of two labels, of 27 voxels and of 1, by the logits."""
    labels = torch.zeros(1, 1, 12, 12, 12)
    labels[..., 1:4, 1:4, 1:4] = labels[..., 8, 8, 8] = 1
    x = torch.full_like(labels, -9.0).requires_grad_()
    (gradient,) = torch.autograd.grad(InstanceLoss(gradients="log")(x, labels).missed_instances, x)
    assert (
        gradient[..., :6, :, :].sum().item()
        == pytest.approx(gradient[..., 8, 8, 8].item())
        == pytest.approx(-1, abs=1e-3)
    )


def test_only_false_and_missed_differ_between_the_two_ways(figure):
    surrogate, log = (
        figure["gradients"](**figure["MODES"][mode]) for mode in ('here, "sigmoid"', 'here, "sigmoid", "log"')
    )
    different = {name for name, gradient in surrogate.items() if not torch.equal(gradient, log[name])}
    assert different == {"false_instances", "missed_instances"}


@pytest.mark.parametrize("gradients", ["surrogate", "log"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_instance_terms_act_on_instances_alone(activation, gradients):
    """An empty patch has no gradient, though its terms are connected; beside an instance nothing has one."""
    channels = 2 if activation == "softmax" else 1
    x = torch.randn(3, channels, 9, 9, 9, generator=torch.Generator().manual_seed(0)) - 8 * torch.ones(channels)[-1]
    if channels == 2:
        x[:, 0] += 16
    labels = torch.zeros(3, 1, 9, 9, 9)
    labels[1, :, 2:4, 2:4, 2:4] = 1  # a missed label
    x[2, -1, 5:7, 5:7, 5:7] = 20.0  # a false output
    x.requires_grad_()
    loss = InstanceLoss(activation=activation, num_out_chn=channels, gradients=gradients)
    instances = labels.clone()
    instances[2, :, 5:7, 5:7, 5:7] = 1
    for name, term in loss(x, labels)._asdict().items():
        if name != "pixel":
            assert term.requires_grad
            (gradient,) = torch.autograd.grad(term, x, retain_graph=True)
            assert not gradient.masked_fill(instances == 1, 0).any(), name
            assert name != "missed_instances" or gradient[1].any()


def test_each_row_of_the_differences():
    """Every row has its block; what a block prints is what the page says."""
    rows = re.findall(r"^\| (\d+) \|", PAGE, re.M)
    shown = re.findall(r"^(\d+) .+\n\n```pycon$", PAGE, re.M)
    assert rows == shown == [str(number + 1) for number in range(len(rows))]
    tried = run_blocks("differences.md")
    assert tried > len(rows)


def boxes(*places):
    """(1, 1, 48, 48) with boxes of 1, each given by its corner and sides."""
    volume = torch.zeros(1, 1, 48, 48)
    for row, column, height, width in places:
        volume[..., row : row + height, column : column + width] = 1
    return volume


def test_the_losses_and_their_gradients():
    """Lines of the page run, and its table of gradients is what they are."""
    page = (ROOT / "docs" / "losses.md").read_text()
    assert run_blocks("losses.md") > 10
    for name in triton_instance_loss.__all__:
        assert name in ("connected_components", "WeightedSum", "CombinedLoss") or re.search(
            rf"^\| .*`{name}`", page, re.M
        )
    large, small, missed, false = (4, 4, 12, 12), (8, 24, 3, 3), (4, 36, 4, 4), (36, 4, 4, 4)
    left, right, bridge = (28, 22, 6, 6), (28, 34, 6, 6), (30, 28, 2, 6)
    labels = boxes(large, small, missed, left, right)
    losses = {
        "DiceCE": DiceCELoss(sigmoid=True),
        "BlobLoss": BlobLoss(spatial_dims=2),
        "CCLoss": CCLoss(spatial_dims=2),
        "BiCC": CCLoss(alpha=0.5, spatial_dims=2),
        "ComponentTverskyLoss": ComponentTverskyLoss(spatial_dims=2),
        "FalseComponentLoss": FalseComponentLoss(spatial_dims=2),
        "InstanceLoss": WeightedSum(InstanceLoss(spatial_dims=2, rate_instead_number=True)),
    }
    rows = dict(re.findall(r"^\| (\w+) \| (-?[\d.]+ \| .*) \|$", page, re.M))
    assert set(rows) == set(losses)
    for name, loss in losses.items():
        logits = (6 * boxes(large, small, false, left, right, bridge) - 3).requires_grad_()
        (gradient,) = torch.autograd.grad(1e3 * loss(logits, labels), logits)
        sums = [(gradient * boxes(place)).sum().item() for place in (missed, false, bridge, small, large)]
        ratio = f"{sums[3] / 9 / (sums[4] / 144):.1f}" if sums[4] else "-"
        assert rows[name] == " | ".join([f"{each:.1f}" for each in sums[:3]] + [ratio]), name


@pytest.mark.parametrize("name", ["terms.md"])
def test_python_of_the_pages(name):
    """Blocks that are no session: they run. Those of recipes.md and nnunet.md have tests of their own."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), {"__name__": "__main__"})


def test_every_block_of_the_pages_has_a_test():
    tried = {
        "recipes.md": "test_recipes.py",
        "nnunet.md": "nnunet_training.py",
        "files.md": "test_examples.py",
    } | dict.fromkeys(("terms.md", "losses.md", "differences.md", "troubleshooting.md", "metrics.md"), "test_pages.py")
    for page in (ROOT / "docs").glob("*.md"):
        if re.search(r"^```(python|pycon|bash)", page.read_text(), re.M):
            assert page.name in (ROOT / "tests" / tried[page.name]).read_text(), page.name


def test_links_between_the_pages():
    """Files that pages and the README link to are there, and their headings."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def run_blocks(name):
    """Run the lines of a page, one after the other; what they print is what it says. How many there were."""
    page = (ROOT / "docs" / name).read_text()
    blocks = "\n".join(re.findall(r"^```pycon\n(.*?)^```", page, re.M | re.S))
    test = doctest.DocTestParser().get_doctest(blocks, {}, f"docs/{name}", None, None)
    printed = []
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
    assert not failed, "".join(printed)
    return tried


def test_metrics():
    """Its lines, and the headings that it links to; it is linked itself."""
    assert run_blocks("metrics.md") > 20
    assert "docs/metrics.md" in (ROOT / "README.md").read_text()
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    assert "](metrics.md)" in recipes
    assert "## Metrics and pictures of a validation" in recipes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_troubleshooting():
    """Its lines, a block for each symptom; it is linked, and links to headings that are there."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        assert "```pycon" in section, section.splitlines()[0]
    assert run_blocks("troubleshooting.md") > 20
    assert "docs/troubleshooting.md" in (ROOT / "README.md").read_text()
    assert "troubleshooting.md" in (ROOT / "docs" / "recipes.md").read_text()
    for target, heading in re.findall(r"\]\((\w*\.?m?d?)#([\w-]+)\)", page):
        text = (ROOT / "docs" / (target or "troubleshooting.md")).read_text()
        headings = [line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")]
        assert heading in headings, (target, heading)
