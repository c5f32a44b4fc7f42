"""Hide a part of each image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.draws import Draws

__all__ = ["Cutout"]


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


def _span(centre: Tensor, size: int, length: int) -> Tensor:
    """Return (B, length) bool: true in the `size` places about each centre (B, 1)."""
    place = torch.arange(length, device=centre.device)
    start = centre - size // 2
    return (place >= start) & (place < start + size)
