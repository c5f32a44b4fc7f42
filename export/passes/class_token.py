"""Pad the tokens with zeros where a class token was put beside them, and add it.

    Given   cat([expand(c, (B, 1, D)), x], 1) + p
    Result  pad(x) + [p_0 + c; p_1; p_2; ...]

A stored token needs the batch size to stand beside those of each image: Shape, Concat, Expand and
Concat in an ONNX file. To be added, it need not be repeated. Without a position p that follows,
the sum is with [c; 0; 0; ...].

Source: x + 0 = x; the class token is that of Dosovitskiy et al., arXiv:2010.11929, equation 1.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.traced.graph import arguments, insert, is_stored, module_path, operator, replace, tensor
from export.traced.rearrange import sizes, store_sized
from export.traced.report import Change, PassReport

__all__ = ["pad_class_token"]

_aten = torch.ops.aten


def pad_class_token(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Add what a traced module concatenates with each of a batch alike, in place."""
    changed = []
    for node in list(module.graph.nodes):
        if operator(node) == "aten.cat":
            change = _pad(module, node)
            if change is not None:
                changed.append(change)
    return module, PassReport(tuple(changed))


def _pad(module: GraphModule, cat: Node) -> Change | None:
    """Replace a concatenation by a sum; None where nothing in it is the same for all images."""
    parts: list[Node] = list(arguments(cat)["tensors"])
    dim = arguments(cat)["dim"] % len(sizes(cat))
    repeated = [_repeated(module, part) for part in parts]
    own = [number for number, part in enumerate(repeated) if part is None]
    if len(own) != 1 or len(parts) < 2 or dim == 0:
        return None
    value = parts[own[0]]
    if not isinstance(value.meta["val"].shape[dim], int):
        return None
    lengths = [sizes(part)[dim] for part in parts]
    shape = [1, *sizes(cat)[1:]]
    some = next(part for part in repeated if part is not None)
    blank = some.new_zeros([*shape[:dim], lengths[own[0]], *shape[dim + 1 :]])
    added = torch.cat([blank if part is None else part for part in repeated], dim)

    around = [sum(lengths[: own[0]]), sum(lengths[own[0] + 1 :])]
    padding = [0] * 2 * (len(shape) - dim - 1) + around
    end, position = _following_sum(module, cat)
    if position is not None:
        added = added + position
    stored = store_sized(module, f"{module_path(cat)}.tokens", added, before=end)
    pad = _aten.constant_pad_nd.default
    padded = insert(pad, value, padding, before=end, scope=cat, like=cat)
    result = insert(_aten.add.Tensor, padded, stored, before=end, scope=cat)
    change = Change(end.name, "added to the padded tokens", end.name, result.name, (cat.name,))
    replace(end, result)
    if end is not cat:
        cat.graph.erase_node(cat)
    return change


def _repeated(module: GraphModule, part: Node) -> Tensor | None:
    """Return what a value is for each image, (1, ...), if it is stored and the same for all."""
    if operator(part) not in {"aten.expand", "aten.repeat"} or not is_stored(part.args[0]):
        return None
    assert isinstance(part.args[0], Node)
    value = tensor(module, part.args[0])
    value = value.reshape(*[1] * (len(sizes(part)) - value.ndim), *value.shape)
    shape = [1, *sizes(part)[1:]]
    if value.shape[0] != 1 or isinstance(part.meta["val"].shape[0], int):
        return None
    if operator(part) == "aten.repeat":
        return value if list(value.shape) == shape else None
    return value.expand(shape)


def _following_sum(module: GraphModule, cat: Node) -> tuple[Node, Tensor | None]:
    """Return the sum with a stored tensor that alone reads a concatenation, and that tensor."""
    if len(cat.users) != 1:
        return cat, None
    (user,) = cat.users
    others = [argument for argument in user.args if argument is not cat]
    if operator(user) != "aten.add" or user.kwargs or len(others) != 1:
        return cat, None
    if not is_stored(others[0]) or sizes(user) != sizes(cat):
        return cat, None
    assert isinstance(others[0], Node)
    return user, tensor(module, others[0])
