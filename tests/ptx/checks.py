"""What the kernels are compared on: each check draws a case from a seed, and fails where the machine disagrees.

The truth is the CPU backend, or for pairs of instances that touch a plain statement of the sums.
"""

import random

import torch
from backends import using_backend
from drawing import draw_call, draw_mask
from kernel_cases import assert_same, used
from machine import MACHINE
from tolerance import tolerance

from triton_instance_loss import FalseComponentLoss, InstanceLoss, connected_components, ops, quantities
from triton_instance_loss.metrics import instance_metrics


def on_both(call):
    """What the machine and the CPU backend give."""
    with using_backend("cpu"):
        theirs = call()
    return call(), theirs


def check_labelling(seed, changed=lambda tensor: tensor):
    """Ids of components, and instances of masks and of given ids: bit for bit."""
    draw = random.Random(seed)
    mask = changed(draw_mask(draw)[1])
    rounds, least, highest = draw.choice([1, 2, 5, 40]), draw.choice([0, 1, 3]), draw.choice([2, 9, 1000, 2**62])
    ids = torch.randint(0, highest, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    capacity = mask[0].numel()

    def instances(operator, volume, *options):
        rows, counts, geometry = operator(volume, *options, capacity)
        return rows, counts, used(geometry, counts)

    def results():
        for k in (0, rounds):
            yield connected_components(mask[:, None], k or None)
            yield from connected_components(mask[:, None], k or None, relabel=True)
            yield from instances(ops.find_instances, mask, k, least)
        yield from instances(ops.number_instances, ids, least)

    assert_same(*on_both(lambda: list(results())))


def check_loss(seed, changed=lambda tensor: tensor):
    """All terms and the gradient of a weighted sum of them, and the metrics; False if the call is refused."""
    *tensors, criteria, options = draw_call(seed)
    outputs, labels, ids, ignored = (None if tensor is None else changed(tensor) for tensor in tensors)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=outputs.dtype) * 2 - 1

    def step():
        x = outputs.clone().requires_grad_()
        terms = torch.stack(InstanceLoss(*criteria, **options)(x, labels, ids, ignore_mask=ignored))
        (terms * weights).sum().backward()
        return terms.detach(), torch.zeros_like(x) if x.grad is None else x.grad

    try:
        with using_backend("cpu"):
            step()
    except (ValueError, RuntimeError, AssertionError):  # such as a cross entropy of logits
        return False
    (terms, gradient), (true_terms, true_gradient) = on_both(step)
    assert_close("terms", terms, true_terms, 2 * tolerance(outputs.dtype, largest(true_terms)))
    # A float64 is not rounded once, as a float32 is, and loses the digits that a ratio near its bound shares with it.
    relative = tolerance(outputs.dtype) * (1 if outputs.dtype == torch.float32 else 64)
    assert_close("gradient", gradient, true_gradient, relative * max(1e-6, largest(true_gradient)))
    if outputs.isfinite().all():
        few = dict(list(options.items())[:7], ignore_mask=ignored, matching=("overlap", "iou", "dilated")[seed % 3])
        if few["matching"] == "dilated" and (ids is not None or few.get("num_iterations") is not None):
            few["matching"] = "overlap"
        if seed % 2:
            few["cc_output_batch"] = torch.arange(labels[:, :1].numel()).view(labels[:, :1].shape) // 5
            few["sizes"] = (2, 5)
        counted, truth = on_both(lambda: instance_metrics(outputs, labels, ids, **few))
        for name, ours, theirs in zip(truth._fields, counted, truth, strict=True):
            assert_close(name, ours, theirs, 1e-12)
    return True


def largest(values):
    """Largest absolute value."""
    return values.nan_to_num(0, 0, 0).abs().max().item()


def assert_close(what, ours, theirs, allowed):
    """Off by no more than is allowed; NaN where the other is."""
    off = largest(ours.double() - theirs.double())
    assert off <= allowed, f"{what} off by {off:.3g} of {largest(theirs):.3g}"
    assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{what} not finite elsewhere"


