"""Sharpness-aware minimisation: descend the loss of the worst point nearby.

    w' = w + rho * g / ||g||            g: gradient at w; the norm is over all weights
    w <- w - lr * gradient at w'

Source: Foret et al., 2010.01412, equation 2 and algorithm 1. The adaptive form scales each weight's
move by its size, e = rho * w^2 g / || |w| g || (Kwon et al., ASAM, 2102.11600, equation 4), so that
it does not change when layers are rescaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgereg.errors import check_settings

__all__ = ["SamConfig", "ascend", "descend"]


@dataclass(frozen=True)
class SamConfig:
    """How far to look for a worse point; a step then costs two.

    Args:
        rho: Radius of the neighbourhood; 0 is none, the paper's is 0.05.
        adaptive: Whether a weight's move is scaled by its size; the paper's rho is then 0.5 to 2.
    """

    rho: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "sam.", {"rho": ("not negative", self.rho >= 0)})


@torch.no_grad()
def ascend(parameters: Sequence[nn.Parameter], config: SamConfig) -> list[Tensor]:
    """Move the weights to the worst point nearby, by their gradients.

    Args:
        parameters: Those without a gradient stay.
        config: How far.

    Returns:
        The weights as they were, for `descend`.
    """
    moved: list[Tensor] = [p for p in parameters if p.grad is not None]
    before = [weight.clone() for weight in moved]
    gradients = [p.grad for p in parameters if p.grad is not None]
    sizes = [weight.abs() if config.adaptive else torch.ones_like(weight) for weight in moved]
    scaled = [size * gradient for size, gradient in zip(sizes, gradients, strict=True)]
    norm = torch.nn.utils.get_total_norm(scaled)
    # a gradient of zero has no direction: the point stays where it is
    reach = torch.where(norm > 0, config.rho / norm, torch.zeros_like(norm))
    for weight, size, direction in zip(moved, sizes, scaled, strict=True):
        weight.add_(size * direction * reach)
    return before


@torch.no_grad()
def descend(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    """Put the weights back, to the bit; the gradients stay.

    Args:
        parameters: As given to `ascend`, with gradients for the same ones.
        before: What `ascend` returned.
    """
    torch._foreach_copy_([p for p in parameters if p.grad is not None], list(before))
