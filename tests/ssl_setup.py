"""What the tests of self-supervised methods build them from."""

import torch

from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws
from edgereg.ssl.method import Setup

MEAN = (0.5, 0.5, 0.5)


def setup(backbone, *, feature_dim=8, size=30, image_size=32, augment=(), sample=None):
    """Return a setup that augments by `augment`, not at all by default, and does not normalize."""
    if sample is None:
        generator = torch.Generator().manual_seed(5)
        shape = (16, 3, image_size, image_size)
        sample = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Setup(
        backbone=backbone,
        feature_dim=feature_dim,
        image_size=image_size,
        size=size,
        sample=sample,
        chain=build_chain(list(augment), MEAN, key="augment"),
        normalize=lambda images: images,
    )


def draws(count, epoch=0):
    """Return the draws of each view of images 0..count-1."""
    return lambda view: Draws(0, 64 * epoch + view, torch.arange(count))
