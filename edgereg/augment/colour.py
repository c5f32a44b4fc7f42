"""Colour augmentation, one set of factors a sample; images (B, 3, H, W) float in [0, 1] to such."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.draws import Draws

__all__ = ["ColourJitter", "Greyscale", "RGBShift", "luma"]


@dataclass(frozen=True)
class RGBShift:
    """Scale and shift red, green and blue apart, as another light or another sensor would.

    Krizhevsky et al. (NeurIPS 2012, section 4.1) shift along the principal components of the
    colours; here each channel moves by itself.

    Args:
        shift: Largest addition either way, in units of the full range.
        gain: Largest relative change of a channel either way.
    """

    shift: float = 0.1
    gain: float = 0.0

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images with their channels moved apart."""
        shift = draws.uniform("shift", -self.shift, self.shift, count=3)[:, :, None, None]
        gain = draws.uniform("gain", 1 - self.gain, 1 + self.gain, count=3)[:, :, None, None]
        return (images * gain + shift).clamp(0, 1)


@dataclass(frozen=True)
class ColourJitter:
    """Change brightness, contrast and saturation, in this order.

    Args:
        brightness: Largest relative change either way; likewise the others.
        contrast: About the image's own mean lightness.
        saturation: About the pixel's own lightness.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images in another light."""
        images = (images * self._factor(draws, "brightness")).clamp(0, 1)
        mean = luma(images).mean(dim=(2, 3), keepdim=True)
        images = torch.lerp(mean.expand_as(images), images, self._factor(draws, "contrast")).clamp(
            0, 1
        )
        grey = luma(images).expand_as(images)
        return torch.lerp(grey, images, self._factor(draws, "saturation")).clamp(0, 1)

    def _factor(self, draws: Draws, name: str) -> Tensor:
        limit: float = getattr(self, name)
        return draws.uniform(name, max(0.0, 1 - limit), 1 + limit)[:, :, None, None]


@dataclass(frozen=True)
class Greyscale:
    """Take the colour away from some images.

    Args:
        probability: In [0, 1].
    """

    probability: float = 0.2

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them grey."""
        chosen = draws.chance("greyscale", self.probability)[:, None, None, None]
        return torch.where(chosen, luma(images), images)


def luma(images: Tensor) -> Tensor:
    """Return (B, 1, H, W): the lightness of ITU-R BT.601."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]
