"""Write attention as the four operators that it is.

    Given   z = scaled_dot_product_attention(q, k, v, mask, scale=s)
    Result  z = matmul(softmax(matmul(q * s, k^T) + mask), v)

    Given   (batch * heads, T, d) operands and bmm, as nn.MultiheadAttention has them
    Result  (batch, heads, T, d) operands and matmul

This is the pattern that TensorRT fuses, and the one that the passes after this one read: they fold
the scale into the query projection, and pack q, k and v.

torch answers 0 for a token that may attend to nothing, and softmax answers NaN: a mask that is
computed from the input might hold such a row, and stays with torch's operator.

Source: Vaswani et al., "Attention is all you need", arXiv:1706.03762, equation 1; torch's
documentation of scaled_dot_product_attention (mask, scale).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.attention import (
    Attention,
    find_attentions,
    name_sites,
    single_factor,
    trace_back,
)
from export.traced.graph import arguments, insert, is_stored, module_path, operator, replace, tensor
from export.traced.rearrange import features_read, sizes, store_sized
from export.traced.report import Change, PassReport

__all__ = ["plain_attention"]

_aten = torch.ops.aten


def plain_attention(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Write a traced module's attentions plainly, in place."""
    changed, skipped = [], {}
    fused = "aten.scaled_dot_product_attention"
    for node, site in name_sites([n for n in module.graph.nodes if operator(n) == fused]).items():
        reason = _why_not_plain(module, node)
        if reason:
            skipped[site] = reason
            continue
        context = _write_plainly(module, node)
        replace(node, context)
        changed.append(Change(site, "written as matmul and softmax", node.name, context.name))
    for attention in find_attentions(module.graph):
        if operator(attention.context) != "aten.bmm":
            continue
        heads = _count_merged_heads(module, attention)
        between = _between(module, attention)
        if heads is not None and between is not None:
            changed.append(_split_heads(attention, heads, between))
    return module, PassReport(tuple(changed), skipped)


def _why_not_plain(module: GraphModule, node: Node) -> str | None:
    """Say why an attention stays torch's own operator, or None."""
    given = arguments(node)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    if given["dropout_p"]:
        return "it drops out"
    if sizes(query)[:-2] != sizes(key)[:-2]:
        return "its queries and its keys have different numbers of heads"
    tokens = [value.meta["val"].shape[-2] for value in (query, key)]
    if given["is_causal"] and not all(isinstance(number, int) for number in tokens):
        return "its causal mask is as large as the batch"
    if mask is None:
        return None
    if not is_stored(mask):
        return "its mask is computed in the graph and might leave a token nothing to attend to"
    numbers = tensor(module, mask)
    allowed = numbers if numbers.dtype == torch.bool else numbers > -math.inf
    return None if allowed.any(-1).all() else "its mask leaves a token nothing to attend to"


def _write_plainly(module: GraphModule, node: Node) -> Node:
    """Insert the operators that an attention is made of, and return the last."""
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    scale = query.meta["val"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    if scale != 1:
        query = insert(_aten.mul.Tensor, query, scale, before=node)
    turned = insert(_aten.transpose.int, key, -2, -1, before=node)
    scores = insert(_aten.matmul.default, query, turned, before=node)
    mask = _mask(module, given)
    if mask is not None:
        if isinstance(mask, Tensor):
            mask = store_sized(module, f"{module_path(node)}.mask", mask, before=node)
        scores = insert(_aten.add.Tensor, scores, mask, before=node)
    weights = insert(_aten.softmax.int, scores, -1, before=node)
    return insert(_aten.matmul.default, weights, value, before=node)


def _mask(module: GraphModule, given: dict[str, Any]) -> Node | Tensor | None:
    """Return what is added to an attention's scores: minus infinity where a token must not look."""
    if given["is_causal"]:
        tokens = [value.meta["val"].shape[-2] for value in (given["query"], given["key"])]
        allowed = torch.ones(tokens, dtype=torch.bool).tril()
    elif given["attn_mask"] is None:
        return None
    else:
        allowed = tensor(module, given["attn_mask"])
        if allowed.dtype != torch.bool:
            mask: Node = given["attn_mask"]
            return mask
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)


def _count_merged_heads(module: GraphModule, attention: Attention) -> int | None:
    """Return the number of heads that count as part of the batch; None if there are none."""
    query, key, value = attention.operands
    if any(len(sizes(operand)) != 3 for operand in (query, key, value)):
        return None
    way = trace_back(module, query)
    width = sizes(query)[-1]
    read = len(features_read(way))
    heads, rest = divmod(read, width)
    return heads if heads > 1 and not rest and not sizes(query)[0] % heads else None


def _between(module: GraphModule, attention: Attention) -> list[Node] | None:
    """Return what stands between scores and softmax, if it does not care for the batch's shape."""
    if operator(attention.scores) == "aten.baddbmm":
        mask = attention.scores.args[0]
        if not isinstance(mask, Node) or not _is_for_all(mask):
            return None
    between: list[Node] = []
    node = attention.scores
    while node is not attention.weights:
        if len(node.users) != 1:
            return None
        (node,) = node.users
        is_mask = operator(node) == "aten.add" and not node.kwargs
        if is_mask:
            others = [n for n in node.all_input_nodes if n not in (attention.scores, *between)]
            is_mask = all(_is_for_all(other) for other in others)
        if node is not attention.weights:
            if not is_mask and single_factor(module, node) is None:
                return None
            between.append(node)
    return between


def _is_for_all(mask: Node) -> bool:
    """Say whether a mask is the same for the whole batch."""
    return len(sizes(mask)) < 3 or sizes(mask)[:-2] == [1]


def _split_heads(attention: Attention, heads: int, between: list[Node]) -> Change:
    """Take the heads out of the batch, and give the old nodes' users values of the old shape."""
    scores, weights, context = attention.scores, attention.weights, attention.context

    def split(value: Node, before: Node) -> Node:
        shape = [-1, heads, *sizes(value)[1:]]
        return insert(_aten.reshape.default, value, shape, before=before)

    def merge(value: Node, before: Node) -> Node:
        shape = [-1, *sizes(value)[2:]]
        return insert(_aten.reshape.default, value, shape, before=before)

    query, key, value = attention.operands
    plain = insert(_aten.matmul.default, split(query, scores), split(key, scores), before=scores)
    if operator(scores) == "aten.baddbmm":
        plain = insert(_aten.add.Tensor, plain, scores.args[0], before=scores)
    new = {scores: plain}
    for node in between:
        args = tuple(new.get(arg, arg) if isinstance(arg, Node) else arg for arg in node.args)
        new[node] = insert(node.target, *args, before=node)  # type: ignore[arg-type]
    shared = new[[scores, *between][-1]]
    plain = insert(weights.target, shared, -1, *weights.args[2:], before=weights)  # type: ignore[arg-type]
    if len(weights.users) > 1:
        merged = merge(plain, weights)
        weights.replace_all_uses_with(merged, delete_user_cb=lambda user: user is not context)
    result = insert(_aten.matmul.default, plain, split(value, context), before=context)
    merged = merge(result, context)
    replace(context, merged)
    moved = tuple(node.name for node in (scores, *between, weights))
    for node in (weights, *reversed(between), scores):
        node.graph.erase_node(node)
    what = "its heads taken out of the batch"
    return Change(attention.site, what, context.name, merged.name, moved)
