"""Fold the scale of attention's scores into the projection of the query.

    Given   q = x W_q^T + b_q,  scores = s * q k^T
    Result  q = x (s W_q)^T + s b_q,  scores = q k^T

wherever the scale stands: on q, on k, on both, or on their product. In a packed projection W_q are
the rows that the query reads; if something else reads them too, or the query is not a projection
(but, say, rotated), the key's projection takes the scale. An affine LayerNorm or RMSNorm on the
query takes it as a projection does.

Source: Vaswani et al., "Attention is all you need", arXiv:1706.03762, equation 1 (the scale); the
product is linear in q.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.attention import Attention, find_attentions, single_factor, trace_back
from export.graph import arguments, bypass, is_stored, operator, store, tensor
from export.layers import scale_outputs
from export.rearrange import places_along, sizes, spread
from export.report import Change, PassReport

__all__ = ["fold_attention_scale"]

_NORMS = {"aten.layer_norm", "aten.rms_norm"}


def fold_attention_scale(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold the scales of a traced module's attentions, in place."""
    changed, skipped = [], {}
    for attention in find_attentions(module.graph):
        query, key, _ = attention.operands
        scaled = [
            *_down_to_last_factor(module, _own_way(module, query, attention.scores)),
            *_down_to_last_factor(module, _own_way(module, key, attention.scores)),
        ]
        behind = _factors_behind(module, attention)
        if not scaled and not behind:
            continue
        reasons = []
        for way in (trace_back(module, query), trace_back(module, key)):
            reason = _why_not(way, attention.scores)
            if reason is None:
                changed.append(_fold(module, attention, way, scaled=scaled, behind=behind))
                break
            reasons.append(reason)
        else:
            skipped[attention.site] = f"the query: {reasons[0]}; the key: {reasons[1]}"
    return module, PassReport(tuple(changed), skipped)


def _own_way(module: GraphModule, operand: Node, scores: Node) -> list[Node]:
    """Return an operand and what it was before, as long as nothing else reads it."""
    way, user = [], scores
    for node in trace_back(module, operand):
        if set(node.users) != {user}:
            break
        way.append(node)
        user = node
    return way


def _down_to_last_factor(module: GraphModule, way: list[Node]) -> list[Node]:
    """Return an operand's way as far back as something is scaled."""
    factors = [i for i, node in enumerate(way) if single_factor(module, node)]
    return way[: factors[-1] + 1] if factors else []


def _factors_behind(module: GraphModule, attention: Attention) -> list[Node]:
    """Return the factors that directly follow the scores."""
    found: list[Node] = []
    node = attention.scores
    if operator(node) == "aten.baddbmm":
        return found
    while len(node.users) == 1:
        (node,) = node.users
        if single_factor(module, node) is None:
            break
        found.append(node)
    return found


def _why_not(way: list[Node], scores: Node) -> str | None:
    """Say why what an operand is made of cannot be scaled, or None."""
    source = way[-1]
    if operator(source) in _NORMS:
        if len(arguments(source)["normalized_shape"]) > 1 or arguments(source)["weight"] is None:
            return f"{source.name} has no weight for each feature"
    elif operator(source) != "aten.linear":
        return f"it comes from {operator(source) or 'the input'}, not from a linear layer"
    for name in ("weight", "bias"):
        given = arguments(source).get(name)
        if given is not None and not is_stored(given):
            return f"the {name} of {source.name} is computed in the graph"
    on_the_way = {*itertools.pairwise(way[::-1]), (way[0], scores)}
    places = spread(source)
    for node in _readers(way, places):
        for user in node.users:
            if (node, user) not in on_the_way and user not in places and not _asks_size(user):
                return f"{user.name} reads it, too"
    return None


def _readers(way: list[Node], places: dict[Node, Any]) -> list[Node]:
    """Return the nodes that hold any of the features that an operand holds."""
    rows = _rows(way)
    features = sizes(way[-1])[-1]
    found = [
        node
        for node, read in places.items()
        if not isinstance(read, Tensor) or bool(torch.isin(read.remainder(features), rows).any())
    ]
    return [*found, *(node for node in way if node not in places)]


def _rows(way: list[Node]) -> Tensor:
    """Return the features of its source that an operand holds."""
    return places_along(way).remainder(sizes(way[-1])[-1]).unique()


def _asks_size(user: Node) -> bool:
    return operator(user) == "aten.sym_size"


def _fold(
    module: GraphModule,
    attention: Attention,
    way: list[Node],
    *,
    scaled: list[Node],
    behind: list[Node],
) -> Change:
    """Scale the features that an operand holds, and remove the factors."""
    source, scores = way[-1], attention.scores
    factor, factors = 1.0, []
    for node in (*scaled, *behind):
        found = single_factor(module, node)
        if found is not None:
            factor *= found[1]
            factors.append(node)
    scale = torch.ones(sizes(source)[-1], dtype=torch.float64)
    scale[_rows(way)] = factor
    if operator(source) in _NORMS:
        _scale_norm(module, source, scale)
    else:
        scale_outputs(module, source, scale, torch.zeros(1))
    result = behind[-1] if behind else scores  # its value is the scores' from now on
    moved = {*_readers(way, spread(source)), *scaled, *behind} - {scores, result}
    names = tuple(sorted(node.name for node in moved))
    for node in factors:
        bypass(node)
    into = str(arguments(source)["weight"].target).rpartition(".")[0] or source.name
    what = f"scale {factor:.6g} folded into {into}"
    return Change(attention.site, what, result.name, scores.name, names)


def _scale_norm(module: GraphModule, norm: Node, scale: Tensor) -> None:
    """Scale the affine part of a norm."""
    given = arguments(norm)
    for name in ("weight", "bias"):
        source = given.get(name)
        if source is not None:
            numbers = tensor(module, source)
            scaled = numbers * scale.to(numbers.dtype)
            new = store(module, str(source.target), scaled, before=norm, instead_of=source)
            norm.replace_input_with(source, new)
