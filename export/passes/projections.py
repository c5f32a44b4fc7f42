"""See what a linear layer's result is taken apart into: the heads of queries, keys and values.

Whatever views, permutations and selections stand between a projection and a head, all that counts
is which features of which tokens the head holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from export.traced.graph import arguments, is_stored, operator
from export.traced.rearrange import places_along, sizes, spread

__all__ = [
    "Layout",
    "ObstacleError",
    "Part",
    "Projection",
    "layout_of",
    "moved_input",
    "take_apart",
]


class ObstacleError(Exception):
    """Why projections stay as they are; never leaves the passes."""


@dataclass(frozen=True)
class Part:
    """One value that is taken out of a projection's result.

    Args:
        node: The value: (B, H, T, d), or with B and H merged, or T and d exchanged.
        rows: (H, d), the features of the projection that it holds.
        tokens: (B, T), which vectors of the projection's input it is made of.
        is_turned: Whether T and d are exchanged.
    """

    node: Node
    rows: Tensor
    tokens: Tensor
    is_turned: bool


@dataclass(frozen=True)
class Projection:
    """A linear layer and what its result is taken apart into.

    Args:
        layer: The linear layer.
        parts: All values that others than movements read.
        movements: The nodes in between.
    """

    layer: Node
    parts: tuple[Part, ...]
    movements: tuple[Node, ...]


@dataclass(frozen=True)
class Layout:
    """What a packed projection reads.

    Args:
        source: Its input.
        length: The number T of tokens.
        is_batch_first: Whether that is (..., T, D), and not (T, B, D).
    """

    source: Node
    length: int
    is_batch_first: bool


def take_apart(layer: Node, *, stops: bool) -> Projection:
    """Return a projection with its parts.

    Args:
        layer: The linear layer.
        stops: Whether what is one vector for each head and token is a part in any case, even if
            others only take tokens or features of it (a rotation of those that have a place).

    Raises:
        ObstacleError: They are not all heads of one kind.
    """
    for name in ("weight", "bias"):
        given = arguments(layer)[name]
        if given is not None and not is_stored(given):
            raise ObstacleError(f"the {name} of {layer.name} is computed in the graph")
    places = spread(layer)
    parts: list[Part] = []
    movements: list[Node] = []
    waiting = [layer]
    while waiting:
        node = waiting.pop()
        if node is not layer:
            movements.append(node)
        read = places[node]
        if stops and node is not layer and isinstance(read, Tensor) and read.ndim == 4:
            part = as_heads(layer, node, read)
            if part is not None:
                parts.append(part)
                continue
        waiting += [user for user in node.users if user in places]
        readers = [user for user in node.users if user not in places]
        if all(operator(user) == "aten.sym_size" for user in readers):
            continue
        part = as_heads(layer, node, read) if isinstance(read, Tensor) else None
        if part is None:
            raise ObstacleError(f"{node.name} is not one vector for each head and token")
        parts.append(part)
    return Projection(layer, tuple(parts), tuple(movements))


def as_heads(layer: Node, node: Node, places: Tensor) -> Part | None:
    """Say which features and which tokens a value holds; None if it is no (B, H, T, d)."""
    features = sizes(layer)[-1]
    for is_turned in (False, True):
        turned = places.mT if is_turned and places.ndim > 1 else places
        rows, tokens = turned % features, turned // features
        if turned.ndim == 3:
            heads, rest = divmod(int(rows.flatten().bincount().count_nonzero()), rows.shape[-1])
            if rest or len(rows) % heads:
                continue
            rows, tokens = (x.reshape(-1, heads, *x.shape[1:]) for x in (rows, tokens))
        if rows.ndim != 4 or not rows.numel():  # a slice before tokens that a model may lack
            continue
        if (rows == rows[:1, :, :1]).all() and (tokens == tokens[:, :1, :, :1]).all():
            return Part(node, rows[0, :, 0].contiguous(), tokens[:, 0, :, 0], is_turned)
    return None


def layout_of(projections: Sequence[Projection]) -> Layout:
    """Say how a packed projection's input is to be read.

    Raises:
        ObstacleError: It does not hold the tokens in an order of which a permutation makes heads.
    """
    parts = [part for projection in projections for part in projection.parts]
    tokens = parts[0].tokens
    if any(not torch.equal(part.tokens, tokens) for part in parts):
        raise ObstacleError("its query, key and value are not of the same tokens")
    if any(not isinstance(part.node.meta["val"].shape[-2 + part.is_turned], int) for part in parts):
        raise ObstacleError("it attends over the batch")
    layers = [projection.layer for projection in projections]
    inputs = [layer.args[0] for layer in layers]
    source, moved = moved_input(layers[0])
    choices = [(source, _original(tokens, moved))]
    if all(given is inputs[0] for given in inputs):
        choices.append((inputs[0], tokens))  # type: ignore[arg-type]
    natural = torch.arange(tokens.numel())
    for given, read in choices:
        if torch.equal(read, natural.view(read.shape)):
            return Layout(given, read.shape[1], is_batch_first=True)
    for given, read in choices:
        if len(sizes(given)) == 3 and torch.equal(read, natural.view(read.T.shape).T):
            return Layout(given, read.shape[1], is_batch_first=False)
    raise ObstacleError("its tokens change their order behind the projection")


def moved_input(layer: Node) -> tuple[Node, Node | None]:
    """Return a layer's input before its vectors changed their order, and what changed it."""
    value = layer.args[0]
    assert isinstance(value, Node)
    last = len(sizes(value)) - 1
    if operator(value) in {"aten.transpose", "aten.permute"}:
        order = torch.empty([1] * last + [2], device="meta")
        source = value.args[0]
        assert isinstance(source, Node)
        if value.target(order, *value.args[1:]).shape[-1] == 2:  # type: ignore[operator]
            return source, value
    return value, None


def _original(tokens: Tensor, moved: Node | None) -> Tensor:
    """Return which vectors of a value tokens are, from which they are after a permutation of it."""
    if moved is None:
        return tokens
    source = moved.args[0]
    assert isinstance(source, Node)
    return places_along([moved, source])[..., 0].flatten()[tokens] // sizes(moved)[-1]
