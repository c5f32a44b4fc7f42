"""Tone curves: each pixel's value is replaced by another, channel by channel.

The functions take images (B, 3, H, W) float in [0, 1] and, where they have one, a parameter a
sample (B,); they return new images of the same shape, dtype and range. The steps draw the
parameter. They are the operations that AutoAugment took from Pillow (Cubuk et al., 1805.09501,
table 6), here on floats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some
from edgereg.errors import check_settings

__all__ = [
    "Autocontrast",
    "Equalize",
    "Posterize",
    "Solarize",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
]

_LEVELS = 256


@dataclass(frozen=True)
class Posterize:
    """Keep the leading bits of each colour (Cubuk et al., 1805.09501, table 6).

    Args:
        bits: Fewest bits kept, in 1..8; between it and 8, evenly.
        probability: Of a sample being changed, in [0, 1].
    """

    bits: int = 4
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "", {"bits": ("in 1..8", 1 <= self.bits <= 8)})

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images with fewer colours."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        return posterize(images, self.bits + draws.integers("bits", 9 - self.bits)[:, 0])


@dataclass(frozen=True)
class Solarize:
    """Invert what is brighter than a threshold (Cubuk et al., 1805.09501, table 6).

    Args:
        threshold: Lowest threshold, in [0, 1]; drawn between it and 1. BYOL (2006.07733,
            appendix B) has one of 0.5.
        probability: Of a sample being changed, in [0, 1].
    """

    threshold: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "", {"threshold": ("in [0, 1]", 0 <= self.threshold <= 1)})

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images with their highlights inverted."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        return solarize(images, draws.uniform("threshold", self.threshold, 1.0)[:, 0])


@dataclass(frozen=True)
class Autocontrast:
    """Stretch each channel over the whole range (Cubuk et al., 1805.09501, table 6).

    Args:
        probability: Of a sample being changed, in [0, 1].
    """

    probability: float = 0.5

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them stretched."""
        return in_some(images, draws, self.probability, lambda some, _: autocontrast(some))


@dataclass(frozen=True)
class Equalize:
    """Make each channel's values about equally frequent (Cubuk et al., 1805.09501, table 6).

    Args:
        probability: Of a sample being changed, in [0, 1].
    """

    probability: float = 0.5

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them equalized."""
        return in_some(images, draws, self.probability, lambda some, _: equalize(some))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep `bits` (B,) bits of each value: floor(x * 2^bits) / 2^bits, 1 as if just below it."""
    levels = torch.exp2(bits.to(images.dtype))[:, None, None, None]
    steps = (images * levels).floor_()
    return torch.minimum(steps, levels - 1).div_(levels)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Replace each x at or above `threshold` (B,), in [0, 1], by 1 - x."""
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


def invert(images: Tensor) -> Tensor:
    """Replace each x by 1 - x."""
    return 1 - images


def autocontrast(images: Tensor) -> Tensor:
    """Move each channel's least value to 0 and its greatest to 1; leave a channel of one value."""
    least, greatest = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    is_flat = least == greatest
    least = torch.where(is_flat, 0.0, least)
    return ((images - least).div_(torch.where(is_flat, 1.0, greatest - least))).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Flatten each channel's histogram over 256 levels, as Pillow's ImageOps.equalize does.

    A level is replaced by the share of pixels below it, in whole steps of 1/255; the last level
    that occurs counts for nothing, so that the brightest becomes 1. A channel of one value stays.
    """
    count, channels = images.shape[:2]
    levels = (images * (_LEVELS - 1)).round_().long().reshape(count * channels, -1)
    row = torch.arange(count * channels, device=images.device)[:, None]
    histogram = torch.bincount((row * _LEVELS + levels).flatten(), minlength=len(row) * _LEVELS)
    histogram = histogram.reshape(-1, _LEVELS)
    last = (histogram > 0).long().mul_(torch.arange(_LEVELS, device=images.device)).argmax(dim=1)
    step = (levels.shape[1] - histogram.gather(1, last[:, None])) // (_LEVELS - 1)
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=_LEVELS - 1)
    table = torch.where(step == 0, torch.arange(_LEVELS, device=images.device), table)
    return table.gather(1, levels).to(images.dtype).div_(_LEVELS - 1).reshape(images.shape)
