"""VICReg: alike across views, different across images, each dimension by itself (2105.04906).

Z and Z' are the projections of two views, C(Z) their covariance, std their standard deviation in
each of D dimensions (eq. 1 to 6; weights 25, 25, 1):

    L = lambda * mse(Z, Z') + mu * [v(Z) + v(Z')] / 2 + nu * [c(Z) + c(Z')]
    v(Z) = mean_d max(0, 1 - std_d),   std_d = sqrt(var_d + 1e-4)
    c(Z) = sum over d != d' of C(Z)_dd'^2 / D

The paper sums the two v; its released code, and this, halves them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.errors import check_settings
from edgereg.ssl.gather import gather_with_gradient
from edgereg.ssl.method import Method, Setup, View, full_precision
from edgereg.ssl.projector import projector

__all__ = ["VicReg", "VicRegConfig", "vicreg_loss"]

_EPSILON = 1e-4


@dataclass(frozen=True)
class VicRegConfig:
    """The method's constants.

    Args:
        invariance: lambda.
        variance: mu.
        covariance: nu.
        dim: Width of the projector's three layers; the paper's is 8192, for ImageNet.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    dim: int = 1024

    def __post_init__(self) -> None:
        check_settings(
            self,
            "vicreg.",
            {
                "invariance": ("above 0", self.invariance > 0),
                "variance": ("not negative", self.variance >= 0),
                "covariance": ("not negative", self.covariance >= 0),
                "dim": ("2 or more", self.dim >= 2),
            },
        )


class VicReg(Method):
    """The projector and the loss around a backbone; see Method."""

    def __init__(self, setup: Setup, config: VicRegConfig) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self.backbone = setup.backbone
        self.projector = projector(setup.feature_dim, config.dim, config.dim, config.dim)

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return two augmented views (2B, 3, H, W), the second below the first."""
        return (self._setup.augmented(images, view, count=2),)

    def project(self, features: Tensor) -> Tensor:
        """Return (B, D) from (B, feature_dim)."""
        projected: Tensor = self.projector(features)
        return projected

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return VICReg's loss, a scalar."""
        first, second = self.project(self.backbone(views[0])).float().chunk(2)
        with full_precision(first.device):
            return vicreg_loss(first, second, self._config)


def vicreg_loss(first: Tensor, second: Tensor, config: VicRegConfig) -> Tensor:
    """Return the weighted sum of the three terms.

    Args:
        first: (B, D) projections of one view; of this process, where there are several.
        second: (B, D) of the other view, in the same order.
        config: The weights.
    """
    loss = config.invariance * F.mse_loss(first, second)
    for each in (gather_with_gradient(first), gather_with_gradient(second)):
        centred = each - each.mean(dim=0)
        covariance = centred.T @ centred / (len(each) - 1)
        variance = covariance.diagonal()
        std = torch.sqrt(variance + _EPSILON)
        loss = loss + config.variance / 2 * F.relu(1 - std).mean()
        off_diagonal = covariance.square().sum() - variance.square().sum()
        loss = loss + config.covariance * off_diagonal / each.shape[1]
    return loss
