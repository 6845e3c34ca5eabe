"""What the tests of training loops train on: a tiny network, and patches with lesions that it can learn to find."""

import torch


def patches(count, shape, seed=0):
    """Images and labels (count, 1, *shape): four boxes of 2 or 3 voxels a side, brighter than the noise around them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, 1, *shape)
    for label in labels:
        for _ in range(4):
            sides = torch.randint(2, 4, (len(shape),), generator=generator).tolist()
            lows = [
                int(torch.randint(0, size - side + 1, (), generator=generator))
                for size, side in zip(shape, sides, strict=True)
            ]
            label[0][tuple(slice(low, low + side) for low, side in zip(lows, sides, strict=True))] = 1
    return labels + 0.2 * torch.randn(labels.shape, generator=generator), labels


def mostly_empty(count, shape, share=0.8, seed=0):
    """The same, but a share of the patches, the first ones, has no lesion."""
    images, lesions = patches(count, shape, seed)
    labels = lesions.clone()
    labels[: round(share * count)] = 0
    return images - lesions + labels, labels


def tiny_network(dims=3, seed=0):
    """Two convolutions, with the same weights for the same seed."""
    torch.manual_seed(seed)
    convolution = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    return torch.nn.Sequential(convolution(1, 4, 3, padding=1), torch.nn.ReLU(), convolution(4, 1, 3, padding=1))


def fell(losses):
    """Whether a training's losses ended at less than three quarters of where they began."""
    assert all(map(torch.isfinite, map(torch.as_tensor, losses))), losses
    return losses[-1] < 0.75 * losses[0]
