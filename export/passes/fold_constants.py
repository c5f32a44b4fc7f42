"""Compute once what no input has a part in, and store the result.

    Given   y = conv(x; g * V / ||V||)
    Result  y = conv(x; W)               with W = g * V / ||V||, in float64

Weight normalisation and standardisation, gathered tables of relative positions, resized position
embeddings, rotary angles and attention masks are of this kind. In-place operators among constants
run in their order on copies, and each value is taken as its reader finds it.

A result that would enlarge what is stored (an `expand`) stays in the graph, and what it is computed
from is folded instead. A tensor that changes from call to call is no constant, nor is a random one.

Source: Aho et al., "Compilers", 2nd edition, section 8.5.4 (constant folding); Salimans and Kingma,
"Weight Normalization", arXiv:1602.07868, section 2; Qiao et al., "Weight Standardization",
arXiv:1903.10520, section 3.1; Liu et al., "Swin Transformer", arXiv:2103.14030, section 3.2.
"""

import hashlib
import operator as python
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from export.traced.aliases import memory
from export.traced.float64 import mathematics
from export.traced.graph import arguments, module_path, mutated, operator, store, tensor
from export.traced.randomness import is_random
from export.traced.report import Change, PassReport

__all__ = ["constant_nodes", "fold_constants"]

_MAX_ELEMENTS = 1_000_000  # 4 MB in float32; BEiT's table of positions, a block's, has 465 732
_MAX_GROWTH = 2
_UNDEFINED = ("aten.empty", "aten.new_empty", "aten.resize")
# Of their first argument these read only the type, and the second three the shape, too.
_NEW = {"aten.new_zeros", "aten.new_ones", "aten.new_full"}
_LIKE = {"aten.zeros_like", "aten.ones_like", "aten.full_like"}


