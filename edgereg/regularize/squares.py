"""The module that drop_block puts into a model (Ghiasi et al., 1810.12890)."""

import torch
from torch import Tensor, nn
from torchvision.ops import drop_block2d

__all__ = ["DropSquares"]


class DropSquares(nn.Module):
    """DropBlock for maps of any size and precision.

    The seeds of the squares are drawn where a square fits wholly, so that a little less than p is
    dropped, as squares overlap.

    Args:
        block: Side of a square, odd.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.p = 0.0

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C, H, W), in training with squares dropped and the rest scaled up."""
        if not self.training or self.p == 0:
            return maps
        side = min(self.block, *maps.shape[2:])
        side -= 1 - side % 2
        # in float32: fp16 cannot count the values of a map
        mask: Tensor = drop_block2d(torch.ones_like(maps, dtype=torch.float32), self.p, side)
        return maps * mask.to(maps.dtype)

    def extra_repr(self) -> str:
        """Return what print() shows."""
        return f"p={self.p}, block={self.block}"
