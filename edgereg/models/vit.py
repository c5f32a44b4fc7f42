"""A small vision transformer (Dosovitskiy et al., 2010.11929), pre-norm, without a class token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgereg.models.attention import SelfAttention

__all__ = ["SmallViT"]


class SmallViT(nn.Module):
    """Turn images into one vector each.

    The image is cut into patches, each becomes a token; blocks of attention and perceptron follow;
    the tokens' mean is the answer. The patch embedding is two convolutions with BatchNorm instead
    of one large one, which small data sets need (Xiao et al., "Early convolutions help
    transformers see better", 2106.14881). Images of another size get resized positions, as PIRL's
    small patches need. Its dropouts are at rest; a recipe's `regularize` sets them.

    Args:
        image_size: Height and width of the input, in pixels.
        patch_size: Height and width of a patch: a multiple of 2 that divides `image_size`.
        dim: Width D of a token.
        depth: Number of blocks.
        heads: Attention heads a block.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int = 96,
        depth: int = 4,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch_size or patch_size % 2:
            raise ValueError(f"patch_size must be even and divide {image_size}, not {patch_size}")
        self.feature_dim = dim
        self.patches = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, patch_size // 2, stride=patch_size // 2, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.position = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(Block(dim, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, D) from images (B, 3, H, W), H and W multiples of the patch, normalized."""
        patches = self.patches(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.blocks(self.dropout(tokens + self._positions(*patches.shape[2:])))
        features: Tensor = self.norm(tokens).mean(dim=1)
        return features

    def _positions(self, height: int, width: int) -> Tensor:
        """Return (1, height * width, D); as learnt for a grid of the usual size, else resized."""
        side = round(self.position.shape[1] ** 0.5)
        if (height, width) == (side, side):
            return self.position
        grid = self.position.transpose(1, 2).reshape(1, -1, side, side)
        grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=True)
        return grid.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a perceptron, each added to what came in."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads=heads)
        self.perceptron_norm = nn.LayerNorm(dim)
        self.perceptron = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(4 * dim, dim),
            nn.Dropout(0.0),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, T, D) from (B, T, D)."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        result: Tensor = tokens + self.perceptron(self.perceptron_norm(tokens))
        return result