def check_pairs(seed):
    """Sums over many small instances that touch: the hash table of pairs, up to the last slot, and what it brings."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, shape = draw.choice([1, 2]), [draw.choice([3, 6, 9]) for _ in range(3)]
    rows, rest = draw.choice([2, 5, 30]), draw.choice([0, 4])
    out, lab = (torch.randint(-1, rows + 1, (batch, *shape), generator=g, dtype=torch.int32) for _ in range(2))
    if draw.random() < 0.4:
        lab = lab.clamp(max=1)
    out = torch.where((out == rows) & (rest > 0), rows + rest, out)
    kept = torch.tensor([draw.choice([rows, rows // 2, 0]) for _ in range(batch)], dtype=torch.int32)
    outputs, labels = (sites.flatten(1).amax(1).clamp(min=0).int() for sites in (out, lab))
    counts = torch.stack((outputs, torch.minimum(kept, outputs), labels))
    x = torch.rand((batch, *shape), generator=g, dtype=draw.choice([torch.float32, torch.float64]))
    activation, quantity, no_tp = draw.choice([ops.NONE, ops.SIGMOID]), draw.randrange(5), draw.choice([True, False])

    truths = [
        plain_sums(*case, rows, rest, activation, quantity, no_tp) for case in zip(x, out, lab, counts[1], strict=True)
    ]
    geometry = torch.zeros((2 * batch, rows, ops.GEOMETRY_COLUMNS), dtype=torch.int64)
    geometry[..., ops.SIZE] = torch.stack([truth[2] for truth in truths], 1).flatten(0, 1)
    most = max(truth[3] for truth in truths)
    slots = 1 << max(1, most).bit_length()  # often nearly full; the library takes twice as many at least
    sites = [torch.cat((out, lab)), torch.ones((batch, rest), dtype=torch.int32)]
    case = x, sites, counts, geometry, activation, quantity, no_tp, slots * draw.choice([1, 1, 4])
    sums, _, _, touched = ops.sum_instances(*case)
    allowed = 1e-5 if x.dtype == torch.float32 else 1e-11
    for sample, (true_sums, true_touched, _, _) in enumerate(truths):
        for side, (ours, theirs) in enumerate(zip(sums[sample::batch], true_sums, strict=True)):
            count = min(rows, int(counts[2 * side, sample]))
            if side == 0:  # which labels they touch is asked of kept outputs alone
                ours[counts[1, sample] :, ops.LABEL] = 0
            assert_close(f"sums of side {side}", ours[:count], theirs[:count], allowed * max(1, largest(theirs)))
        beyond = max(0, int(outputs[sample]) - rows)
        assert torch.equal(touched[sample, :beyond], true_touched[:beyond])


def plain_sums(x, out, lab, kept, rows, rest, activation, quantity, no_tp):
    """Of one sample: sums of both sides, which of the rest touch labels, sizes of both sides, how many pairs touch."""
    x, out, lab = x.flatten(), out.flatten(), lab.flatten()
    a = x if activation == ops.NONE else (out != 0).to(x.dtype)
    at_out, at_lab = (torch.arange(1, rows + rest + 1)[:, None] == sites for sites in (out, lab))
    on_label, on_output, inside = lab > 0, out > 0, (out > 0) & (out <= kept)
    none, one = (quantities.phi(quantity, a, torch.full_like(a, w)).double() for w in (0, 1))
    excess = torch.where(lab != 0, 0, quantities.phi(quantity, a * a, torch.zeros_like(a)).double()) if no_tp else none
    own = one if no_tp else one - none
    touching = ((at_out & inside).double() @ at_lab.double().T > 0).double()
    a, out_side, lab_side = a.double(), at_out.double(), at_lab.double()
    sizes = out_side.sum(1), lab_side.sum(1)
    outputs = [a, a * on_label, torch.where(on_label, one, none), 0 * a, on_label.double()]
    labels = [a, a * inside, own * inside, on_output.double(), inside.double()]
    out_sums, lab_sums = out_side @ torch.stack(outputs, 1), lab_side @ torch.stack(labels, 1)
    out_sums[:, ops.LABEL] = touching @ sizes[1]
    lab_sums[:, ops.COST] += touching.T @ (out_side @ excess)
    touched = (at_out & on_label).any(1)[rows:]
    return (out_sums[:rows], lab_sums[:rows]), touched, torch.stack(sizes)[:, :rows], int(touching.sum())


def check_regions(seed):
    """Cells bit for bit, and losses on them or on instances with their gradient, of every kind."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = [draw.choice([1, 2, 4]), *(draw.choice([1, 3, 8, 11, 17]) for _ in range(3))]
    kind, activation = draw.choice([ops.BLOB, ops.CELLS, ops.TVERSKY, ops.FALSE]), draw.choice([ops.NONE, ops.SIGMOID])
    rows = torch.randint(-1, 9, shape, generator=g, dtype=torch.int32)
    rows = torch.where(torch.rand(shape, generator=g) < draw.choice([0.02, 0.2, 0.9]), rows, 0)
    rows[1:2].clamp_(max=0)
    # (in steps that are no binary fractions, equally near is a matter of rounding)
    spacing = draw.choice([[1.0, 1.0, 1.0], [3.0, 0.5, 1.0]])
    near, truth = on_both(lambda: ops.cells(rows, spacing))
    assert torch.equal(near, truth), "cells differ"
    labels, counts = rows > 0, rows.flatten(1).amax(1).clamp(min=0)
    if kind == ops.CELLS:
        rows = torch.where(rows < 0, -1, near)
        if draw.random() < 0.5:  # two sides
            rows, counts = torch.cat((rows, rows.flip(0, 3))), torch.cat((counts, counts.flip(0)))
    labels |= torch.rand(shape, generator=g) < 0.05
    x = torch.randn(shape, generator=g, dtype=draw.choice([torch.float32, torch.float64])) * 3
    x = x.sigmoid() if activation == ops.NONE else x
    if draw.random() < 0.1:
        x.view(-1)[draw.randrange(x.numel())] = float("nan")
    modes = draw.choice([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    numbers = {
        ops.BLOB: [*modes, 0.1, float(seed % 2)],
        ops.CELLS: [*modes, 0.1, 0.3],
        ops.TVERSKY: [0.3, 0.7, draw.choice([1.0, 0.5]), 5.0, 0.1, 1e-5],
        ops.FALSE: [],
    }[kind]
    chosen = torch.rand((len(x), 9), generator=g) < 0.5 if kind == ops.FALSE else None
    labels = labels.to(draw.choice([torch.float32, torch.uint8, torch.bool]))
    classes, grad = 2 if len(x) > 1 and seed % 3 else 1, torch.tensor(1.5, dtype=x.dtype)

    def step():
        case = x, labels, rows, counts, chosen, activation, kind, numbers, classes, 9
        value, slopes, factors = ops.region_loss(*case)
        return value, ops.region_loss_backward(grad, x, labels, rows, slopes, factors, activation, kind)

    (value, gradient), (true_value, true_gradient) = on_both(step)
    assert_close("value", value, true_value, tolerance(x.dtype, largest(true_value)))
    if value.isfinite():
        assert_close("gradient", gradient, true_gradient, tolerance(x.dtype) * max(1e-6, largest(true_gradient)))


def check_claims(seed):
    """The loss of outputs that no label claims, where many touch several labels, and its gradient."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    labels = draw_mask(draw)[1][:, None].float()
    x = torch.randn(labels.shape, generator=g) + draw.choice([-2.0, -0.7, 0.0]) + draw.choice([0.0, 3.0]) * labels
    given = torch.randint(0, 7, labels.shape, generator=g) if draw.random() < 0.4 else None

    def step():
        leaf = x.clone().requires_grad_()
        value = FalseComponentLoss()(leaf, labels, given)
        value.backward()
        return value.detach(), leaf.grad

    (value, gradient), (true_value, true_gradient) = on_both(step)
    assert_close("value", value, true_value, tolerance(x.dtype))
    assert_close("gradient", gradient, true_gradient, tolerance(x.dtype) * max(1e-6, largest(true_gradient)))


CHECKS = (check_labelling, check_loss, check_pairs, check_regions, check_claims)


def check(which, seed, mode="order", arch=90):
    """One check in a mode; what is wrong says where."""
    MACHINE.use(mode, seed, arch)
    try:
        which(seed)
    except AssertionError as error:
        raise AssertionError(f"{which.__name__}, seed {seed}, mode {mode}, sm_{arch}: {error}") from error
