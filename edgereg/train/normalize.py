"""Normalization of a batch on the training device; deploy's `normalize` is its twin in numpy."""

import torch
from torch import Tensor, nn

from deploy.runtime.preprocess import Preprocessing

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel.

    Args:
        spec: Holds the mean and the standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized images from (..., 3, H, W) float in [0, 1]."""
        return (images - self.mean) / self.std
