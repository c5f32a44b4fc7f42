"""Read and rewrite a traced graph of ATen operators: what every pass needs.

A node's `meta["val"]` is a tensor without data that says shape and type; the batch is symbolic in
it. The passes run on a float64 copy of the graph whose `val`s still say the traced type: only
shapes are to be relied on.
"""

import operator as python
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

__all__ = [
    "arguments",
    "bypass",
    "concrete",
    "insert",
    "is_stored",
    "is_view",
    "module_path",
    "mutated",
    "operator",
    "operator_name",
    "replace",
    "shape",
    "store",
    "tensor",
]


def operator(node: Any) -> str:
    """Return the ATen operator that a node calls, without its overload ("aten.conv2d"), or ""."""
    return operator_name(node.target) if isinstance(node, Node) else ""


def operator_name(target: Any) -> str:
    """Return the name of an ATen operator, without its overload; "" for anything else."""
    return str(getattr(target, "overloadpacket", ""))


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a node that calls an ATen operator by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    defaults = {argument.name: argument.default_value for argument in schema}
    return defaults | given | node.kwargs


def module_path(node: Node) -> str:
    """Return the name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])


def is_stored(argument: Any) -> bool:
    """Say whether an argument is a tensor that is stored in the module."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return False
    return isinstance(argument.meta.get("val"), Tensor)  # it may read a nested graph


def tensor(module: GraphModule, source: Node) -> Tensor:
    """Return the tensor that a `get_attr` node reads; not a copy."""
    value = attrgetter(str(source.target))(module)
    assert isinstance(value, Tensor)
    return value


def shape(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's value, with the traced batch size (2 or more) as the batch."""
    return tuple(concrete(size) for size in node.meta["val"].shape)


def concrete(value: Any) -> Any:
    """Return an argument with every symbolic size, a node's or not, as it was traced."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)  # type: ignore[arg-type]
    return value


def is_view(node: Node) -> bool:
    """Say whether an operator's result may share memory with one of its arguments."""
    target = node.target
    if target is python.getitem:
        return True
    schema = getattr(target, "_schema", None)
    if operator(node) in {"aten.reshape", "aten.flatten", "aten.contiguous", "aten.to"}:
        return True  # a view where it can be one, which the schema does not say
    return schema is not None and any(
        argument.alias_info is not None and not argument.alias_info.is_write
        for argument in schema.arguments
    )


def mutated(node: Node) -> Iterator[Node]:
    """Yield the arguments that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    given = arguments(node)
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed = given[argument.name]
            yield from (x for x in (changed if isinstance(changed, list) else [changed]) if x)


def insert(
    target: Callable[..., Any],
    *args: Any,
    before: Node,
    scope: Node | None = None,
    like: Node | None = None,
    **kwargs: Any,
) -> Node:
    """Insert a call of an ATen operator and give it shape, type and a module's name.

    Args:
        target: Such as `torch.ops.aten.mul.Tensor`.
        *args: Its arguments.
        before: The node before which it stands.
        scope: The node whose module it counts to; `before` unless stated.
        like: A node of the same shape and type, for an operator that torch can only follow by
            binding the batch size, in the whole graph, to the one that was traced.
        **kwargs: Its arguments by name.
    """
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    meta = (scope or before).meta
    node.meta = {key: meta[key] for key in ("nn_module_stack", "torch_fn") if key in meta}
    if like is not None:
        node.meta["val"] = like.meta["val"]
        return node
    values = map_arg((args, kwargs), lambda argument: argument.meta["val"])
    with torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def store(
    module: GraphModule, name: str, value: Tensor, *, before: Node, instead_of: Node | None = None
) -> Node:
    """Register a parameter and return a node that reads it.

    Args:
        module: The traced module.
        name: What it shall be called, with the name of its owner: "layer1.conv.weight". A number
            is put behind it where the name is taken.
        value: The parameter.
        before: The node, its only reader, before which the new node stands.
        instead_of: A stored tensor that it replaces, and whose name it takes, if `before` is that
            one's only reader too; else that one stays as it is.
    """
    if instead_of is not None and _readers(module, instead_of) == [before]:
        name = str(instead_of.target)
    else:
        name = _free_name(module, name.lstrip("."))
    prefix, _, leaf = name.rpartition(".")
    owner = _owner(module, prefix)
    if leaf in owner._buffers:  # functional code may convolve with a buffer
        del owner._buffers[leaf]
        owner._non_persistent_buffers_set.discard(leaf)
    if leaf in owner._parameters or not hasattr(owner, leaf):
        owner.register_parameter(
            leaf, nn.Parameter(value.contiguous().clone(), requires_grad=False)
        )
    else:  # a plain attribute
        setattr(owner, leaf, value.contiguous().clone())
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta["val"] = _without_data(before, value)
    return node


def replace(node: Node, value: Node) -> None:
    """Let every user of a node use another instead, and erase it."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def bypass(node: Node) -> Node:
    """Let every user of a node use its first argument instead, and return that."""
    source = node.args[0]
    assert isinstance(source, Node)
    replace(node, source)
    return source


def _without_data(neighbour: Node, value: Tensor) -> Any:
    """Return what `meta["val"]` says of a stored tensor: of the traced type, as all others do."""
    values = tree_leaves([argument.meta["val"] for argument in neighbour.all_input_nodes])
    values = [known for known in values if isinstance(known, Tensor)]
    mode = detect_fake_mode(values)
    floating = [known.dtype for known in values if known.is_floating_point()]
    wanted = floating[0] if floating and value.is_floating_point() else value.dtype
    assert mode is not None
    return mode.from_tensor(value.detach().to(wanted), static_shapes=True)


def _readers(module: GraphModule, source: Node) -> list[Node]:
    """Return the users of a stored tensor, through whatever node they read it."""
    same = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == source.target]
    return [user for node in same for user in node.users]


def _free_name(module: GraphModule, wanted: str) -> str:
    """Return the wanted name, or the first of NAME_2, NAME_3 ... that is not taken."""
    prefix, _, leaf = wanted.rpartition(".")
    owner = _owner(module, prefix)
    number, name = 1, leaf
    while hasattr(owner, name):
        number += 1
        name = f"{leaf}_{number}"
    return f"{prefix}.{name}".lstrip(".")


def _owner(module: GraphModule, prefix: str) -> nn.Module:
    """Return the sub-module of a name; made where the graph took along none."""
    owner: nn.Module = module
    for part in prefix.split(".") if prefix else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner
