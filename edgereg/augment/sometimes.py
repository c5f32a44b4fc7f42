"""Do something to some samples of a batch; the others are left as they are, and cost nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgereg.augment.draws import Draws

__all__ = ["in_some", "move_some"]


def in_some(
    images: Tensor,
    draws: Draws,
    probability: float,
    change: Callable[[Tensor, Draws], Tensor],
) -> Tensor:
    """Return the images, each changed with the given probability.

    Args:
        images: (B, 3, H, W) float.
        draws: The draws of these B samples.
        probability: In [0, 1].
        change: Called with the chosen images and their draws.

    Returns:
        (B, 3, H, W), a new tensor unless nothing was changed.
    """
    if probability >= 1:
        return change(images, draws)
    chosen = draws.chance("chosen", probability).nonzero()[:, 0]
    if len(chosen) == 0:
        return images
    if len(chosen) == len(images):
        return change(images, draws)
    return images.index_copy(0, chosen, change(images[chosen], draws.of(chosen)))


def move_some(matrices: Tensor, draws: Draws, probability: float) -> Tensor:
    """Return (B, 3, 3): each matrix with the given probability, else that of no move."""
    if probability >= 1:
        return matrices
    chosen = draws.chance("chosen", probability)[:, None, None]
    still = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    return torch.where(chosen, matrices, still)
