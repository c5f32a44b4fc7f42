"""Filters over a pixel's neighbourhood, and noise.

Images (B, 3, H, W) float in [0, 1] to such, with a parameter a sample (B,). The filters are sums of
shifted images: unlike a convolution of a library's choosing, they give a sample the same bits
whatever batch it stands in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some
from edgereg.errors import check_settings

__all__ = ["Blur", "Noise", "Sharpness", "gaussian_blur", "sharpness"]


@dataclass(frozen=True)
class Blur:
    """Blur by a Gaussian (Chen et al., 2002.05709, appendix A).

    Args:
        sigma: Smallest and largest standard deviation, in pixels; drawn evenly between them.
        probability: Of a sample being blurred, in [0, 1].
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, some of them blurred."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        return gaussian_blur(images, draws.uniform("sigma", *self.sigma)[:, 0])


@dataclass(frozen=True)
class Noise:
    """Add Gaussian noise to every value by itself, as a sensor does.

    Training with it acts like a penalty on the output's slope (Bishop, "Training with noise is
    equivalent to Tikhonov regularization", Neural Computation 7(1), 1995, section 2).

    Args:
        sigma: Largest standard deviation, in units of the full range; drawn evenly from 0.
        probability: Of a sample being changed, in [0, 1].
    """

    sigma: float = 0.05
    probability: float = 1.0

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images with noise."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        sigma = draws.uniform("sigma", 0.0, self.sigma)
        noise = draws.normal("noise", count=images[0].numel()).mul_(sigma)
        return noise.reshape(images.shape).to(images.dtype).add_(images).clamp_(0, 1)


@dataclass(frozen=True)
class Sharpness:
    """Blend with a smoothed copy, or away from it (Cubuk et al., 1805.09501, table 6).

    Args:
        sharpness: Largest change of the factor either way; 0 smooths, 1 leaves, 2 sharpens.
        probability: Of a sample being changed, in [0, 1].
    """

    sharpness: float = 0.9
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "", {"sharpness": ("in [0, 1]", 0 <= self.sharpness <= 1)})

    def recolour(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images, smoother or sharper."""
        return in_some(images, draws, self.probability, self._recolour)

    def _recolour(self, images: Tensor, draws: Draws) -> Tensor:
        factor = draws.uniform("factor", 1 - self.sharpness, 1 + self.sharpness)[:, 0]
        return sharpness(images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Return smooth + factor * (image - smooth), in [0, 1]; `factor` (B,) is not negative.

    Smooth is the mean over 3x3 pixels in which the middle counts 5 of 13, as in Pillow's
    ImageEnhance.Sharpness; the outermost pixels have no such mean and stay.
    """
    sharp = images.clone()
    if min(images.shape[2:]) < 3:
        return sharp
    middle = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth.add_(middle, alpha=4).div_(13)
    factor = factor.to(images.dtype)[:, None, None, None]
    sharp[:, :, 1:-1, 1:-1] = smooth.mul_(1 - factor).add_(middle * factor).clamp_(0, 1)
    return sharp


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by its own Gaussian; `sigma` (B,), in pixels, is above 0.

    The Gaussian is cut off at ceil(3 sigma), or where the image is smaller at its side less one,
    and normalized; beyond the border the image is mirrored about its outermost pixels.
    """
    sigma = sigma.to(images.dtype)
    reach = (3 * sigma).ceil()
    for dim in (3, 2):
        radius = min(math.ceil(reach.max().item()), images.shape[dim] - 1)
        away = torch.arange(radius + 1, dtype=images.dtype, device=images.device)
        weights = torch.exp(-0.5 * (away / sigma[:, None]) ** 2) * (away <= reach[:, None])
        weights = weights / (2 * weights.sum(dim=1, keepdim=True) - 1)
        images = _symmetric_sum(images, weights, dim)
    return images.clamp_(0, 1)


def _symmetric_sum(images: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Return sum over d of weights[:, |d|] * (the images shifted by d along `dim`)."""
    radius, length = weights.shape[1] - 1, images.shape[dim]
    sides = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
    padded = F.pad(images, sides, mode="reflect")
    total = images * weights[:, 0, None, None, None]
    for away in range(1, radius + 1):
        pair = padded.narrow(dim, radius - away, length) + padded.narrow(dim, radius + away, length)
        total.add_(pair.mul_(weights[:, away, None, None, None]))
    return total
