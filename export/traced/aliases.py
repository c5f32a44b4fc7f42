"""Say which values of a traced graph may lie in the same memory: what in-place operators touch.

Two nodes count as one where an operator's schema says so, where one may return its very argument
(`reshape`, `contiguous`), and where torch.export saw them in one storage (`einsum("ij->ji", x)`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.traced.graph import arguments, is_view, mutated, tensor

__all__ = ["changed_memory", "changing", "is_in_place", "memory"]


def memory(module: GraphModule) -> dict[Node, int]:
    """Number the memory of every node's value; two of different numbers share none."""
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    members = {number: [node] for node, number in numbers.items()}

    def join(one: Node, other: Node) -> None:
        kept, gone = sorted((numbers[one], numbers[other]))
        if kept != gone:
            for node in members[gone]:
                numbers[node] = kept
            members[kept] += members.pop(gone)

    first: dict[tuple[str, int], Node] = {}  # by what is stored, and by what was traced
    for node in module.graph.nodes:
        for argument in (*_viewed(node), *mutated(node)):
            join(node, argument)
        for key in _storages(module, node):
            join(node, first.setdefault(key, node))
    return numbers


def changed_memory(module: GraphModule, numbers: dict[Node, int]) -> set[int]:
    """Return the numbers of the memory that some operator changes in place."""
    return {numbers[changed] for node in module.graph.nodes for changed in mutated(node)}


def changing(module: GraphModule) -> set[Node]:
    """Return the nodes whose values' memory some operator changes in place."""
    numbers = memory(module)
    changed = changed_memory(module, numbers)
    return {node for node, number in numbers.items() if number in changed}


def is_in_place(node: Node) -> bool:
    """Say whether an operator changes one of its arguments."""
    return next(mutated(node), None) is not None


def _viewed(node: Node) -> Iterator[Node]:
    """Yield the arguments that share memory with the result."""
    if node.op != "call_function" or not is_view(node):
        return
    schema = getattr(node.target, "_schema", None)
    given = arguments(node) if schema is not None else {}
    named = [
        given[argument.name]
        for argument in (schema.arguments if schema is not None else ())
        if argument.alias_info is not None
    ]
    for value in named or node.args[:1]:
        values = value if isinstance(value, (list, tuple)) else [value]
        yield from (argument for argument in values if isinstance(argument, Node))


def _storages(module: GraphModule, node: Node) -> Iterator[tuple[str, int]]:
    """Yield what identifies the memory of a node's value."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield "traced", value.untyped_storage()._cdata
    if node.op == "get_attr" and isinstance(value, Tensor):
        yield "stored", tensor(module, node).untyped_storage().data_ptr()
