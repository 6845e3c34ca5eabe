"""SPEC section 8 stated plainly: a boolean volume for each region, loops over pairs, brute force, torch autograd."""

import torch
import torch.nn.functional as F
from reference import reference_components
from torch import Tensor


def reference_cells(rows: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """Row of the nearest voxel that has one, of equally near ones the largest, of one volume (*spatial)."""
    places = (rows > 0).nonzero()
    if len(places) == 0:
        return torch.zeros_like(rows)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, rows.shape), indexing="ij"), -1).reshape(-1, rows.ndim)
    steps = torch.tensor(spacing, dtype=torch.float64)
    distances = (((grid[:, None] - places[None]).double() * steps) ** 2).sum(-1)
    nearest = distances.min(1, keepdim=True).values
    return torch.where(distances == nearest, rows[tuple(places.T)], 0).max(1).values.view(rows.shape).to(rows.dtype)


def number(ids: Tensor) -> list[Tensor]:
    """The instances of one volume as masks, in the order of their ids."""
    return [ids == each for each in ids.unique().tolist() if each > 0]


def reference_loss(
    name: str,
    outputs: Tensor,
    labels: Tensor,
    cc_label_batch: Tensor | None = None,
    *,
    ignored: Tensor | None = None,
    activation: str = "sigmoid",
    channels: tuple[int, ...] = (0,),
    threshold: float | None = None,
    **own: object,
) -> Tensor:
    """The loss `name` of outputs (B, N, *spatial) and labels (B, 1 or N, *spatial); mean over `channels`."""
    threshold = threshold or (1 / outputs.shape[1] if activation == "softmax" else 0.5)
    of_classes = []
    for channel in channels:
        samples = []
        for b in range(len(outputs)):
            y = labels[b, channel if labels.shape[1] > 1 else 0] > 0.5
            kept = torch.ones_like(y) if ignored is None else ~ignored[b, 0]
            samples.append(sample_of(outputs[b], channel, y & kept, kept, cc_label_batch, b, activation, threshold))
        of_classes.append(LOSSES[name](samples, **own))
    # (connected whatever comes of it)
    return torch.stack(of_classes).mean() + 0.0 * outputs.sum()


def sample_of(x, channel, y, kept, cc_label_batch, b, activation, threshold):
    """One class of one sample: p, y, cross entropy at each voxel, instances of both sides, voxels that are kept."""
    if activation == "softmax":
        # (of all other classes together: -log(1 - p) without cancellation)
        others = torch.cat((x[:channel], x[channel + 1 :])).logsumexp(0)
        logit = x[channel] - others
    else:
        logit = x[channel]
    if activation == "none":
        p = x[channel]
        ce = torch.where(y, -p.log().clamp(min=-100.0), -torch.log1p(-p).clamp(min=-100.0))
    else:
        p = logit.sigmoid()
        ce = torch.where(y, F.softplus(-logit, threshold=100.0), F.softplus(logit, threshold=100.0))
    foreground = (p.detach() >= threshold) & kept
    ids = reference_components(y[None, None])[0, 0] if cc_label_batch is None else cc_label_batch[b, 0] * y
    return {
        "p": p,
        "y": y,
        "ce": ce,
        "kept": kept,
        "labels": number(ids),
        "outputs": number(reference_components(foreground[None, None])[0, 0]),
    }


def blob(samples, mode="dice_ce", smooth=1e-5, masking="probabilities"):
    """Mean over samples with instances of the mean over these."""
    values = []
    for each in samples:
        p, ce, background = each["p"], each["ce"], ~each["y"] & each["kept"]
        of_blobs = []
        foreground = sum(int(blob.sum()) for blob in each["labels"])
        for blob in each["labels"]:
            size, value = int(blob.sum()), 0.0
            others = foreground - size if masking == "logits" else 0
            if mode != "ce":
                below = p[blob].sum() + p[background].sum() + others / 2 + size + smooth
                value = value + 1 - (2 * p[blob].sum() + smooth) / below
            if mode != "dice":
                cost = ce[blob].sum() + ce[background].sum() + others * torch.log(torch.tensor(2.0, dtype=p.dtype))
                value = value + cost / (size + int(background.sum()) + others)
            of_blobs.append(value)
        if of_blobs:
            values.append(torch.stack(of_blobs).mean())
    return torch.stack(values).mean() if values else samples[0]["p"].new_zeros(())


def cells(samples, mode="dice_ce", smooth=0.0, alpha=0.0, spacing=None):
    """Both sides, weighted."""
    total = 0.0
    for side, share in (("labels", 1 - alpha), ("outputs", alpha)):
        if share:
            total = total + share * cells_of_side(samples, side, mode, smooth, spacing)
    return total


def cells_of_side(samples, side, mode, smooth, spacing):
    """Mean over samples of the mean over cells."""
    values = []
    for each in samples:
        rows = torch.zeros(each["y"].shape, dtype=torch.int32)
        for row, mask in enumerate(each[side], start=1):
            rows[mask] = row
        owner = reference_cells(rows, spacing or (1.0,) * rows.ndim)
        of_cells = []
        for row in range(1, len(each[side]) + 1) if each[side] else (0,):
            cell = (owner == row) & each["kept"]
            p, y, value = each["p"][cell], each["y"][cell].double(), each["p"].new_zeros(())
            if mode != "ce" and (y.sum() > 0 or row == 0):
                value = value + 1 - (2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth).clamp(min=1e-8)
            elif mode != "ce":
                value = value + (p * p.detach()).sum() / p.sum().detach().clamp(min=1e-8)
            if mode != "dice":
                value = value + each["ce"][cell].sum() / max(len(p), 1)
            of_cells.append(value)
        values.append(torch.stack(of_cells).mean())
    return torch.stack(values).mean()


def tversky(samples, alpha=0.3, beta=0.7, gamma=1.0, epsilon=5.0, background_weight=0.1, smooth=1e-5):
    """1 - mean over samples, 0 without foreground."""
    if not any(each["labels"] for each in samples):
        return samples[0]["p"].new_zeros(())
    ratios = []
    for each in samples:
        p = each["p"]
        hit = missed = p.new_zeros(())
        for blob in each["labels"]:
            weight = (int(blob.sum()) + epsilon) ** -gamma
            hit = hit + weight * p[blob].sum()
            missed = missed + weight * (1 - p[blob]).sum()
        false = background_weight * p[~each["y"] & each["kept"]].sum()
        ratios.append((hit + smooth) / (hit + alpha * false + beta * missed + smooth))
    return 1 - torch.stack(ratios).mean()


def false(samples):
    """Mean over all outputs that no label claims."""
    values = []
    for each in samples:
        claimed = set()
        for blob in each["labels"]:
            touching = [i for i, output in enumerate(each["outputs"]) if (output & blob).any()]

            def dice(i, each=each, blob=blob):
                output = each["outputs"][i]
                return 2 * int((output & blob).sum()) / (int(output.sum()) + int(blob.sum()))

            if touching:
                claimed.add(max(touching, key=lambda i: (dice(i), -i)))
        values += [each["p"][output].mean() for i, output in enumerate(each["outputs"]) if i not in claimed]
    return torch.stack(values).mean() if values else samples[0]["p"].new_zeros(())


LOSSES = {"BlobLoss": blob, "CCLoss": cells, "ComponentTverskyLoss": tversky, "FalseComponentLoss": false}
