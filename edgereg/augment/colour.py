"""Colour augmentation: light, contrast, saturation and hue, a set of factors a sample.

The functions take images (B, 3, H, W) float in [0, 1] and a parameter a sample (B,); they return
new images of the same shape, dtype and range. The steps draw the parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some
from edgereg.errors import check_settings

__all__ = [
    "ColourJitter",
    "Greyscale",
    "RGBShift",
    "brightness",
    "contrast",
    "hue",
    "luma",
    "saturation",
]


@dataclass(frozen=True)
class RGBShift:
    """Scale and shift red, green and blue apart, as another light or another sensor would.

    Krizhevsky et al. (NeurIPS 2012, section 4.1) shift along the principal components of the
    colours; here each channel moves by itself.

    Args:
        shift: Largest addition either way, in units of the full range.
        gain: Largest relative change of a channel either way.
        probability: Of a sample being changed, in [0, 1].
    """

    shift: float = 0.1
    gain: float = 0.0
    probability: float = 1.0

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images with their channels moved apart."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        shift = draws.uniform("shift", -self.shift, self.shift, count=3)[:, :, None, None]
        gain = draws.uniform("gain", 1 - self.gain, 1 + self.gain, count=3)[:, :, None, None]
        return (images * gain).add_(shift).clamp_(0, 1)


@dataclass(frozen=True)
class ColourJitter:
    """Change brightness, contrast, saturation and hue, always in this order.

    The amounts are those of Howard (1312.5402, section 2.1). The order is fixed, as a random one
    would change little and could not be batched.

    Args:
        brightness: Largest relative change either way; likewise the next two.
        contrast: About the image's own mean lightness.
        saturation: About the pixel's own lightness.
        hue: Largest turn of the colour circle either way, in whole turns: 0.5 is every hue.
        probability: Of a sample being changed, in [0, 1].
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "", {"hue": ("in [0, 0.5]", 0 <= self.hue <= 0.5)})

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images in another light."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        # three passes over one buffer: memory is what this costs
        images = brightness(images, self._factor(draws, "brightness"))
        images = _towards(images, _mean_luma(images), self._factor(draws, "contrast"), out=images)
        images = _towards(images, luma(images), self._factor(draws, "saturation"), out=images)
        if self.hue:
            images = hue(images, draws.uniform("hue", -self.hue, self.hue)[:, 0])
        return images

    def _factor(self, draws: Draws, name: str) -> Tensor:
        limit: float = getattr(self, name)
        return draws.uniform(name, max(0.0, 1 - limit), 1 + limit)[:, 0]


@dataclass(frozen=True)
class Greyscale:
    """Take the colour away from some images (Chen et al., 2002.05709, appendix A).

    Args:
        probability: Of a sample becoming grey, in [0, 1].
    """

    probability: float = 0.2

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them grey."""
        return in_some(images, draws, self.probability, lambda some, _: luma(some).expand_as(some))


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return factor * x, at most 1; `factor` (B,) is not negative."""
    return (images * _aligned(factor, images)).clamp_(max=1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return m + factor * (x - m), in [0, 1], where m is the image's mean lightness.

    Args:
        images: (B, 3, H, W) in [0, 1].
        factor: (B,), not negative.
    """
    return _towards(images, _mean_luma(images), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return y + factor * (x - y), in [0, 1], where y is the pixel's lightness.

    Args:
        images: (B, 3, H, W) in [0, 1].
        factor: (B,), not negative.
    """
    return _towards(images, luma(images), factor)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each colour about the grey axis of the HSV cone; value and saturation stay.

    With M and m the greatest and the least channel, the hue h (in sixths of a turn) rises from one
    pure colour to the next; channel n of the turned colour is M - (M - m) * f(k), where
    k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue, and f(k) = max(0, min(k, 4 - k, 1)).

    Args:
        images: (B, 3, H, W) in [0, 1].
        turns: (B,), in whole turns; 1/3 makes red green.
    """
    red, green, blue = images.unbind(1)
    value, least = images.amax(dim=1), images.amin(dim=1)
    chroma = value - least
    spread = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / spread,
        torch.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    sixths.add_(6 * turns.to(images.dtype)[:, None, None])
    channels = []
    for offset in (5, 3, 1):
        place = torch.remainder(sixths + offset, 6)
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def luma(images: Tensor) -> Tensor:
    """Return (B, 1, H, W): the lightness of ITU-R BT.601."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _mean_luma(images: Tensor) -> Tensor:
    """Return (B, 1, 1, 1): each image's mean lightness."""
    # rows first: in a batch of one, a sum over the whole image would be split among threads
    return luma(images.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True))


def _towards(
    images: Tensor, target: Tensor, factor: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return target + factor * (images - target), in [0, 1]; overwrites `target`."""
    factor = _aligned(factor, images)
    target = target.mul_(1 - factor)
    return torch.mul(images, factor, out=out).add_(target).clamp_(0, 1)


def _aligned(factor: Tensor, images: Tensor) -> Tensor:
    return factor.to(images.dtype)[:, None, None, None]