def fold_constants(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold a traced module's constants, in place."""
    constants = constant_nodes(module)
    constants -= _moved_by_rounding(module, constants)
    changed = []
    stored: dict[tuple[Node, int], Node] = {}
    equal: dict[tuple[Any, ...], Node] = {}
    readings = list(_readings(module, constants))
    _forget(module, constants)
    for reading in readings:
        reader, source, version = reading.reader, reading.source, reading.version
        if (source, version) not in stored:
            known = source.meta["val"].dtype, source.meta["val"].shape, _digest(reading.value)
            if known not in equal:  # every block of a transformer has the same angles, or mask
                node = store(module, _name(reader, source), reading.value, before=reader)
                node.meta["val"] = source.meta["val"]
                equal[known] = node
            stored[source, version] = node = equal[known]
            # A constant that was written to in part has no node of its own in the traced graph.
            before, after = (source, node) if version == 0 else (reader, reader)
            site = f"{module_path(source)}.{source.name}".lstrip(".")
            site = f"{site}_{version}" if version else site
            changed.append(Change(site, "computed once", before.name, after.name))
        reader.replace_input_with(source, stored[source, version])
    for node in reversed(list(module.graph.nodes)):
        if node in constants and not node.users:
            module.graph.erase_node(node)
    return module, PassReport(tuple(changed))


def constant_nodes(module: GraphModule) -> set[Node]:
    """Return the nodes that no input has a part in and that can be computed once."""
    numbers = memory(module)
    spoiled: set[int] = set()  # memory that is not constant
    kept: set[Node] = set()  # nodes that are, but are not to be stored
    while True:
        constants = _constants(module, numbers, spoiled, kept)
        found = {numbers[node] for node in constants if node.op == "get_attr"}
        mixed = {numbers[node] for node in module.graph.nodes if node not in constants} | found
        more = {
            numbers[changed]
            for node in module.graph.nodes
            for changed in mutated(node)
            if numbers[changed] in mixed
        }
        unfit = {node for node in _frontier(constants) if not _is_storable(node)}
        if more <= spoiled and not unfit:
            return constants
        spoiled |= more
        kept |= unfit


def _constants(
    module: GraphModule, numbers: dict[Node, int], spoiled: set[int], kept: set[Node]
) -> set[Node]:
    constants: set[Node] = set()
    for node in module.graph.nodes:
        if node in kept or numbers[node] in spoiled:
            continue
        if node.op == "get_attr":
            is_constant = isinstance(node.meta.get("val"), Tensor)
        else:
            is_constant = _is_pure(node) and all(
                argument in constants for argument in _values_read(node)
            )
        if is_constant:
            constants.add(node)
    return constants


def _is_pure(node: Node) -> bool:
    """Say whether an operator's result depends on its arguments alone."""
    if node.op != "call_function":
        return False
    if node.target is python.getitem:
        return True
    name = operator(node)
    return bool(name) and not name.startswith(_UNDEFINED) and not is_random(node)


def _values_read(node: Node) -> list[Node]:
    """Return the nodes on whose values, not only shapes, a node depends."""
    first = node.args[:1]
    if operator(node) in _NEW or (operator(node) in _LIKE and _has_fixed_shape(node)):
        return [argument for argument in node.all_input_nodes if argument not in first]
    if operator(node) == "aten.sym_size" and isinstance(node.meta["val"], int):
        return []
    return node.all_input_nodes


def _has_fixed_shape(node: Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _frontier(constants: set[Node]) -> Iterator[Node]:
    """Yield the computed constants that others read."""
    for node in constants:
        if node.op != "get_attr" and any(user not in constants for user in node.users):
            yield node


def _is_storable(node: Node) -> bool:
    """Say whether a constant is a tensor, real, and not much larger than what it is made of."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_complex():
        return False  # Module.to(dtype) would drop the imaginary part
    if value.numel() <= _MAX_ELEMENTS:
        return True
    made_of: set[Node] = set()
    todo = [node]
    while todo:
        for argument in _values_read(todo.pop()):
            if argument not in made_of:
                made_of.add(argument)
                todo.append(argument)
    sizes = [source.meta["val"].numel() for source in made_of if source.op == "get_attr"]
    return bool(value.numel() <= _MAX_GROWTH * sum(sizes))


@dataclass(frozen=True)
class _Reading:
    """A computed constant, as a node that is none finds it.

    Args:
        reader: Not a constant.
        source: The constant.
        version: How often it was changed in place since it was made.
        value: Its own memory.
    """

    reader: Node
    source: Node
    version: int
    value: Tensor


def _readings(module: GraphModule, constants: set[Node]) -> Iterator[_Reading]:
    """Run the constants in the graph's order and yield what the other nodes read of them."""
    numbers = memory(module)
    values: dict[Node, Any] = {}
    changes: dict[int, int] = {}  # by memory: the in-place operators so far
    born: dict[Node, int] = {}
    with mathematics():
        for node in module.graph.nodes:
            if node in constants:
                values[node] = _run(module, node, values)
                for changed in mutated(node):
                    changes[numbers[changed]] = changes.get(numbers[changed], 0) + 1
                born[node] = changes.get(numbers[node], 0)
                continue
            for source in node.all_input_nodes:
                if source in constants and source.op != "get_attr":
                    version = changes.get(numbers[source], 0) - born[source]
                    yield _Reading(node, source, version, values[source].clone())


def _moved_by_rounding(module: GraphModule, constants: set[Node]) -> set[Node]:
    """Return the whole numbers and truth values that the traced precision makes others of.

    Five, computed as log(243) / log(3), is 5 in float64 and 4.9999995 in float32, and then
    truncated: they are left to the model, and what is made of them as well.
    """
    if not any(_discretises(node) for node in constants):
        return set()
    exact: dict[Node, Any] = {}
    rounded: dict[Node, Any] = {}
    moved: set[Node] = set()
    for node in module.graph.nodes:
        if node not in constants:
            continue
        if any(argument in moved for argument in node.all_input_nodes):
            moved.add(node)
            continue
        with mathematics():
            exact[node] = _run(module, node, exact)
        stored = node.op == "get_attr" and node.meta["val"].is_floating_point()
        value = exact[node].to(node.meta["val"].dtype) if stored else None
        rounded[node] = _run(module, node, rounded) if value is None else value
        if _discretises(node) and not torch.equal(exact[node], rounded[node]):
            moved.add(node)
    return moved


def _discretises(node: Node) -> bool:
    """Say whether an operator makes whole numbers or truth values of real ones."""
    if not all(isinstance(x.meta.get("val"), Tensor) for x in (node, *node.all_input_nodes)):
        return False
    reads_real = any(x.meta["val"].is_floating_point() for x in node.all_input_nodes)
    return reads_real and not node.meta["val"].is_floating_point()


def _run(module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return tensor(module, node)
    if operator(node) == "aten.sym_size":
        return node.meta["val"]
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: values.get(argument))
    if operator(node) in _NEW | _LIKE and args[0] is None:
        like = node.args[0].meta["val"]  # type: ignore[union-attr]
        shape = node.meta["val"].shape if operator(node) in _LIKE else 0
        args = (torch.empty(shape, dtype=like.dtype), *args[1:])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _digest(value: Tensor) -> bytes:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).digest()


def _forget(module: GraphModule, constants: set[Node]) -> None:
    """Remove the stored tensors that only constants read, so that their names are free."""
    sources = [node for node in module.graph.nodes if node.op == "get_attr"]
    read = {
        node.target
        for node in sources
        if node not in constants or any(user not in constants for user in node.users)
    }
    for name in {str(node.target) for node in sources if node.users} - read:
        prefix, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(prefix), leaf)


def _name(reader: Node, source: Node) -> str:
    """Return what a constant is called: its reader's weight if it is one, or by its own node."""
    if operator(reader):
        for name, argument in arguments(reader).items():
            if argument is source and name in {"weight", "bias"}:
                return f"{module_path(reader)}.{name}"
    return f"{module_path(source)}.{source.name}"
