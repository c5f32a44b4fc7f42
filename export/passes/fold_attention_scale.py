"""Fold the scale of attention's scores into the projection of the query.

    Given   q = x W_q^T + b_q,  scores = s * q k^T
    Result  q = x (s W_q)^T + s b_q,  scores = q k^T

wherever the scale stands: on q, on k, on both, or on their product; other products of a linear
layer's result are treated alike. In a packed projection W_q are
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

from export.passes.attention import find_attentions, name_sites, single_factor, trace_back
from export.traced.graph import arguments, bypass, is_stored, operator, store, tensor
from export.traced.layers import scale_outputs
from export.traced.rearrange import features_read, sizes, spread
from export.traced.report import Change, PassReport

__all__ = ["fold_attention_scale"]

_NORMS = {"aten.layer_norm", "aten.rms_norm"}


def fold_attention_scale(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Fold the scales of a traced module's attentions, and of other such products, in place."""
    changed, skipped = [], {}
    attentions = {attention.scores: attention.site for attention in find_attentions(module.graph)}
    products = [n for n in module.graph.nodes if operator(n) in {"aten.matmul", "aten.bmm"}]
    products += [scores for scores in attentions if scores not in products]
    for product, name in name_sites(products).items():
        site = attentions.get(product, name)
        ways = [trace_back(module, operand) for operand in product.args[-2:]]  # type: ignore[arg-type]
        scaled = [node for way in ways for node in _scaled(module, way, product)]
        behind = _factors_behind(module, product)
        if not scaled and not behind:
            continue
        reasons = [_why_not(way, product) for way in ways]
        if None in reasons:
            way = ways[reasons.index(None)]
            changed.append(_fold(module, site, product, way, scaled=scaled, behind=behind))
        elif product in attentions:
            skipped[site] = f"the query: {reasons[0]}; the key: {reasons[1]}"
    return module, PassReport(tuple(changed), skipped)


def _scaled(module: GraphModule, way: list[Node], product: Node) -> list[Node]:
    """Return an operand and what it was before, as far back as it is scaled for this product only.

    The last node, if there is any, is a factor.
    """
    own, user = [], product
    for node in way:
        if set(node.users) != {user}:
            break
        own.append(node)
        user = node
    factors = [place for place, node in enumerate(own) if single_factor(module, node)]
    return own[: factors[-1] + 1] if factors else []


def _factors_behind(module: GraphModule, product: Node) -> list[Node]:
    """Return the factors that directly follow a product."""
    found: list[Node] = []
    node = product
    while operator(product) != "aten.baddbmm" and len(node.users) == 1:
        (node,) = node.users
        if single_factor(module, node) is None:
            break
        found.append(node)
    return found


def _why_not(way: list[Node], product: Node) -> str | None:
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
    on_the_way = {*itertools.pairwise(way[::-1]), (way[0], product)}
    places = spread(source)
    for node in _readers(way, places):
        for user in node.users:
            if (node, user) not in on_the_way and user not in places and not _asks_size(user):
                return f"{user.name} reads it, too"
    return None


def _readers(way: list[Node], places: dict[Node, Any]) -> list[Node]:
    """Return the nodes that hold any of the features that an operand holds."""
    features = sizes(way[-1])[-1]
    is_held = torch.zeros(features, dtype=torch.bool)
    is_held[features_read(way)] = True
    found = [
        node
        for node, read in places.items()
        if not isinstance(read, Tensor) or bool(is_held[read % features].any())
    ]
    return [*found, *(node for node in way if node not in places)]


def _asks_size(user: Node) -> bool:
    return operator(user) == "aten.sym_size"


def _fold(
    module: GraphModule,
    site: str,
    product: Node,
    way: list[Node],
    *,
    scaled: list[Node],
    behind: list[Node],
) -> Change:
    """Scale the features that an operand holds, and remove the factors."""
    source = way[-1]
    factor, factors = 1.0, []
    for node in (*scaled, *behind):
        found = single_factor(module, node)
        if found is not None:
            factor *= found[1]
            factors.append(node)
    scale = torch.ones(sizes(source)[-1], dtype=torch.float64)
    scale[features_read(way)] = factor
    if operator(source) in _NORMS:
        _scale_norm(module, source, scale)
    else:
        scale_outputs(module, source, scale, torch.zeros(1))
    result = behind[-1] if behind else product  # its value is the product's from now on
    moved = {*_readers(way, spread(source)), *scaled, *behind} - {product, result}
    names = tuple(sorted(node.name for node in moved))
    for node in factors:
        bypass(node)
    into = str(arguments(source)["weight"].target).rpartition(".")[0] or source.name
    what = f"scale {factor:.6g} folded into {into}"
    return Change(site, what, result.name, product.name, names)


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
