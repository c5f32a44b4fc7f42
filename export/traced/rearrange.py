"""Follow numbers through the operators that only move them: which feature ends up where.

Every number of a source gets its own place in it as an integer. The operators behind the source,
run on these integers instead, tell for every value which numbers of the source it holds, and in
which order: through any mixture of views, permutations, splits and selections.
"""

import math
import operator as python
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from export.traced.graph import is_stored, operator, store, tensor

__all__ = [
    "features_read",
    "is_movement",
    "places_along",
    "settle_sizes",
    "sizes",
    "spread",
    "store_sized",
]

# The batch size of all bookkeeping. A model says "one image" by a 1 and "twice" by a 2, in whatever
# it does with its shapes; 3 is taken for neither.
_BATCH = 3

_MOVEMENTS = {
    "aten._unsafe_view",
    "aten.alias",
    "aten.chunk",
    "aten.clone",
    "aten.contiguous",
    "aten.flatten",
    "aten.mT",
    "aten.moveaxis",
    "aten.movedim",
    "aten.narrow",
    "aten.permute",
    "aten.reshape",
    "aten.select",
    "aten.slice",
    "aten.split",
    "aten.split_with_sizes",
    "aten.squeeze",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.t",
    "aten.transpose",
    "aten.unbind",
    "aten.unflatten",
    "aten.unsqueeze",
    "aten.view",
}


def _at_batch(value: Any, batch: int = _BATCH) -> Any:
    """Return an argument with every symbolic size, a node's or not, as it is at a batch size."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return value


def sizes(node: Node, batch: int = _BATCH) -> list[int]:
    """Return the shape of a node's value at a batch size."""
    return [_at_batch(size, batch) for size in node.meta["val"].shape]


def is_movement(node: Node) -> bool:
    """Say whether a node only moves the numbers of its first argument, or leaves some out."""
    if node.target is python.getitem:
        return isinstance(node.args[0], Node) and operator(node.args[0]) in _MOVEMENTS
    return operator(node) in _MOVEMENTS and "dtype" not in node.kwargs


def spread(source: Node) -> dict[Node, Any]:
    """Return where the numbers of a value are in every value that only moves them.

    Returns:
        The source and, behind it, each node reached through movements alone, with an integer
        tensor of the node's shape (several, for a node that returns several): the place in the
        flattened source from which each number comes.
    """
    shape = sizes(source)
    places: dict[Node, Any] = {source: torch.arange(math.prod(shape)).reshape(shape)}
    waiting = [source]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if not is_movement(user) or user.args[0] is not node:
                continue
            try:
                places[user] = _move(user, places[node])
            except RuntimeError:  # it fits one batch size alone
                continue
            waiting.append(user)
    return places


def places_along(way: list[Node]) -> Tensor:
    """Return where in the last of some values the numbers of the first are.

    Args:
        way: Each is made of the next one, by a movement or number by number.
    """
    shape = sizes(way[-1])
    places: Any = torch.arange(math.prod(shape)).reshape(shape)
    for node in reversed(way[:-1]):
        places = _move(node, places) if is_movement(node) else places
    assert isinstance(places, Tensor)
    return places


def features_read(way: list[Node]) -> Tensor:
    """Return which indices of the last dimension of a source a value made of it holds, sorted.

    Args:
        way: From the value to the source, as for `places_along`.
    """
    places = places_along(way) % sizes(way[-1])[-1]
    held = torch.zeros(sizes(way[-1])[-1], dtype=torch.bool)
    held[places.flatten()] = True
    return held.nonzero().flatten()


def _move(node: Node, places: Any) -> Any:
    """Run a movement on other numbers than the graph's."""
    if operator(node) in {"aten.alias", "aten.clone", "aten.contiguous"}:
        return places
    if node.target is python.getitem:
        return places[node.args[1]]
    args = map_arg(node.args[1:], _at_batch)
    kwargs = map_arg(node.kwargs, _at_batch)
    if operator(node) in {"aten.view", "aten._unsafe_view"}:  # whatever the strides
        return torch.ops.aten.reshape.default(places, *args, **kwargs)
    assert not isinstance(node.target, str)
    result: Tensor | tuple[Tensor, ...] = node.target(places, *args, **kwargs)
    return result


def store_sized(
    module: GraphModule, name: str, value: Tensor, *, before: Node, instead_of: Node | None = None
) -> Node:
    """Register a parameter as `store` does, and say that none of its sizes is symbolic."""
    node = store(module, name, value, before=before, instead_of=instead_of)
    settle_sizes(module)
    return node


def settle_sizes(module: GraphModule) -> None:
    """Say of every stored tensor that none of its sizes is symbolic: only the batch may vary.

    What is computed from a stored tensor has its sizes.
    """
    for node in module.graph.nodes:
        said = node.meta.get("val")
        if is_stored(node) and any(isinstance(size, torch.SymInt) for size in said.shape):
            mode = detect_fake_mode([said])
            assert mode is not None
            value = tensor(module, node).detach().to(said.dtype)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
