"""Find the attentions of a traced graph that are written as the operators that they are.

    z = matmul(softmax(matmul(q, k^T) * s + mask), v)

with q, k and v moved about and scaled in whatever way before, and the mask and the scale optional.

Source: Vaswani et al., "Attention is all you need", arXiv:1706.03762, equation 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from export.passes.affine import as_affine
from export.traced.graph import arguments, module_path, operator
from export.traced.rearrange import is_movement

__all__ = ["Attention", "find_attentions", "name_sites", "single_factor", "trace_back"]

_PRODUCTS = {"aten.matmul", "aten.bmm", "aten.baddbmm"}
_BETWEEN = {"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.masked_fill"}


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention.

    Args:
        site: Its module's name, with its node's where that is not enough.
        scores: The product of query and transposed key.
        weights: The softmax.
        context: The product of the weights and the value.
    """

    site: str
    scores: Node
    weights: Node
    context: Node

    @property
    def operands(self) -> tuple[Node, Node, Node]:
        """Query, transposed key and value, as the products take them."""
        query, key = self.scores.args[-2:]
        value = self.context.args[1]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        return query, key, value


def find_attentions(graph: Graph) -> list[Attention]:
    """Return the plainly written attentions of a graph, in its order."""
    found = []
    for node in graph.nodes:
        if operator(node) != "aten.softmax" or not _is_last_dim(node):
            continue
        contexts = [user for user in node.users if operator(user) in {"aten.matmul", "aten.bmm"}]
        scores = _find_scores(node.args[0])
        if len(contexts) == 1 and contexts[0].args[0] is node and scores is not None:
            found.append((scores, node, contexts[0]))
    sites = name_sites([weights for _, weights, _ in found])
    return [Attention(sites[nodes[1]], *nodes) for nodes in found]


def name_sites(nodes: Sequence[Node]) -> dict[Node, str]:
    """Name each node by its module, and by itself where that is not enough."""
    paths = {node: module_path(node) for node in nodes}
    taken = list(paths.values())
    return {
        node: path if path and taken.count(path) == 1 else f"{path}.{node.name}".lstrip(".")
        for node, path in paths.items()
    }


def trace_back(module: GraphModule, value: Node) -> list[Node]:
    """Return a value and what it was before it was moved, and scaled by single numbers.

    Returns:
        The value first, its source last; each is made of the next one.
    """
    way = [value]
    while True:
        node = way[-1]
        source = node.args[0] if is_movement(node) else (single_factor(module, node) or (None,))[0]
        if not isinstance(source, Node):
            return way
        way.append(source)


def single_factor(module: GraphModule, node: Node) -> tuple[Node, float] | None:
    """Return what a node multiplies by a single number, and the number; None if it does not."""
    found = as_affine(module, node) if operator(node) in {"aten.mul", "aten.div"} else None
    if found is None or found[1].dim is not None:
        return None
    return found[0], float(found[1].scale)


def _is_last_dim(softmax: Node) -> bool:
    return bool(arguments(softmax)["dim"] in (-1, softmax.meta["val"].ndim - 1))


def _find_scores(value: Any) -> Node | None:
    """Return the product of query and key that a softmax' argument comes from, or None."""
    if not isinstance(value, Node):
        return None
    if operator(value) in _PRODUCTS:
        return None if value.kwargs else value
    if operator(value) in _BETWEEN:
        return _find_scores(value.args[0]) or _find_scores(value.args[1])
    return _find_scores(value.args[0]) if is_movement(value) else None
