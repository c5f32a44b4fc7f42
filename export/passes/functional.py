"""Make a graph functional: in-place operators become plain ones, and what changes nothing goes.

    Given   y = relu_(x);  z = f(x, y)
    Result  y = relu(x);   z = f(y, y)

Where only a part of a tensor is changed, the whole is put together anew:

    Given   v = x[:, 1:3];  fill_(v, 0);              z = f(x)
    Result  v = x[:, 1:3];  w = slice_scatter(x, 0);  z = f(w)

Then a value is what its node returned, and copies (`clone`, `contiguous`), conversions to the type
that the value already has, and reshapes to the shape that it already has can be removed. `view`,
which can fail on the memory layout that is left, becomes `reshape`.

An operator stays in place where what it changes is read later through another view of it. The
caller's tensor, if a model changes that, is left alone from now on.

Source: the rule of views and bases of PyTorch's functionalization,
https://docs.pytorch.org/docs/stable/func.api.html (torch.func.functionalize).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from export.passes.fold_constants import constant_nodes
from export.traced.aliases import changed_memory, is_in_place, memory
from export.traced.graph import arguments, bypass, insert, module_path, mutated, operator, replace
from export.traced.randomness import is_random
from export.traced.report import PassReport

__all__ = ["make_functional"]

_ATEN = torch.ops.aten
_SAME_TENSOR = {"aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh"}
_COPIES = {"aten.clone", "aten.contiguous", "aten.lift_fresh_copy"}
_CASTS = {"aten.to", "aten._to_copy", "aten.type_as"}
_RESHAPES = {
    "aten.broadcast_to",
    "aten.expand",
    "aten.expand_as",
    "aten.flatten",
    "aten.narrow",
    "aten.repeat",
    "aten.reshape",
    "aten.reshape_as",
    "aten.slice",
    "aten.squeeze",
    "aten.unflatten",
    "aten.view",
    "aten.view_as",
    "aten._unsafe_view",
}
_OVERWRITES = {"aten.copy", "aten.slice_scatter", "aten.select_scatter"}  # where all is written
_PADS = {"aten.pad", "aten.constant_pad_nd"}
_NEUTRAL = {"aten.mul": 1, "aten.div": 1, "aten.add": 0, "aten.sub": 0}
_MAY_RETURN_AN_ARGUMENT = (
    _COPIES | _CASTS | _RESHAPES | _OVERWRITES | _PADS | {"aten.permute", *_NEUTRAL}
)
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default}
_SHAPED_LIKE = {
    _ATEN.reshape_as.default: _ATEN.reshape.default,
    _ATEN.view_as.default: _ATEN.reshape.default,
    _ATEN.expand_as.default: _ATEN.expand.default,
}
_SCATTERS = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
}
_READ_THE_LAYOUT = {"aten.as_strided", "aten.view_as_complex", "aten.set_"}


def make_functional(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Make a traced module functional, in place."""
    replaced: list[tuple[str, str]] = []
    reasons: dict[Node, str] = {}
    for node in list(module.graph.nodes):
        if operator(node) in _SAME_TENSOR:
            replaced.append((node.name, bypass(node).name))
    numbers = memory(module)
    for node in list(module.graph.nodes):
        if is_in_place(node) and not is_random(node):
            reason = _not_functional(node, numbers)
            if reason:
                reasons[node] = reason
            else:
                replaced.append((node.name, node.name))
    changed = changed_memory(module, numbers)
    has_layout = any(operator(node) in _READ_THE_LAYOUT for node in module.graph.nodes)
    for node in list(module.graph.nodes):
        replaced += _without_effect(node, numbers, changed, keep_layout=has_layout)
    constant = constant_nodes(module) if reasons else set()
    skipped = {
        f"{module_path(node)}.{node.name}".lstrip("."): reason
        for node, reason in reasons.items()
        if node not in constant
    }
    return module, PassReport(skipped=skipped, replaced=tuple(replaced))


def _not_functional(node: Node, numbers: dict[Node, int]) -> str | None:
    """Turn an in-place operator into a functional one, or say why not."""
    target = _functional_form(node)
    if target is None:
        return f"aten has no functional form of {operator(node)} with the same result"
    changed = node.args[0]
    assert isinstance(changed, Node)
    place = {other: number for number, other in enumerate(node.graph.nodes)}
    later = {other for other in place if place[other] > place[node]}
    relatives = [x for x in place if x not in later and numbers.get(x) == numbers[node]]
    stored = next((other for other in relatives if other.op == "get_attr"), None)
    if stored is not None:
        return f"it changes the stored tensor {stored.target}"
    read_later = [
        x for x in relatives if x not in (changed, node) and not later.isdisjoint(x.users)
    ]
    views = _views_up_to(changed, read_later)
    if views is None:
        return f"{read_later[0].name} lies in the memory that it changes, and is read later"
    node.target = target
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)
    if views:
        _scatter(node, views, later, numbers)
    return None


