"""LeJEPA: views agree, embeddings are an isotropic Gaussian (Balestriero and LeCun, 2511.08544).

z_v is the projection of view v of V, mu the mean of an image's views. SIGReg projects a batch of N
embeddings onto random unit vectors ("slices") and compares the characteristic function of each
projection x with that of a standard normal (Epps and Pulley, 1983):

    T(x) = N * integral |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt,   phi(t) = mean_n exp(i t x_n)
    L = weight * mean_{v, slices} T + (1 - weight) * mean (z_v - mu)^2,  over all dimensions, too

There is no teacher, no stopped gradient and no negative. All views are whole ones, as in the
authors' smallest example; crops of another size would need a backbone that takes any.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgereg.errors import check_settings
from edgereg.ssl.gather import gather_with_gradient
from edgereg.ssl.method import MAX_VIEWS, Method, Setup, View, full_precision
from edgereg.ssl.projector import projector

__all__ = ["LeJepa", "LeJepaConfig", "lejepa_loss", "sigreg"]

_KNOTS, _END = 17, 3.0  # of the integral over [0, 3]; the integrand is even


@dataclass(frozen=True)
class LeJepaConfig:
    """The method's constants.

    Args:
        weight: Of SIGReg against agreement, in (0, 1].
        views: Of each image, V.
        slices: Random directions, drawn anew in each step.
        hidden: Width of the projector's two hidden layers.
        dim: Width of a projection.
    """

    weight: float = 0.05
    views: int = 2
    slices: int = 256
    hidden: int = 1024
    dim: int = 64

    def __post_init__(self) -> None:
        check_settings(
            self,
            "lejepa.",
            {
                "weight": ("in (0, 1]", 0 < self.weight <= 1),
                "views": (f"from 2 to {MAX_VIEWS}", 2 <= self.views <= MAX_VIEWS),
                "slices": ("1 or more", self.slices >= 1),
                "hidden": ("1 or more", self.hidden >= 1),
                "dim": ("2 or more", self.dim >= 2),
            },
        )


class LeJepa(Method):
    """The projector and the loss around a backbone; see Method.

    The slices come from torch's generator, which the training loop seeds for each step.
    """

    def __init__(self, setup: Setup, config: LeJepaConfig) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self.backbone = setup.backbone
        self.projector = projector(setup.feature_dim, config.hidden, config.hidden, config.dim)

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return V augmented views (V * B, 3, H, W), one below the other."""
        return (self._setup.augmented(images, view, count=self._config.views),)

    def project(self, features: Tensor) -> Tensor:
        """Return (B, D) from (B, feature_dim)."""
        projected: Tensor = self.projector(features)
        return projected

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return LeJEPA's loss, a scalar."""
        projected = self.project(self.backbone(views[0])).float()
        projected = projected.reshape(self._config.views, len(indices), -1)
        slices = torch.randn(self._config.dim, self._config.slices, device=projected.device)
        with full_precision(projected.device):
            return lejepa_loss(projected, F.normalize(slices, dim=0), weight=self._config.weight)


def lejepa_loss(projected: Tensor, slices: Tensor, *, weight: float) -> Tensor:
    """Return SIGReg and the disagreement of views, weighed.

    Args:
        projected: (V, B, D); of this process, where there are several.
        slices: (D, S), unit vectors as columns.
        weight: Of SIGReg.
    """
    disagreement = (projected - projected.mean(dim=0)).square().mean()
    # the test is of the whole batch
    every = gather_with_gradient(projected.transpose(0, 1).contiguous()).transpose(0, 1)
    return weight * sigreg(every, slices) + (1 - weight) * disagreement


def sigreg(embeddings: Tensor, slices: Tensor) -> Tensor:
    """Return the mean of T over views and slices, by the trapezoidal rule on 17 knots.

    Args:
        embeddings: (V, N, D) float32.
        slices: (D, S), unit vectors as columns.
    """
    step = _END / (_KNOTS - 1)
    knots = torch.arange(_KNOTS, device=embeddings.device).to(embeddings) * step
    gauss = torch.exp(-knots.square() / 2)
    weights = gauss * 2 * step  # both halves of the line
    weights[[0, -1]] /= 2
    angles = (embeddings @ slices)[..., None] * knots  # (V, N, S, knots)
    error = (angles.cos().mean(dim=1) - gauss).square() + angles.sin().mean(dim=1).square()
    return embeddings.shape[1] * (error @ weights).mean()
