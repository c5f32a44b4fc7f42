"""Progressive learning: small windows of the images first, whole images last.

A convolutional net's arithmetic goes with the area, so that an epoch on windows of 20 pixels is 0.4
of one on 32, and a window is an augmentation by itself. Tan and Le (2104.00298, section 4) shrink
the images instead; a window keeps the size at which objects are seen, so that training and test do
not differ in it (Touvron et al., 1906.06423).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.draws import Draws
from edgereg.errors import check_settings

__all__ = ["ProgressiveConfig", "smaller_sizes", "window", "window_size"]


@dataclass(frozen=True)
class ProgressiveConfig:
    """How large the windows are that the model is shown.

    Args:
        smallest: Height and width in the first epochs; 0 is whole images from the start.
        step: Pixels from one size to the next.
        whole_from: Share of the epochs after which images are whole, in (0, 1), as they are in the
            last epoch in any case; the sizes below share what lies before equally.
    """

    smallest: int = 0
    step: int = 4
    whole_from: float = 0.8

    def __post_init__(self) -> None:
        check_settings(
            self,
            "progressive.",
            {
                "smallest": ("0, or 8 or more", self.smallest == 0 or self.smallest >= 8),
                "step": ("1 or more", self.step >= 1),
                "whole_from": ("in (0, 1)", 0 < self.whole_from < 1),
            },
        )


def smaller_sizes(config: ProgressiveConfig, whole: int) -> range:
    """Return the sizes of the windows that are smaller than an image, from the smallest on."""
    return range(config.smallest or whole, whole, config.step)


def window_size(config: ProgressiveConfig, epoch: int, *, epochs: int, whole: int) -> int:
    """Return height and width of an epoch's windows.

    Args:
        config: Smallest size, step, and when images are whole.
        epoch: From 0; beyond the last one images are whole.
        epochs: Of the run.
        whole: Height and width of an image.
    """
    if not config.smallest:
        return whole
    sizes = smaller_sizes(config, whole)
    done = epoch / (config.whole_from * epochs)
    return whole if done >= 1 or epoch >= epochs - 1 else sizes[int(done * len(sizes))]


def window(images: Tensor, size: int, draws: Draws) -> Tensor:
    """Cut a square out of each image, uniformly among all places.

    Args:
        images: (B, C, H, W).
        size: Its height and width, at most those of an image.
        draws: Of these images.

    Returns:
        (B, C, size, size), laid out as NHWC; `images` themselves where they have this size.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    span = torch.arange(size, device=images.device)
    rows = draws.integers("window/row", height - size + 1) + span
    columns = draws.integers("window/column", width - size + 1) + span
    of_each = torch.arange(len(images), device=images.device)[:, None, None]
    cut = images.permute(0, 2, 3, 1)[of_each, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)
