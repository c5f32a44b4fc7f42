"""Colour as one of 313 classes, softly (Zhang et al., 1603.08511, section 2).

The plane of colours (a, b) of CIE Lab is cut by a grid of 10; the 313 nodes that sRGB comes near
are the bins. A colour is a distribution over its nearest bins, and a distribution over the bins is
a colour again: the mean after sharpening by a temperature.
"""

import torch
from torch import Tensor, nn

__all__ = ["AbBins", "anneal", "bin_centres", "rebalance"]

_STEP = 10
_RUNS = (  # a, then the least and the greatest b: facts that no rule gives, pts_in_hull as released
    *((-90, 50, 90), (-80, 20, 90), (-70, 0, 90), (-60, -20, 90), (-50, -30, 100)),
    *((-40, -40, 100), (-30, -50, 100), (-20, -50, 100), (-10, -60, 100), (0, -70, 100)),
    *((10, -80, 90), (20, -80, 90), (30, -90, 90), (40, -100, 90), (50, -100, 80)),
    *((60, -110, 80), (70, -110, 80), (80, -110, 70), (90, -110, 70), (100, -90, 0)),
)
_LOW, _HIGH = (-90, -110), (100, 100)  # of a and b
_SIGMA = 5.0  # of both Gaussians, in units of a and b


def bin_centres() -> Tensor:
    """Return (313, 2) float32: a and b of each bin, in the order of the released file."""
    nodes = [(a, b) for a, low, high in _RUNS for b in range(low, high + 1, _STEP)]
    return torch.tensor(nodes, dtype=torch.float32)


class AbBins(nn.Module):
    """Encodes and decodes colours; holds tables, that no state dict shows.

    Args:
        neighbours: k, the bins that a colour is spread over. The paper's is 5, the released code's
            10.
    """

    centres: Tensor
    candidates: Tensor

    def __init__(self, *, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.register_buffer("centres", bin_centres(), persistent=False)
        table = _candidates(self.centres, neighbours)
        self.register_buffer("candidates", table, persistent=False)

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Return the soft encoding Z of colours, as its non-zero part.

            Z_q ~ exp(-d_q^2 / (2 * 5^2)) over the k nearest bins q; the sum is 1

        Args:
            ab: (B, 2, h, w) float32, of sRGB colours.

        Returns:
            Bins (B, k, h, w) int64, the nearest first, and their shares (B, k, h, w).
        """
        colours = ab.movedim(1, -1)
        bins = self.candidates[self._cells(colours)]
        # written out: a matrix product, as in cdist, would lose three digits
        squares = ((colours[..., None, :] - self.centres[bins]) ** 2).sum(dim=-1)
        squares, places = squares.topk(self.neighbours, dim=-1, largest=False)
        shares = torch.softmax(-squares / (2 * _SIGMA**2), dim=-1)
        return bins.gather(-1, places).movedim(-1, 1), shares.movedim(-1, 1)

    def decode(self, shares: Tensor) -> Tensor:
        """Return the mean colour (B, 2, h, w) of distributions (B, 313, h, w) of sum 1."""
        # as above, and autocast and TF32 would round it
        colours = [(shares * c[:, None, None]).sum(dim=1) for c in self.centres.T]
        return torch.stack(colours, dim=1)

    def prior(self, ab: Tensor) -> Tensor:
        """Return (313,): how often each bin is the nearest, smoothed by a Gaussian; the sum is 1.

        Args:
            ab: (B, 2, h, w) float32, of sRGB colours.
        """
        nearest = self.encode(ab)[0][:, 0]
        counts = torch.bincount(nearest.flatten(), minlength=len(self.centres))
        squares = ((self.centres[:, None] - self.centres) ** 2).sum(dim=2)
        kernel = torch.exp(-squares / (2 * _SIGMA**2))
        # a kernel of sum 1, at the rim too, moves what was counted, and loses none
        return (kernel / kernel.sum(dim=0)) @ (counts / counts.sum())

    def _cells(self, colours: Tensor) -> Tensor:
        """Return the row of `candidates` of each colour (..., 2)."""
        nodes = (colours / _STEP).round().to(torch.int64)
        a, b = (
            nodes[..., axis].clamp(_LOW[axis] // _STEP, _HIGH[axis] // _STEP) - _LOW[axis] // _STEP
            for axis in (0, 1)
        )
        return a * ((_HIGH[1] - _LOW[1]) // _STEP + 1) + b


def anneal(logits: Tensor, temperature: float) -> Tensor:
    """Return the sharpened distribution exp(log z / T) / sum, (B, Q, h, w) float32.

    Args:
        logits: (B, Q, h, w), log z up to a constant.
        temperature: T; 1 leaves it alone, towards 0 it becomes the mode.
    """
    return torch.softmax(logits.float() / temperature, dim=1)


def rebalance(prior: Tensor, uniform: float) -> Tensor:
    """Return the weights w ~ 1 / ((1 - lambda) p + lambda / Q) with sum p w = 1, (Q,).

    Args:
        prior: p, (Q,), of sum 1.
        uniform: lambda in (0, 1]; 1 weighs all bins alike.
    """
    weights = 1 / ((1 - uniform) * prior + uniform / len(prior))
    return weights / (prior * weights).sum()


def _candidates(centres: Tensor, count: int) -> Tensor:
    """Return for each cell of the plane the bins that may be among the nearest of a colour in it.

    A cell is the square about a node. At least `count` bins are no farther from any of its colours
    than the count-th least of the greatest distances; a bin whose least distance is more is out.

    Returns:
        (20 * 22, M) int64, the cells by a, then b.
    """
    axes = (
        torch.arange(low, high + 1, _STEP, dtype=centres.dtype)
        for low, high in zip(_LOW, _HIGH, strict=True)
    )
    offsets = (torch.cartesian_prod(*axes)[:, None] - centres).abs()
    least = ((offsets - _STEP / 2).clamp(min=0) ** 2).sum(dim=2)
    greatest = ((offsets + _STEP / 2) ** 2).sum(dim=2)
    bound = greatest.kthvalue(count, dim=1, keepdim=True).values
    most = int((least <= bound).sum(dim=1).max())
    return least.topk(most, dim=1, largest=False).indices
