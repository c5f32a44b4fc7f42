"""Write what only moves numbers with as few operators as it takes, and with constant shapes.

    Given   reshape(x, (x.shape[0] * 5, 8))
    Result  reshape(x, (-1, 8))                  no Shape, Gather and Concat in the ONNX file

    Given   a chain of reshapes and permutations
    Result  at most one reshape, one permutation, and one reshape

    Given   moved(linear(x))  or  linear(moved(x))     where whole feature vectors are moved
    Result  the other, if the movement then merges with one that is already there

Each dimension is cut into the factors that the chain keeps together ("b (h d) -> h b d" in the
words of einops); their order before and behind is all that the chain does.

Source: Rogozhnikov, "Einops", ICLR 2022, section 4 (the same decomposition).
"""

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from export.traced.factors import Factors, Step
from export.traced.graph import insert, operator, replace
from export.traced.rearrange import settle_sizes, sizes
from export.traced.report import Change, PassReport

__all__ = ["plain_shapes"]

_aten = torch.ops.aten
_RESHAPES = {
    *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"),
    *("aten.squeeze", "aten.unsqueeze"),
}
_PERMUTATIONS = {
    *("aten.permute", "aten.transpose", "aten.t", "aten.mT"),
    *("aten.swapaxes", "aten.swapdims", "aten.movedim", "aten.moveaxis"),
}

# The batch size of all bookkeeping: a prime that is a factor of no other size.
_BATCH = 1_000_003


def plain_shapes(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Write a traced module's reshapes and permutations plainly, in place."""
    settle_sizes(module)
    changed = []
    for node in list(module.graph.nodes):
        change = _write_constants(node)
        if change:
            changed.append(change)
    for node in reversed(list(module.graph.nodes)):  # the ends of chains before their beginnings
        if node.users and _is_step(node):
            change = _shorten(node)
            if change:
                changed.append(change)
    return module, PassReport(tuple(changed))


def _write_constants(node: Node) -> Change | None:
    """Write a reshape's shape as constants, at most one of them -1, and a view as a reshape."""
    if operator(node) not in {"aten.view", "aten.reshape", "aten._unsafe_view"}:
        return None
    wanted = _with_free_batch(sizes(node, _BATCH))
    is_constant = all(isinstance(size, int) for size in node.args[1])  # type: ignore[union-attr]
    if wanted is None or (operator(node) == "aten.reshape" and is_constant):
        return None
    node.target = _aten.reshape.default
    node.args = (node.args[0], wanted)
    return Change(node.name, "its shape written as constants", node.name, node.name)


def _with_free_batch(shape: Sequence[int]) -> list[int] | None:
    """Return a shape with -1 for the dimension that holds the batch; None if several do."""
    written = [size if size % _BATCH else -1 for size in shape]
    return written if written.count(-1) < 2 else None


def _shorten(end: Node) -> Change | None:
    """Replace the chain that ends at a node by a shorter one, around a linear layer perhaps."""
    if len(end.users) == 1 and _is_step(next(iter(end.users))):
        return None  # a longer chain's end will tell
    behind = _chain(end)
    source = _source(behind)
    if operator(source) == "aten.linear" and len(source.users) == 1:
        change = _move_past(source, behind)
        if change is not None:
            return change
    steps = _canonical(sizes(source, _BATCH), behind)
    if steps is None or len(steps) >= len(behind):
        return None
    return _replace(end, behind, _insert(source, steps, before=end))


def _move_past(layer: Node, behind: list[Node]) -> Change | None:
    """Move a chain before a linear layer behind it, or the other way round, if both get shorter."""
    entry, end = layer.args[0], behind[-1]
    assert isinstance(entry, Node)
    if not _is_step(entry) or len(entry.users) != 1:
        return None
    before = _chain(entry)
    source, both = _source(before), [*before, *behind]
    inputs, features = sizes(entry)[-1], sizes(layer)[-1]
    shape = sizes(source, _BATCH)
    if _moves_vectors(behind):
        steps = _canonical(shape, both, width=inputs, within=behind)
        if steps is not None and len(steps) < len(both):
            moved = _insert(source, steps, before=layer)
            return _replace(end, [*before, layer, *behind], _like(layer, moved))
    if _moves_vectors(before):
        shape = [*shape[:-1], features]
        steps = _canonical(shape, both, width=features, within=before)
        if steps is not None and len(steps) < len(both):
            new = _insert(_like(layer, source), steps, before=end)
            return _replace(end, [*before, layer, *behind], new)
    return None


def _like(layer: Node, source: Node) -> Node:
    """Insert the same linear layer for another input."""
    return insert(_aten.linear.default, source, *layer.args[1:], before=layer)


def _is_step(node: Node) -> bool:
    return operator(node) in _RESHAPES | _PERMUTATIONS


def _source(chain: Sequence[Node]) -> Node:
    source = chain[0].args[0]
    assert isinstance(source, Node)
    return source


def _chain(end: Node) -> list[Node]:
    """Return the steps that lead to a node and are read by nothing else, the first one first."""
    chain = [end]
    while _is_step(_source(chain)) and len(_source(chain).users) == 1:
        chain.insert(0, _source(chain))
    return chain


def _moves_vectors(chain: Sequence[Node]) -> bool:
    """Say whether a chain moves vectors along the last dimension as they are."""
    for node in chain:
        shape = sizes(_source([node]), _BATCH)
        if operator(node) in _PERMUTATIONS:
            if _order(node)[-1] != len(shape) - 1:
                return False
        elif sizes(node, _BATCH)[-1:] != shape[-1:]:
            return False
    return True


def _order(permutation: Node) -> list[int]:
    """Return which dimension comes to each place."""
    ndim = len(sizes(_source([permutation])))
    numbered = torch.empty(list(range(2, ndim + 2)), device="meta")
    moved = permutation.target(numbered, *permutation.args[1:])  # type: ignore[operator]
    return [size - 2 for size in moved.shape]


def _canonical(
    shape: Sequence[int], chain: Sequence[Node], *, width: int = 0, within: Sequence[Node] = ()
) -> list[Step] | None:
    """Return the fewest steps that do to a value what a chain does; None if that is not to be seen.

    Args:
        shape: Of the value.
        chain: Reshapes and permutations.
        width: What the last dimension is, behind the steps of `within`, instead of what it was.
        within: Steps on the other side of a linear layer.
    """
    factors = Factors(shape)
    for node in chain:
        if operator(node) in _PERMUTATIONS:
            factors.permute(_order(node))
            continue
        wanted = sizes(node, _BATCH)
        if not factors.reshape([*wanted[:-1], width] if node in within else wanted):
            return None
    return factors.steps()


def _insert(value: Node, steps: Sequence[Step], *, before: Node) -> Node:
    for target, argument in steps:
        if target == "reshape":
            argument = _with_free_batch(argument) or argument
        value = insert(getattr(_aten, target).default, value, argument, before=before)
    return value


def _replace(end: Node, erased: Sequence[Node], new: Node) -> Change:
    """Let a chain's users use another value, and erase the chain."""
    moved = tuple(node.name for node in erased if node is not end)
    name = end.name
    replace(end, new)
    for node in reversed([node for node in erased if node is not end]):
        node.graph.erase_node(node)
    return Change(name, "its steps made fewer", name, new.name, moved)
