"""PIRL: an image and its transformed self mean the same (Misra and van der Maaten, 1912.01991).

The transformation cuts nine patches and shuffles them (jigsaw), turns the image by a multiple of
90 degrees (rotation), or turns it before it is cut (both; section 4.3). f is a head on the image, g
one on what it was transformed to; m_I the image's row in the memory bank, m' the rows of others: K
of them, drawn anew for each batch and shared by it.

    L = lambda * NCE(m_I, g(v_It); m') + (1 - lambda) * NCE(m_I, f(v_I); m')               (eq. 5)

so both are drawn to m_I and driven from m'. Two forms of NCE are offered:
"infonce", a softmax over the positive and the negatives, and "nce", what the authors' released code
computes, in which the normaliser Z is a constant estimated on the first batch:

    p(v) = exp(m . v / tau) / Z,   -log p+/(p+ + K/N) - sum_k log (K/N)/(p_k + K/N)

The released code draws K for each sample instead, and lets the positive be among them; here "nce"
does too, "infonce" masks it. The paper's eq. 3 and 4 are a third form; no released weights were
trained with it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.errors import check_settings
from edgereg.regularize.batchnorm import hold_statistics
from edgereg.ssl.gather import mean_over_processes
from edgereg.ssl.jigsaw import GRID, jigsaw_views
from edgereg.ssl.memory_bank import MemoryBank
from edgereg.ssl.method import Method, Setup, View, full_precision
from edgereg.ssl.projector import projector

__all__ = ["Pirl", "PirlConfig", "infonce", "nce"]


@dataclass(frozen=True)
class PirlConfig:
    """The method's constants.

    The defaults are the paper's, but for two: fewer negatives, as small data sets need, and
    "infonce", which needs no estimate of Z.

    Args:
        transform: What g sees: "jigsaw", "rotation" or "both".
        heads: "linear", or "mlp": one hidden layer as wide as the features, for f and for each
            patch.
        dim: Width of an embedding.
        temperature: tau; the released MLP variant's is 0.1.
        negatives: K; at most N - 1 are used. The paper's is 32,000, for ImageNet.
        transform_weight: lambda; 0 is instance discrimination without a transformation (NPID).
        momentum: Of the memory bank.
        loss: "infonce", or "nce" as released.
    """

    transform: Literal["jigsaw", "rotation", "both"] = "jigsaw"
    heads: Literal["linear", "mlp"] = "linear"
    dim: int = 128
    temperature: float = 0.07
    negatives: int = 4096
    transform_weight: float = 0.5
    momentum: float = 0.5
    loss: Literal["infonce", "nce"] = "infonce"

    def __post_init__(self) -> None:
        check_settings(
            self,
            "pirl.",
            {
                "dim": ("2 or more", self.dim >= 2),
                "temperature": ("above 0", self.temperature > 0),
                "negatives": ("1 or more", self.negatives >= 1),
                "transform_weight": ("in [0, 1]", 0 <= self.transform_weight <= 1),
                "momentum": ("in [0, 1]", 0 <= self.momentum <= 1),
            },
        )


class Pirl(Method):
    """The heads, the memory bank and the loss around a backbone; see Method.

    The backbone must take images of any size where patches are cut: they are smaller than images.
    The bank's first rows and the negatives come from torch's generator, which the training loop
    seeds for each step.
    """

    normaliser: Tensor

    def __init__(self, setup: Setup, config: PirlConfig) -> None:
        super().__init__()
        self._setup, self._config = setup, config
        self._recolour = setup.chain.colour_steps()
        self._is_cut = config.transform != "rotation"
        self.backbone = setup.backbone
        self.image_head = self._head(setup.feature_dim)
        # on the features of the whole, or of each patch
        self.transform_head = self._head(setup.feature_dim)
        self.patch_head = nn.Linear(GRID**2 * config.dim, config.dim) if self._is_cut else None
        self.bank = MemoryBank(setup.size, config.dim, momentum=config.momentum)
        self.register_buffer("normaliser", torch.tensor(0.0))  # Z; 0 until the first batch
        self._is_first = False  # whether this step has estimated Z

    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return the image (B, 3, H, W) and what it was transformed to.

        The latter is (B, 3, H, W), or patches (B, 9, 3, p, p), of independent draws.
        """
        setup, draws = self._setup, view(1)
        first = setup.chain(images, view(0))
        if self._is_cut:
            pixels = images.float() / 255
            if self._config.transform == "both":
                pixels = _turned(pixels, draws.integers("turn", 4)[:, 0])
            second, _ = jigsaw_views(pixels, draws, self._recolour)
        else:
            second = _turned(setup.chain(images, draws), draws.integers("turn", 4)[:, 0])
        return setup.normalize(first), setup.normalize(second)

    def project(self, features: Tensor) -> Tensor:
        """Return (B, D) from (B, feature_dim)."""
        projected: Tensor = self.image_head(features)
        return projected

    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return the loss of a batch, and remember its images.

        Args:
            views: As `views` returned them.
            indices: (B,) int64, each image's row in the bank.
        """
        config = self._config
        by_image = self.embed_image(views[0])
        by_transform = self.embed_transformed(views[1])
        count = min(config.negatives, len(self.bank.rows) - 1)
        positives = self.bank.rows[indices]
        drawn = self.bank.draw(count)
        negatives, own = self.bank.rows[drawn], drawn[None, :] == indices[:, None]
        weight = config.transform_weight
        # exp(1 / 0.07) = 1.6e6 has no place in half precision
        with full_precision(by_image.device):
            loss = weight * self._contrast(by_transform, positives, negatives, own) + (
                1 - weight
            ) * self._contrast(by_image, positives, negatives, own)
        self.bank.update(indices, by_image)
        return loss

    def end_step(self, *, taken: bool) -> None:
        """Keep or take back what the step's batches left in the bank, and in Z; see Method."""
        self.bank.end_step(taken=taken)
        if self._is_first and not taken:
            self.normaliser.zero_()
        self._is_first = False

    def embed_image(self, images: Tensor) -> Tensor:
        """Return f(v_I), (B, dim) of unit length, from images (B, 3, H, W)."""
        return F.normalize(self.project(self.backbone(images)).float(), dim=1)

    def embed_transformed(self, transformed: Tensor) -> Tensor:
        """Return g(v_It), (B, dim) of unit length, from images, or from patches (B, 9, 3, p, p)."""
        if self.patch_head is None:
            return F.normalize(self.transform_head(self.backbone(transformed)).float(), dim=1)
        with hold_statistics(self.backbone):  # in use it will see whole images
            features = self.backbone(transformed.flatten(0, 1))
        pieces = self.transform_head(features)
        return F.normalize(self.patch_head(pieces.reshape(len(transformed), -1)).float(), dim=1)

    def _head(self, feature_dim: int) -> nn.Module:
        dim = self._config.dim
        if self._config.heads == "linear":
            return nn.Linear(feature_dim, dim)
        return projector(feature_dim, feature_dim, dim, has_batchnorm=False)

    def _contrast(
        self, embeddings: Tensor, positives: Tensor, negatives: Tensor, own: Tensor
    ) -> Tensor:
        positive = (embeddings * positives).sum(dim=1) / self._config.temperature
        others = embeddings @ negatives.T / self._config.temperature
        if self._config.loss == "infonce":
            # an image is no negative of itself
            return infonce(positive, others.masked_fill(own, float("-inf")))
        size = len(self.bank.rows)
        if self.normaliser == 0:
            # g is scored first, so Z comes from it, as in the released code
            self.normaliser.copy_(mean_over_processes(others.exp().mean() * size))
            self._is_first = True
        return nce(positive, others, size=size, normaliser=float(self.normaliser))


def infonce(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return the mean cross-entropy of the positive among the negatives.

    Args:
        positive: (B,) similarity / temperature.
        negatives: (B, K) similarity / temperature.
    """
    return (
        torch.logsumexp(torch.cat([positive[:, None], negatives], dim=1), dim=1) - positive
    ).mean()


def nce(positive: Tensor, negatives: Tensor, *, size: int, normaliser: float) -> Tensor:
    """Return noise-contrastive estimation with a constant normaliser Z, in logarithms throughout.

    Args:
        positive: (B,) similarity / temperature.
        negatives: (B, K) similarity / temperature.
        size: N; the noise is uniform, 1 / N.
        normaliser: Z.
    """
    noise = math.log(negatives.shape[1] / size)
    # log p/(p + K/N) = logsigmoid(log p - log K/N), and likewise its complement
    data = F.logsigmoid(positive - math.log(normaliser) - noise)
    drawn = F.logsigmoid(noise - negatives + math.log(normaliser))
    return -(data + drawn.sum(dim=1)).mean()


def _turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each of the square images (B, 3, H, H) by its (B,) number of quarters."""
    turned = torch.stack([torch.rot90(images, quarter, dims=(2, 3)) for quarter in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]
