"""Multi-head self-attention, written to be read (Vaswani et al., 1706.03762, section 3.2)."""

import math

import torch
from torch import Tensor, nn

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Let every token gather from every other what it needs.

    Each head asks with a query, is answered by keys, and gathers values:

        weights = softmax(q k^T / sqrt(d))        how much token i attends to token j; rows sum to 1
        z       = weights v                       the context vector of each token

    Its dropouts, on the weights and on the output, are at rest; a recipe's `regularize` sets them.

    Args:
        dim: Width D of a token.
        heads: Number of heads; divides D. Each is D / heads = d wide.
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide the width: {dim} % {heads} = {dim % heads}")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.weights_dropout = nn.Dropout(0.0)
        self.output_dropout = nn.Dropout(0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, T, D) from tokens (B, T, D)."""
        z, _ = self.attend(tokens)
        return z

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (B, T, D) and the weights (B, heads, T, T) before dropout."""
        q, k, v = (self._split(f(tokens)) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        weights = torch.softmax(scores, dim=3)
        z = self.weights_dropout(weights) @ v
        joined = z.transpose(1, 2).flatten(2)  # (B, heads, T, d) -> (B, T, D)
        return self.output_dropout(self.output(joined)), weights

    def _split(self, x: Tensor) -> Tensor:
        """Return (B, heads, T, d) from (B, T, D)."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)
