"""Random masks and calls of the losses, each from a seed."""

import random

import numpy as np
import torch
from kernel_cases import spiral
from monai.losses import DiceLoss, TverskyLoss

KINDS = ["noise"] * 3 + ["critical"] * 4 + ["spiral", "comb", "checkers", "lattice", "full", "smooth"]


def draw_mask(draw):
    """A mask (B, D, H, W) or (B, 1, H, W): its kind and itself; odd and single axes among them."""
    planar, g = draw.random() < 0.5, np.random.default_rng(draw.getrandbits(32))
    kind = draw.choice(KINDS)
    sides = [1, 2, 3, 5, 7, 8, 12, 16, 17, 20]
    if kind == "critical":  # noise about where it begins to hang together: large and winding components
        sides = [40, 53, 60] if planar else [14, 17, 20]
    shape = [draw.choice([1, 1, 2, 3]), 1 if planar else draw.choice(sides), draw.choice(sides), draw.choice(sides)]
    index = np.indices(shape)[1:]
    if kind == "spiral":
        layer = spiral(draw.choice([9, 21, 41]))
        mask = layer[None, None] if planar else np.stack([layer, layer * 0, layer[::-1]])[None]
    elif kind == "comb":
        back = index[1] == shape[2] - 1
        mask = (index[2] % 2 == 0) & ~back | back & (g.random(shape) >= 0.1)
    elif kind == "checkers":
        mask = index.sum(0) % 2 == 0
    elif kind == "lattice":
        mask = (index % 2 == 0).all(0)
    elif kind == "full":
        mask = np.full(shape, draw.random() < 0.7)
    elif kind == "smooth":
        values = g.random(shape)
        for axis in (1, 2, 3):
            values = values + np.roll(values, 1, axis) + np.roll(values, -1, axis)
        mask = values > np.quantile(values, draw.choice([0.3, 0.6, 0.9]))
    else:
        densities = [0.35, 0.42, 0.5] if planar else [0.08, 0.12, 0.2]
        mask = g.random(shape) < draw.choice(densities if kind == "critical" else [0.05, 0.2, 0.3, 0.5, 0.7, 0.95])
    return kind, torch.from_numpy(np.ascontiguousarray(mask, dtype=bool))


def draw_call(seed):
    """Outputs, labels, their ids or none, criteria and options of a call of InstanceLoss."""
    draw, g = random.Random(seed), np.random.default_rng(seed)
    dims, batch = draw.choice([2, 3]), draw.choice([1, 1, 2, 3])
    spatial = [draw.choice([1, 2, 5, 8, 11, 13, 16]) for _ in range(dims)]
    spatial[-1] = 17 if max(spatial) < 5 else spatial[-1]
    activation = draw.choice(["none", "sigmoid", "softmax"])
    channels = draw.choice([2, 3]) if activation == "softmax" else draw.choice([1, 1, 3])
    classes = draw.choice([channels - 1, tuple(range(channels))[-2:]]) if channels > 1 else 0
    truth = g.random((batch, 1, *spatial)) < draw.choice([0, 0.02, 0.1, 0.4])
    for axis in range(2, truth.ndim if draw.random() < 0.5 else 0):
        truth |= np.roll(truth, 1, axis)
    wanted = np.roll(truth, int(draw.random() < 0.7), -1) * 2.0 - 1
    logits = wanted * draw.choice([0, 1, 3]) + g.normal(size=(batch, channels, *spatial)) * draw.choice([0.3, 1, 2])
    outputs = torch.tensor(logits, dtype=draw.choice([torch.float32, torch.float64]))
    if activation == "none":
        outputs = outputs.sigmoid()
        outputs = (outputs > 0.5).to(outputs.dtype) if draw.random() < 0.3 else outputs
    several = isinstance(classes, tuple)
    labels = torch.tensor(np.broadcast_to(truth, (batch, channels, *spatial)) if several else truth)
    labels = labels.to(draw.choice([torch.float32, torch.float64, torch.uint8, torch.int64, torch.int32, torch.bool]))
    ids = None
    if not several and draw.random() < 0.2:
        ids = torch.tensor(g.integers(0, draw.choice([3, 50]), truth.shape))
    ignored = torch.tensor(g.random(truth.shape) < 0.1) if draw.random() < 0.15 else None
    thresholds = [0.5, 0.5, 0.3, 0.7] + [0.0, 1.5] * (activation == "none" and ignored is None)
    options = {
        "activation": activation,
        "num_out_chn": channels,
        "object_chn": classes,
        "spatial_dims": dims,
        "num_iterations": draw.choice([None, None, None, 1, 4]),
        "segmentation_threshold": draw.choice(thresholds),
        "min_instance_size": draw.choice([0, 0, 0, 1, 4]),
        "max_cc_out": draw.choice([50, 50, 2, 0]),
        "mul_too_many": draw.choice([50, 50, 1, 0.5]),
        "reduce_segmentation": draw.choice(["mean", "sum"]),
        "instance_wise_reduce": draw.choice(["instance", "data"]),
        "centroid_offset": draw.choice([3, 0, 1, 5]),
        "instance_wise_loss_no_tp": draw.choice([True, False]),
        "rate_instead_number": draw.choice([True, False]),
        "gradients": draw.choice(["surrogate", "surrogate", "reference"]),
        "spacing": draw.choice([None, None, (3.0, 0.5, 1.0)[:dims]]),
    }
    fused = [None, DiceLoss(), DiceLoss(jaccard=True), DiceLoss(squared_pred=True), TverskyLoss(alpha=0.3, beta=0.7)]
    fused += [torch.nn.MSELoss(), torch.nn.L1Loss()]
    entropy = torch.nn.BCELoss()
    criteria = [draw.choice(fused if activation == "sigmoid" else [*fused, entropy]), draw.choice([*fused, entropy])]
    if criteria[0] is entropy:
        labels = labels.to(outputs.dtype)
    if draw.random() < 0.03:
        outputs.view(-1)[draw.randrange(outputs.numel())] = draw.choice([float("nan"), float("inf")])
    return outputs, labels, ids, ignored, [*criteria, draw.choice(fused)], options
