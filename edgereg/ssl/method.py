"""What a self-supervised method is: it makes views of a batch, and answers with a loss of them."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgereg.augment.chain import Chain
from edgereg.augment.draws import Draws

__all__ = ["MAX_VIEWS", "Method", "Setup", "View", "full_precision"]

MAX_VIEWS = 64
"""Views of an image in an epoch, at most: those of the next epoch have the numbers above them."""

View = Callable[[int], Draws]
"""Gives view number n of a batch, below MAX_VIEWS, its draws; those of two are independent."""


@dataclass(frozen=True)
class Setup:
    """What every method is built from.

    Args:
        backbone: Maps (B, 3, H, W), normalized, to (B, feature_dim).
        feature_dim: Width of its output.
        image_size: Height and width of the input, in pixels.
        size: Images N in the data set.
        sample: (M, 3, H, W) uint8, some of its images, always the same ones.
        chain: The recipe's augmentation: uint8 or float images in, floats in [0, 1] out.
        normalize: From floats in [0, 1] to the backbone's input.
    """

    backbone: nn.Module
    feature_dim: int
    image_size: int
    size: int
    sample: Tensor
    chain: Chain
    normalize: Callable[[Tensor], Tensor]

    def augmented(self, images: Tensor, view: View, *, count: int) -> Tensor:
        """Return views 0 to count - 1, normalized: (count * B, 3, H, W), one below the other.

        Args:
            images: (B, 3, H, W) uint8.
            view: The draws of each view.
            count: Views of each image.
        """
        return self.normalize(torch.cat([self.chain(images, view(n)) for n in range(count)]))


class Method(nn.Module):
    """A backbone with heads that are dropped in the end.

    Attributes:
        has_unused_parameters: Whether the loss may not depend on some parameters.
    """

    has_unused_parameters: bool = False

    @abstractmethod
    def views(self, images: Tensor, view: View) -> tuple[Tensor, ...]:
        """Return what the loss compares, made without gradient and in full precision.

        Args:
            images: (B, 3, H, W) uint8.
            view: The draws of each view.
        """

    @abstractmethod
    def forward(self, views: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        """Return the mean loss, a scalar, in float32; called under autocast, see full_precision.

        Args:
            views: As `views` returned them.
            indices: (B,) int64, of the images in the data set.
        """

    def end_step(self, *, taken: bool) -> None:
        """Keep what the step's batches left in memory, or, where it was skipped, take it back.

        Args:
            taken: Whether the weights were moved.
        """

    def project(self, features: Tensor) -> Tensor | None:
        """Return what a head makes of features (B, feature_dim), where a collapse begins.

        None where the loss sees something else.
        """
        return None


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return the context for a loss: autocast would round the products of float32 tensors, too."""
    return torch.autocast(device.type, enabled=False)
