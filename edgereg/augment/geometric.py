"""Geometric augmentation as one affine map a sample.

Each technique is a 3x3 matrix a sample, in pixels from the image's centre, that maps a place in
the output to the place in the input it is taken from. Consecutive techniques multiply, so that the
pixels are resampled once.

None of them needs an antialiasing filter beyond the bilinear one, as long as it enlarges: a crop of
an image that has the output's size always does. A scale below 1 shrinks without a filter, as
torchvision's and Pillow's affine maps do.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import move_some
from edgereg.errors import RecipeError

__all__ = [
    "Affine",
    "Beyond",
    "Crop",
    "Flip",
    "ResizedCrop",
    "Rotate",
    "Scale",
    "Shear",
    "Translate",
    "VerticalFlip",
    "warp",
]

Beyond = Literal["border", "reflection", "zeros"]


@dataclass(frozen=True)
class Flip:
    """Mirror left and right (Krizhevsky et al., NeurIPS 2012, section 4.1).

    Args:
        probability: Of being mirrored, in [0, 1].
        alternate: Whether an image is mirrored in every second epoch, half of them in the first,
            so that two epochs in a row show all there is to see (Jordan, 2404.00498, alternating
            flip).
    """

    beyond: ClassVar[None] = None
    probability: float = 0.5
    alternate: bool = False

    def __post_init__(self) -> None:
        if self.alternate and self.probability != 0.5:
            raise RecipeError(
                "flips that alternate have no probability of their own",
                found=f"probability: {self.probability}, alternate: true",
                remedy="leave one of them out",
            )

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        if self.alternate:
            flips = replace(draws, epoch=0).chance("flip", 0.5) ^ bool(draws.epoch % 2)
        else:
            flips = draws.chance("flip", self.probability)
        matrices = _identities(draws)
        matrices[:, 0, 0] = 1 - 2 * flips.float()
        return matrices


@dataclass(frozen=True)
class VerticalFlip:
    """Mirror top and bottom, for images without an up, such as those taken from above.

    Args:
        probability: Of being mirrored, in [0, 1].
    """

    beyond: ClassVar[None] = None
    probability: float = 0.5

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = _identities(draws)
        matrices[:, 1, 1] = 1 - 2 * draws.chance("flip", self.probability).float()
        return matrices


@dataclass(frozen=True)
class Affine:
    """Rotate, scale, shear and translate about the centre (Simard et al., ICDAR 2003, section 2).

    Args:
        degrees: Largest rotation either way, in degrees.
        scale: Smallest and largest enlargement; log-uniform between them.
        shear: Largest horizontal shear either way, in degrees.
        translate: Largest shift either way, as a share of the width and of the height.
        probability: Of a sample being moved, in [0, 1].
        beyond: What lies beyond the image: "border" repeats the outermost pixels, "reflection"
            mirrors the image at its outer edge, "zeros" is black.
    """

    degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    translate: float = 0.0
    probability: float = 1.0
    beyond: Beyond = "border"

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
        return move_some(matrices, draws, self.probability)


@dataclass(frozen=True)
class Rotate:
    """Rotate about the centre.

    Args:
        degrees: Largest rotation either way, in degrees.
        probability: Of a sample being turned, in [0, 1].
        beyond: See Affine.
    """

    degrees: float
    probability: float = 1.0
    beyond: Beyond = "border"

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = Affine(degrees=self.degrees).matrices(draws, height, width)
        return move_some(matrices, draws, self.probability)


@dataclass(frozen=True)
class Scale:
    """Enlarge or shrink about the centre.

    Args:
        scale: Smallest and largest enlargement; log-uniform between them.
        probability: Of a sample being scaled, in [0, 1].
        beyond: See Affine.
    """

    scale: tuple[float, float]
    probability: float = 1.0
    beyond: Beyond = "border"

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = Affine(scale=self.scale).matrices(draws, height, width)
        return move_some(matrices, draws, self.probability)


@dataclass(frozen=True)
class Shear:
    """Slant the image: first rows move sideways, then columns up and down.

    Args:
        horizontal: Largest angle of the columns either way, in degrees below 90.
        vertical: Of the rows.
        probability: Of a sample being slanted, in [0, 1].
        beyond: See Affine.
    """

    horizontal: float
    vertical: float = 0.0
    probability: float = 1.0
    beyond: Beyond = "border"

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        matrices = Affine(shear=self.horizontal).matrices(draws, height, width)
        down = _identities(draws)
        angle = draws.uniform("vertical", -self.vertical, self.vertical)[:, 0]
        down[:, 1, 0] = torch.tan(torch.deg2rad(angle))
        return move_some(matrices @ down, draws, self.probability)


@dataclass(frozen=True)
class Translate:
    """Shift by whole pixels, which resamples nothing: a crop of the padded image.

    Args:
        pixels: Largest shift either way.
        probability: Of a sample being shifted, in [0, 1].
        beyond: See Affine.
    """

    pixels: int
    probability: float = 1.0
    beyond: Beyond = "border"

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        shift = draws.integers("translate", 2 * self.pixels + 1, count=2) - float(self.pixels)
        matrices = _identities(draws)
        matrices[:, :2, 2] = shift
        return move_some(matrices, draws, self.probability)


@dataclass(frozen=True)
class Crop:
    """Pad all sides and cut out a part of the old size (He et al., 1512.03385, section 4.2).

    Args:
        padding: Pixels a side.
        probability: Of a sample being cropped, in [0, 1].
        beyond: What to pad with, see Affine; the paper's is zeros.
    """

    padding: int = 4
    probability: float = 1.0
    beyond: Beyond = "zeros"

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return (B, 3, 3)."""
        return Translate(self.padding, self.probability).matrices(draws, height, width)


@dataclass(frozen=True)
class ResizedCrop:
    """Take a part of the image and enlarge it (Szegedy et al., 1409.4842, section 6).

    Args:
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height of the part, relative to the image's;
            log-uniform.
        probability: Of a sample being cropped, in [0, 1].
    """

    beyond: ClassVar[None] = None
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    probability: float = 1.0

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
        return move_some(matrices, draws, self.probability)


def warp(
    images: Tensor,
    matrices: Tensor,
    *,
    size: tuple[int, int] | None = None,
    padding: Beyond = "border",
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
    rows, columns = size or (height, width)
    # grid_sample counts in half images: -1 and 1 are the outer edges (align_corners=False)
    half = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    theta = matrices[:, :2].to(images)
    turn = theta[:, :, :2] * half[None, None, :] / half[None, :, None]
    across = turn[:, :, 0, None] * _centres(columns, images)
    down = turn[:, :, 1, None] * _centres(rows, images) + theta[:, :, 2, None] / half[:, None]
    # two planes, x and y, are five times as fast to fill as the pairs that affine_grid multiplies
    grid = (across[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _centres(count: int, like: Tensor) -> Tensor:
    """Return (count,): the pixels' centres between the outer edges -1 and 1."""
    places = torch.arange(1 - count, count, 2, dtype=like.dtype, device=like.device)
    return places / count


def _identities(draws: Draws) -> Tensor:
    return torch.eye(3, device=draws.indices.device).repeat(len(draws), 1, 1)
