"""Hide a part of each image."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some
from edgereg.errors import check_settings

__all__ = ["Cutout", "RandomErasing"]

_TRIES = 10  # for a box that fits


@dataclass(frozen=True)
class Cutout:
    """Hide a square whose centre lies anywhere (DeVries and Taylor, 1708.04552, section 3.2).

    The square is clipped at the border, so that less than its area is hidden on average: a centre
    near the border is what the paper found to matter. It is filled with the mean colour, which is
    zero after normalization.

    Args:
        size: Side of the square, in pixels.
        probability: In [0, 1]; the paper's is 1.
    """

    size: int = 8
    probability: float = 1.0

    def erase(self, images: Tensor, draws: Draws, mean: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) with a square of colour `mean` (3,) in each."""
        chosen = draws.chance("chosen", self.probability)[:, None]
        rows, columns = (
            _span(draws.integers(name, length), self.size, length) & chosen
            for name, length in zip(("row", "column"), images.shape[2:], strict=True)
        )
        hidden = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(hidden, mean[None, :, None, None], images)


@dataclass(frozen=True)
class RandomErasing:
    """Hide a box that lies wholly inside (Zhong et al., 1708.04896, algorithm 1).

    Area and ratio are drawn anew, up to ten times, until the box is no longer than the image, and
    its place then among those where it fits, as the authors' code does; algorithm 1 draws all again
    for a place where it does not. Where no box of the ten fits, nothing is hidden.

    Args:
        probability: Of hiding a box, in [0, 1].
        area: Smallest and largest share of the image's area, at most 1; drawn evenly.
        ratio: Smallest and largest height / width of the box in pixels; drawn evenly.
        fill: "random", the paper's, draws every value of every pixel by itself; "mean" is the mean
            colour, "zero" black.
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    fill: Literal["random", "mean", "zero"] = "random"

    def __post_init__(self) -> None:
        squarest = min(max(self.ratio[0], 1.0), self.ratio[1])
        fits = self.area[0] * max(squarest, 1 / squarest) <= 1
        check_settings(
            self,
            "",
            {
                "area": ("at most 1", self.area[1] <= 1),
                "ratio": ("such that the smallest box fits into a square", fits),
            },
        )

    def erase(self, images: Tensor, draws: Draws, mean: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), some with a box hidden; `mean` (3,) may fill it."""

        def hide(some: Tensor, own: Draws) -> Tensor:
            return torch.where(self._boxes(some, own), self._filling(some, own, mean), some)

        return in_some(images, draws, self.probability, hide)

    def _boxes(self, images: Tensor, draws: Draws) -> Tensor:
        """Return (B, 1, H, W) bool: true in each image's box."""
        height, width = images.shape[2:]
        pixels = draws.uniform("area", *self.area, count=_TRIES) * (height * width)
        ratios = draws.uniform("ratio", *self.ratio, count=_TRIES)
        tall = (pixels * ratios).sqrt().round().clamp_(min=1)
        wide = (pixels / ratios).sqrt().round().clamp_(min=1)
        fits = (tall <= height) & (wide <= width)
        first = fits.int().argmax(dim=1, keepdim=True)
        masks = []
        for name, sides, length in (("row", tall, height), ("column", wide, width)):
            side = (sides * fits).gather(1, first).long()  # 0 where none fits
            start = (draws.uniform(name) * (length + 1 - side)).long()
            place = torch.arange(length, device=images.device)
            masks.append((place >= start) & (place < start + side))
        rows, columns = masks
        return rows[:, None, :, None] & columns[:, None, None, :]

    def _filling(self, images: Tensor, draws: Draws, mean: Tensor) -> Tensor:
        if self.fill == "random":
            values = draws.uniform("fill", count=images[0].numel())
            return values.to(images.dtype).reshape(images.shape)
        colour = mean if self.fill == "mean" else torch.zeros_like(mean)
        return colour[None, :, None, None]


def _span(centre: Tensor, size: int, length: int) -> Tensor:
    """Return (B, length) bool: true in the `size` places about each centre (B, 1)."""
    place = torch.arange(length, device=centre.device)
    start = centre - size // 2
    return (place >= start) & (place < start + size)