def _scatter(node: Node, views: list[Node], later: set[Node], numbers: dict[Node, int]) -> None:
    """Let the readers of a whole read one with a node's value in the place of the views' one.

    Those of the node itself read it there, too: what they change in place is the whole.
    """

    def add(target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        new = insert(target, *args, before=last.next, scope=node, **kwargs)
        # What was traced as a view of the old tensor may be one of the new.
        new.meta["val"], numbers[new] = like.meta["val"], numbers[node]
        return new

    value = last = whole = node
    for view in views:
        whole = view.all_input_nodes[0]
        scatter = _SCATTERS[view.target]  # type: ignore[index]
        value = last = add(scatter, whole, value, *view.args[1:], like=whole, **view.kwargs)
    whole.replace_all_uses_with(value, delete_user_cb=lambda user: user in later)
    if later.isdisjoint(node.users):
        return
    for view in reversed(views):
        value = last = add(view.target, value, *view.args[1:], like=view, **view.kwargs)
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user in later)


def _functional_form(node: Node) -> Any:
    """Return the functional twin of an in-place operator, or None."""
    name = operator(node).removeprefix("aten.")
    if not name.endswith("_") or list(mutated(node)) != list(node.args[:1]):
        return None
    packet = getattr(_ATEN, name[:-1], None)
    target = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    if target is None:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with torch.no_grad():
        value = target(*args, **kwargs)
    # It may promote the type, or broadcast, where the one in place keeps both.
    return target if _is_like(value, node.meta["val"]) else None


def _views_up_to(changed: Node, read_later: list[Node]) -> list[Node] | None:
    """Return the slices, innermost first, that lead to the one tensor that is read later.

    None: there are several such tensors, or other views on the way.
    """
    views: list[Node] = []
    while read_later:
        if changed.target not in _SCATTERS:
            return None
        views.append(changed)
        changed = changed.args[0]  # type: ignore[assignment]
        if [changed] == read_later:
            break
    return views


def _without_effect(
    node: Node, numbers: dict[Node, int], changed: set[int], *, keep_layout: bool
) -> Iterable[tuple[str, str]]:
    """Remove a node that returns an argument's value, or free it of what it need not read.

    A copy stays where an in-place operator still changes it or what it was copied from.
    """
    if operator(node) == "aten._assert_tensor_metadata":
        node.graph.erase_node(node)
        return []
    if not isinstance(node.meta.get("val"), Tensor) or numbers.get(node) in changed:
        return []
    same = None if keep_layout and operator(node) in _COPIES else _same_value(node)
    if same is not None:
        if numbers.get(same) in changed:
            return []
        replace(node, same)
        return [(node.name, same.name)]
    if node.target in _VIEWS and not keep_layout:
        node.target = _ATEN.reshape.default
        return [(node.name, node.name)]
    if node.target in _SHAPED_LIKE:
        node.args = (node.args[0], _sizes(node))
        node.target = _SHAPED_LIKE[node.target]
        return [(node.name, node.name)]
    return []


def _same_value(node: Node) -> Node | None:
    """Return the argument whose value an operator returns, or None."""
    name = operator(node)
    if name not in _MAY_RETURN_AN_ARGUMENT:
        return None
    given = arguments(node)
    source = given["src"] if name in _OVERWRITES else node.args[0]
    if not isinstance(source, Node) or not _is_like(node.meta["val"], source.meta.get("val")):
        return None
    if name == "aten.permute":
        rank = source.meta["val"].ndim
        is_same = [dim % rank for dim in given["dims"]] == list(range(rank))
    elif name in _PADS:
        is_same = not any(given["pad"])
    elif name in _NEUTRAL:
        is_same = _is_number(given["other"], _NEUTRAL[name]) and not given.get("rounding_mode")
    else:
        is_same = True
    return source if is_same else None


def _is_number(argument: Any, wanted: int) -> bool:
    return isinstance(argument, (int, float)) and argument == wanted


def _is_like(one: Any, other: Any) -> bool:
    """Say whether two tensors have the same type and shape, whatever the batch size."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.dtype == other.dtype and [*map(str, one.shape)] == [*map(str, other.shape)]


def _sizes(node: Node) -> list[Any]:
    """Return a node's shape as the arguments of `reshape` or `expand`, sizes read from the graph.

    The second argument, whose shape it takes on, is no longer needed unless it alone has a size.
    """
    like = node.args[1]
    assert isinstance(like, Node)
    sizes = list(node.meta["val"].shape)
    free = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
    is_reshape = node.target != _ATEN.expand_as.default
    if is_reshape and len(free) == 1 and 0 not in sizes[: free[0]] + sizes[free[0] + 1 :]:
        return [-1 if dim in free else size for dim, size in enumerate(sizes)]
    return [_size(node, like, dim) if dim in free else size for dim, size in enumerate(sizes)]


def _size(node: Node, like: Node, dim: int) -> Node:
    """Return an earlier node that has the symbolic size of a tensor's dimension."""
    wanted = str(like.meta["val"].shape[dim])
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        known = earlier.meta.get("val")
        if isinstance(known, torch.SymInt) and str(known) == wanted:
            found: Node = earlier
            return found
    return insert(_ATEN.sym_size.int, like, dim, before=node)
