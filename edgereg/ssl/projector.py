"""The perceptron between a backbone and a loss; it is dropped in the end."""

from itertools import pairwise

from torch import nn

__all__ = ["projector"]


def projector(*widths: int, has_batchnorm: bool = True) -> nn.Sequential:
    """Return linear layers with BatchNorm and ReLU between them; the last one is bare.

    Args:
        widths: Of the input, of the hidden layers, and of the output.
        has_batchnorm: Whether BatchNorm stands before each ReLU.
    """
    layers: list[nn.Module] = []
    for width, following in pairwise(widths[:-1]):
        layers.append(nn.Linear(width, following, bias=not has_batchnorm))
        if has_batchnorm:
            layers.append(nn.BatchNorm1d(following))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
