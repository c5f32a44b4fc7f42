"""Geometric augmentation as one affine map a sample.

Each technique is a 3x3 matrix a sample, in pixels from the image's centre, that maps a place in
the output to the place in the input it is taken from. Consecutive techniques multiply, so that the
pixels are resampled once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.augment.draws import Draws

__all__ = ["Affine", "Flip", "ResizedCrop", "Translate", "warp"]


@dataclass(frozen=True)
class Flip:
    """Mirror left and right.

    Args:
        probability: Of being mirrored, in [0, 1].
    """

    probability: float = 0.5

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = _identities(draws)
        matrices[:, 0, 0] = 1 - 2 * draws.chance("flip", self.probability).float()
        return matrices


@dataclass(frozen=True)
class Affine:
    """Rotate, scale, shear and translate about the centre.

    Args:
        degrees: Largest rotation either way, in degrees.
        scale: Smallest and largest enlargement; log-uniform between them.
        shear: Largest horizontal shear either way, in degrees.
        translate: Largest shift either way, as a share of the width and of the height.
    """

    degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    translate: float = 0.0

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        angle = torch.deg2rad(draws.uniform("degrees", -self.degrees, self.degrees)[:, 0])
        zoom = draws.log_uniform("scale", *self.scale)[:, 0]
        slant = torch.tan(torch.deg2rad(draws.uniform("shear", -self.shear, self.shear)[:, 0]))
        shift = draws.uniform("translate", -self.translate, self.translate, count=2)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        matrices = _identities(draws)
        matrices[:, 0, 0], matrices[:, 0, 1] = cos, sin + cos * slant
        matrices[:, 1, 0], matrices[:, 1, 1] = -sin, cos - sin * slant
        matrices[:, 0, 2], matrices[:, 1, 2] = shift[:, 0] * width, shift[:, 1] * height
        return matrices


@dataclass(frozen=True)
class Translate:
    """Shift by whole pixels, which resamples nothing: a crop of the padded image.

    Args:
        pixels: Largest shift either way.
    """

    pixels: int

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = _identities(draws)
        matrices[:, :2, 2] = draws.integers("translate", 2 * self.pixels + 1, count=2) - float(
            self.pixels
        )
        return matrices


@dataclass(frozen=True)
class ResizedCrop:
    """Take a part of the image and enlarge it (Szegedy et al., 1409.4842, section 6).

    Args:
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height of the part, relative to the image's;
            log-uniform.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        area = draws.uniform("area", *self.area)[:, 0]
        stretch = torch.sqrt(draws.log_uniform("ratio", *self.ratio)[:, 0])
        side = torch.sqrt(area)
        across, down = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        place = draws.uniform("place", -0.5, 0.5, count=2)
        matrices = _identities(draws)
        matrices[:, 0, 0], matrices[:, 1, 1] = across, down
        matrices[:, 0, 2] = place[:, 0] * (1 - across) * width
        matrices[:, 1, 2] = place[:, 1] * (1 - down) * height
        return matrices


def warp(
    images: Tensor,
    matrices: Tensor,
    *,
    size: tuple[int, int] | None = None,
    padding: Literal["border", "reflection", "zeros"] = "border",
) -> Tensor:
    """Resample each image through its own matrix, bilinearly.

    Args:
        images: (B, C, H, W) float.
        matrices: (B, 3, 3), in pixels of the input from its centre; where `size` differs from the
            input's, the output is first stretched over the input.
        size: Height and width of the output; the input's if None.
        padding: What lies beyond the image.

    Returns:
        (B, C, *size), of the images' dtype.
    """
    height, width = images.shape[2:]
    # grid_sample counts in half images: -1 and 1 are the outer edges (align_corners=False)
    half = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    theta = matrices[:, :2].to(images).clone()
    theta[:, :, :2] = theta[:, :, :2] * half[None, None, :] / half[None, :, None]
    theta[:, :, 2] = theta[:, :, 2] / half
    shape = [*images.shape[:2], *(size or (height, width))]
    grid = F.affine_grid(theta, shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _identities(draws: Draws) -> Tensor:
    return torch.eye(3, device=draws.indices.device).repeat(len(draws), 1, 1)
