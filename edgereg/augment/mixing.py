"""Mix pairs of a batch, images and targets alike: one lambda a batch, partners by permutation."""

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
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

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
    images: Tensor, targets: Tensor, config: MixConfig, *, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix a batch, or leave it, as a function of (seed, step).

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float, rows summing to 1.
        config: What to draw from.
        seed: The run's seed.
        step: The step of the run.

    Returns:
        Images and targets of the same shapes.
    """
    rng = np.random.default_rng([seed, step, _STREAM])
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind) > 0]
    if not kinds or rng.random() >= config.probability:
        return images, targets
    kind = kinds[rng.integers(len(kinds))]
    alpha: float = getattr(config, kind)
    share = float(rng.beta(alpha, alpha))
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if kind == "mixup":
        return mixup(images, targets, partner, share)
    return cutmix(images, targets, partner, share, (float(rng.random()), float(rng.random())))


def mixup(images: Tensor, targets: Tensor, partner: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner (Zhang et al., 1710.09412, eq. 1).

    x = share * x_i + (1 - share) * x_j, and the targets likewise.

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float.
        partner: (B,) int64, a permutation.
        share: What is kept of the image itself, in [0, 1].
    """
    return (
        torch.lerp(images[partner], images, share),
        torch.lerp(targets[partner], targets, share),
    )


def cutmix(
    images: Tensor, targets: Tensor, partner: Tensor, share: float, centre: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner into each image (Yun et al., 1905.04899, section 3.1).

    The box has sqrt(1 - share) of each side and is clipped at the border; the targets follow the
    area that was really pasted.

    Args:
        images: (B, 3, H, W) float.
        targets: (B, C) float.
        partner: (B,) int64, a permutation.
        share: Intended share of the image itself, in [0, 1].
        centre: The box's centre (row, column), each in [0, 1).
    """
    height, width = images.shape[2:]
    side = (1 - share) ** 0.5
    top, bottom = _clip(centre[0], side, height)
    left, right = _clip(centre[1], side, width)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return pasted, torch.lerp(targets[partner], targets, kept)


def _clip(centre: float, side: float, length: int) -> tuple[int, int]:
    half = int(side * length / 2)
    middle = int(centre * length)
    return max(0, middle - half), min(length, middle + half)
