"""Follow one dimension of a value through the operators that only move values about.

Instead of rules for reshape, permute, flatten, slice and a dozen others, each is run once on
labels: a tensor in which every value says at which index of the dimension it lies. Where the labels
come out along one dimension of the result, that is where the dimension went.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from export.traced.graph import concrete, operator, shape

__all__ = ["REARRANGEMENTS", "backwards", "forwards"]

REARRANGEMENTS = {
    *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"),
    *("aten.permute", "aten.transpose", "aten.t", "aten.swapaxes", "aten.movedim"),
    *("aten.squeeze", "aten.unsqueeze", "aten.expand", "aten.repeat"),
    *("aten.slice", "aten.select", "aten.narrow", "aten.roll", "aten.flip"),
    *("aten.channel_shuffle", "aten.pixel_shuffle", "aten.pixel_unshuffle"),
    *("aten.contiguous", "aten.clone", "aten.alias", "aten.detach"),
}


def forwards(chain: Sequence[Node], dim: int) -> tuple[int | None, Tensor] | None:
    """Return where a dimension of what goes into a chain of operators lies in what comes out.

    Args:
        chain: Of REARRANGEMENTS, each the first argument of the next.
        dim: Of the first one's first argument.

    Returns:
        The dimension of the result, and for each index there the index that its values come from;
        None and one index where all come from the same. None if they come mixed.
    """
    labels = _labels(chain, dim)
    found = None if labels is None else _line(labels)
    if found is None or found[0] is None:
        return found
    # A dimension that holds the batch, too, is as long as it was traced, and not as it will be.
    return found if isinstance(chain[-1].meta["val"].shape[found[0]], int) else None


def backwards(chain: Sequence[Node], dim: int) -> tuple[int, Tensor] | None:
    """Return where a dimension of what comes out of a chain of operators lay in what goes in.

    Args:
        chain: Of REARRANGEMENTS, each the first argument of the next.
        dim: Of the last one's result.

    Returns:
        The dimension of the first one's first argument, and for each index of the result's
        dimension the index there that its values come from. None if they come mixed.
    """
    argument, width = chain[0].args[0], shape(chain[-1])[dim]
    assert isinstance(argument, Node)
    for source, size in enumerate(shape(argument)):
        if size == 1 and width != 1:
            continue
        found = forwards(chain, source)
        if found is not None and (found[0] == dim or (found[0] is None and size == width == 1)):
            return source, found[1]
    return None


def _labels(chain: Sequence[Node], dim: int) -> Tensor | None:
    """Run operators on labels; None where one is not of those that move values about."""
    argument = chain[0].args[0]
    assert isinstance(argument, Node)
    size = shape(argument)
    ones = [1] * (len(size) - dim - 1)
    labels = torch.arange(size[dim], dtype=torch.int32).view(-1, *ones).expand(size)
    for node in chain:
        if operator(node) not in REARRANGEMENTS or not labels.numel():
            return None
        args, kwargs = tree_map(concrete, map_arg((node.args[1:], node.kwargs), concrete))
        labels = node.target(labels.contiguous(), *args, **kwargs)  # type: ignore[operator]
    return labels


def _line(labels: Tensor) -> tuple[int | None, Tensor] | None:
    """Return the one dimension along which labels vary, and the labels there."""
    if not labels.numel():
        return None
    first = labels.flatten()[:1].long()
    if bool((labels == first).all()):
        return None, first
    for dim in range(labels.ndim):
        line = labels.movedim(dim, 0).flatten(1)[:, :1]
        if bool((line != line[:1]).any()):  # it varies here: does it elsewhere, too?
            lined = line.view(-1, *[1] * (labels.ndim - dim - 1))
            return (dim, line.flatten().long()) if bool((labels == lined).all()) else None
    return None
