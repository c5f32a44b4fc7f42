"""A plain convolutional network that learns small images in few epochs (Jordan, 2404.00498).

Differs from the paper's: the stem is learnt and has a BatchNorm instead of being computed from the
data, every BatchNorm stands directly behind its convolution, so that it folds, and the head's
logits are not scaled.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["ConvNet"]

_STEM = 24  # channels; the paper's 2x2 patches have 12 components, each with both signs


class ConvNet(nn.Module):
    """Turn images into one vector each.

    Args:
        widths: Channels of each stage; each stage halves the resolution.
    """

    def __init__(self, *, widths: tuple[int, ...] = (64, 256, 256)) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, _STEM, 2, padding=0), nn.GELU())
        self.stages = nn.Sequential(*(_stage(*pair) for pair in pairwise((_STEM, *widths))))
        self.pool = nn.AdaptiveMaxPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, widths[-1]) from images (B, 3, H, W) of any size, normalized."""
        features: Tensor = self.pool(self.stages(self.stem(images))).flatten(1)
        return features


def _stage(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        *_convolution(channels, out_channels, 3, padding=1),
        nn.MaxPool2d(2),
        nn.GELU(),
        *_convolution(out_channels, out_channels, 3, padding=1),
        nn.GELU(),
    )


def _convolution(
    channels: int, out_channels: int, size: int, *, padding: int
) -> tuple[nn.Module, ...]:
    """The first filters hand their input on at the start (the paper's section 3.3)."""
    convolution = nn.Conv2d(channels, out_channels, size, padding=padding, bias=False)
    if size == 3:
        with torch.no_grad():
            nn.init.dirac_(convolution.weight[:channels])
    return convolution, nn.BatchNorm2d(out_channels)
