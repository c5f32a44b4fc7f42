"""SimCLR: two views of an image find each other in the batch (Chen et al., 2002.05709).

z is a view's projection, of unit length; z+ that of the image's other view; the sum runs over all
2B - 1 other views of the batch (eq. 1, NT-Xent):

    L = - mean log exp(z . z+ / tau) / sum_z' exp(z . z' / tau)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.errors import check_settings
from edgereg.ssl.gather import gather_with_gradient, rank
from edgereg.ssl.method import Method, Setup, View, full_precision
from edgereg.ssl.projector import projector

__all__ = ["SimClr", "SimClrConfig", "nt_xent"]


@dataclass(frozen=True)
class SimClrConfig:
    """The method's constants.

    Args:
        temperature: tau; the paper's is 0.5 for CIFAR-10 and 0.1 for ImageNet.
        hidden: Width of the projector's hidden layer.
        dim: Width of a projection.
    """

    temperature: float = 0.5
    hidden: int = 512
    dim: int = 128

    def __post_init__(self) -> None:
        check_settings(
            self,
            "simclr.",
            {
                "temperature": ("above 0", self.temperature > 0),
                "hidden": ("1 or more", self.hidden >= 1),
                "dim": ("2 or more", self.dim >= 2),
            },
        )


class SimClr(Method):
    """The projector and the loss around a backbone; see Method."""

    def __init__(self, setup: Setup, config: SimClrConfig) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self.backbone = setup.backbone
        self.projector = projector(setup.feature_dim, config.hidden, config.dim)

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return two augmented views (2B, 3, H, W), the second below the first."""
        return (self._setup.augmented(images, view, count=2),)

    def project(self, features: Tensor) -> Tensor:
        """Return (B, D) from (B, feature_dim)."""
        projected: Tensor = self.projector(features)
        return projected

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return NT-Xent, a scalar."""
        first, second = self.project(self.backbone(views[0])).float().chunk(2)
        with full_precision(first.device):
            return nt_xent(first, second, temperature=self._config.temperature)


def nt_xent(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Return the mean cross-entropy of each view's partner among all other views.

    Args:
        first: (B, D) projections of one view; of this process, where there are several.
        second: (B, D) of the other view, in the same order.
        temperature: tau.
    """
    mine = F.normalize(torch.cat([first, second]), dim=1)
    count = len(first)
    # each process's two views lie together: [first, second] of rank 0, of rank 1, ...
    every = gather_with_gradient(mine)
    similarity = mine @ every.T / temperature
    own = torch.arange(2 * count, device=first.device)
    partner = (own + count) % (2 * count)
    offset = 2 * count * rank()
    similarity[own, own + offset] = float("-inf")  # a view is no other view of itself
    return F.cross_entropy(similarity, partner + offset)
