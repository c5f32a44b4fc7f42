"""Mix pairs of a batch, images and targets alike; partners are a permutation of the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgereg.errors import check_settings

__all__ = ["MixConfig", "cutmix", "mix", "mixup"]

_STREAM = 0x6D6978  # apart from the stream that shuffles the batches


@dataclass(frozen=True)
class MixConfig:
    """How often and how strongly to mix.

    Args:
        mixup: Mixup's alpha; 0 is none.
        cutmix: CutMix's alpha; 0 is none. With both, each mixed batch takes one of them, evenly.
        probability: Of a batch being mixed at all.
        per_sample: Whether each image draws a share and a box of its own; the papers draw one a
            batch.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self,
            "mix.",
            {
                "mixup": ("not negative", self.mixup >= 0),
                "cutmix": ("not negative", self.cutmix >= 0),
                "probability": ("in [0, 1]", 0 <= self.probability <= 1),
            },
        )


def mix(
    images: Tensor, targets: Tensor, config: MixConfig, *, seed: int, step: int, part: int = 0
) -> tuple[Tensor, Tensor]:
    """Mix a batch, or leave it, as a function of (seed, step, part).

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float, rows summing to 1.
        config: What to draw from.
        seed: The run's seed.
        step: The step of the run.
        part: Which part of the step's batch this is, of several that are mixed apart.

    Returns:
        Images and targets of the same shapes.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind) > 0]
    rng = np.random.default_rng([seed, step, _STREAM, *([part] if part else [])])
    if not kinds or rng.random() >= config.probability:
        return images, targets
    kind = kinds[rng.integers(len(kinds))]
    alpha: float = getattr(config, kind)
    count = len(images) if config.per_sample else 1
    shares = torch.from_numpy(rng.beta(alpha, alpha, count)).to(images.device)
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if kind == "mixup":
        return mixup(images, targets, partner, shares)
    centres = torch.from_numpy(rng.random((count, 2))).to(images.device)
    return cutmix(images, targets, partner, shares, centres)


def mixup(
    images: Tensor, targets: Tensor, partner: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner (Zhang et al., 1710.09412, eq. 1).

    x = share * x_i + (1 - share) * x_j, and the targets likewise.

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float.
        partner: (B,) int64, a permutation.
        shares: (B,), or (1,) for all, in [0, 1]: what is kept of the image itself.
    """
    return (
        torch.lerp(images[partner], images, shares.to(images.dtype)[:, None, None, None]),
        torch.lerp(targets[partner], targets, shares.to(targets.dtype)[:, None]),
    )


def cutmix(
    images: Tensor, targets: Tensor, partner: Tensor, shares: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner into each image (Yun et al., 1905.04899, section 3.1).

    The box has sqrt(1 - share) of each side and is clipped at the border; the targets follow the
    area that was really pasted.

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float.
        partner: (B,) int64, a permutation.
        shares: (B,), or (1,) for all, in [0, 1]: intended share of the image itself.
        centres: (B, 2), or (1, 2): the boxes' centres (row, column), each in [0, 1).
    """
    height, width = images.shape[2:]
    sides = (1 - shares).sqrt()
    rows, columns = (
        _spans(centres[:, axis], sides, length) for axis, length in enumerate((height, width))
    )
    pasted = rows[:, None, :, None] & columns[:, None, None, :]
    kept = 1 - rows.sum(dim=1).to(shares.dtype) * columns.sum(dim=1) / (height * width)
    return (
        torch.where(pasted, images[partner], images),
        torch.lerp(targets[partner], targets, kept.to(targets.dtype)[:, None]),
    )


def _spans(centres: Tensor, sides: Tensor, length: int) -> Tensor:
    """Return (B, length) bool: the places of each box along one axis, clipped at the border."""
    half = (sides * length / 2).to(torch.int64)
    middle = (centres * length).to(torch.int64)
    place = torch.arange(length, device=centres.device)
    return (place >= (middle - half)[:, None]) & (place < (middle + half)[:, None])
