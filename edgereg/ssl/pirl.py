"""PIRL: an image and its shuffled patches mean the same (Misra and van der Maaten, 1912.01991).

f is a head on the whole image, g one on its patches; m_I the image's row in the memory bank, m' the
rows of others: K of them, drawn anew for each batch and shared by it.

    L = lambda * NCE(m_I, g(v_It); m') + (1 - lambda) * NCE(m_I, f(v_I); m')               (eq. 5)

so the image and its patches are both drawn to m_I and driven from m'. Two forms of NCE are offered:
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
from edgereg.ssl.jigsaw import GRID
from edgereg.ssl.memory_bank import MemoryBank

__all__ = ["Pirl", "PirlConfig", "infonce", "nce"]


@dataclass(frozen=True)
class PirlConfig:
    """The method's constants.

    The defaults are the paper's, but for two: fewer negatives, as small data sets need, and
    "infonce", which needs no estimate of Z.

    Args:
        dim: Width of an embedding.
        temperature: tau.
        negatives: K; at most N - 1 are used. The paper's is 32,000, for ImageNet.
        patch_weight: lambda; 0 is instance discrimination without patches (NPID).
        momentum: Of the memory bank.
        loss: "infonce", or "nce" as released.
    """

    dim: int = 128
    temperature: float = 0.07
    negatives: int = 4096
    patch_weight: float = 0.5
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
                "patch_weight": ("in [0, 1]", 0 <= self.patch_weight <= 1),
                "momentum": ("in [0, 1]", 0 <= self.momentum <= 1),
            },
        )


class Pirl(nn.Module):
    """The heads, the memory bank and the loss around a backbone.

    Args:
        backbone: Maps (B, 3, H, W) of any size to (B, feature_dim).
        feature_dim: Width of its output.
        size: Images N in the data set.
        config: The method's constants.

    The bank's first rows and the negatives come from torch's generator, which the training loop
    seeds for each step.
    """

    normaliser: Tensor

    def __init__(
        self, backbone: nn.Module, *, feature_dim: int, size: int, config: PirlConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.image_head = nn.Linear(feature_dim, config.dim)
        self.patch_projection = nn.Linear(feature_dim, config.dim)
        self.patch_head = nn.Linear(GRID**2 * config.dim, config.dim)
        self.bank = MemoryBank(size, config.dim, momentum=config.momentum)
        self.register_buffer("normaliser", torch.tensor(0.0))  # Z; 0 until the first batch

    def embed_image(self, images: Tensor) -> Tensor:
        """Return f(v_I), (B, dim) of unit length, from images (B, 3, H, W)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.image_head(self.backbone(images)), dim=1)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Return g(v_It), (B, dim) of unit length, from shuffled patches (B, 9, 3, p, p)."""
        pieces = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = self.patch_projection(self.backbone(pieces))
        return F.normalize(self.patch_head(features.reshape(len(patches), -1)), dim=1)

    def forward(self, images: Tensor, patches: Tensor, indices: Tensor) -> Tensor:
        """Return the loss of a batch, and remember its images.

        Args:
            images: (B, 3, H, W) float, normalized.
            patches: (B, 9, 3, p, p) float, normalized.
            indices: (B,) int64, each image's row in the bank.
        """
        by_image, by_patches = self.embed_image(images), self.embed_patches(patches)
        count = min(self.config.negatives, len(self.bank.rows) - 1)
        positives = self.bank.rows[indices]
        drawn = self.bank.draw(count)
        negatives, own = self.bank.rows[drawn], drawn[None, :] == indices[:, None]
        weight = self.config.patch_weight
        loss = weight * self._contrast(by_patches, positives, negatives, own) + (
            1 - weight
        ) * self._contrast(by_image, positives, negatives, own)
        self.bank.update(indices, by_image)
        return loss

    def _contrast(
        self, embeddings: Tensor, positives: Tensor, negatives: Tensor, own: Tensor
    ) -> Tensor:
        # exp(1 / 0.07) = 1.6e6 has no place in half precision
        embeddings = embeddings.float()
        positive = (embeddings * positives).sum(dim=1) / self.config.temperature
        others = embeddings @ negatives.T / self.config.temperature
        if self.config.loss == "infonce":
            # an image is no negative of itself
            return infonce(positive, others.masked_fill(own, float("-inf")))
        size = len(self.bank.rows)
        if self.normaliser == 0:
            # patches are scored first, so Z comes from g, as in the released code
            self.normaliser.fill_(others.detach().exp().mean() * size)
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
