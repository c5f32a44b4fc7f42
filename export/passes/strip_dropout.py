"""Remove dropout of every kind: of values, of channels, of blocks, of whole paths.

    Given   y = dropout(x, p)                in evaluation mode, where dropout(x, p) = x
    Result  y = x

    Given   y = x * n,   n = bernoulli(p) / p              stochastic depth, stuck in training mode
    Result  y = x

Source: Srivastava et al., "Dropout", JMLR 15 (2014), section 10: nothing is dropped at test time;
torch scales while training ("inverted dropout"), so that nothing is left to scale here. Huang et
al., "Deep Networks with Stochastic Depth", arXiv:1603.09382, section 3, and Ghiasi et al.,
"DropBlock", arXiv:1810.12890, algorithm 1: likewise.

A functional dropout whose training flag is stuck at True (`F.dropout(x)`) drops values even in
evaluation mode, so that the model answers at random. It is removed as well, and named: its
reference is the model with that dropout at rest. For a noise made of Bernoulli draws, rest is where
every draw is its mean (export/traced/float64.py), and the noise must be 1 there: one that is not
scaled means something else and stays.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from export.passes.proof import PROOF_LIMIT
from export.traced.aliases import is_in_place, memory
from export.traced.float64 import attention_at_rest, mathematics
from export.traced.graph import (
    arguments,
    bypass,
    concrete,
    insert,
    is_stored,
    module_path,
    mutated,
    operator,
    replace,
    shape,
    tensor,
)
from export.traced.randomness import is_random
from export.traced.report import Change, PassReport
from export.traced.sites import is_dropout, site_names

__all__ = ["strip_dropout"]

_BLANKS = ("aten.empty", "aten.new_empty", "aten.zeros", "aten.new_zeros", "aten.ones", "aten.full")
_DRAWS = {"aten.bernoulli", "aten.bernoulli_"}
_CHECKS = {"aten._assert_tensor_metadata"}
_PRODUCTS = {"aten.mul", "aten.mul_"}
# What stochastic depth and DropBlock do to their draws.
_NOISE = _PRODUCTS | {
    "aten.add",
    "aten.alias",
    "aten.clone",
    "aten.constant_pad_nd",
    "aten.detach",
    "aten.div",
    "aten.div_",
    "aten.expand",
    "aten.expand_as",
    "aten.max_pool2d",
    "aten.max_pool3d",
    "aten.mean",
    "aten.neg",
    "aten.pad",
    "aten.reciprocal",
    "aten.reshape",
    "aten.rsub",
    "aten.slice",
    "aten.sub",
    "aten.sum",
    "aten.to",
    "aten.type_as",
    "aten.unsqueeze",
    "aten.view",
}
# DropBlock divides by its mask's sum + 1e-6, which over a small map is not quite 1.
_ONE = PROOF_LIMIT / 20


def strip_dropout(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Strip a traced module's dropouts, in place."""
    changed, skipped = [], {}
    names = site_names(module)
    for node in list(names):
        if not is_dropout(node):
            continue
        if operator(node) == "aten.scaled_dot_product_attention":
            node.args, node.kwargs = attention_at_rest(node.args, node.kwargs)
            changed.append(_change(names[node], node, node, live=True))
        elif operator(node) == "aten.native_dropout":
            skipped[names[node]] = "its mask is an output as well"
        else:
            live = bool(arguments(node)["train"])
            changed.append(_change(names[node], node, bypass(node), live=live))
    noise = _find_noise(module)
    products = _products(module, noise)
    means = _means(module, noise, products)
    for product in products:
        site = f"{module_path(product.last)}.{product.last.name}".lstrip(".")
        reason = _why_not_one(product, means)
        if reason:
            skipped[site] = reason
        else:
            changed.append(_rest(module, product, site))
    _erase_unread(module, noise)
    return module, PassReport(tuple(changed), skipped)


def _change(site: str, before: Node, after: Node, *, live: bool, moved: Any = ()) -> Change:
    what = "stripped; it was live in evaluation mode" if live else "stripped"
    return Change(site, what, before.name, after.name, tuple(node.name for node in moved))


@dataclass
class _Product:
    """A value times one noise or more, one after the other.

    Args:
        value: What is scaled.
        nodes: The products, in their order.
        factors: The noise that each multiplies with.
    """

    value: Node
    nodes: list[Node] = field(default_factory=list)
    factors: list[Node] = field(default_factory=list)

    @property
    def last(self) -> Node:
        """The product of all."""
        return self.nodes[-1]


def _find_noise(module: GraphModule) -> list[Node]:
    """Return the nodes made of Bernoulli draws and numbers alone, in their order."""
    noise: dict[Node, None] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if operator(node) in _DRAWS:
            (drawn,) = node.args[:1]
            if operator(drawn).startswith(_BLANKS) and all(
                is_stored(argument) for argument in node.all_input_nodes[1:]
            ):
                noise[node] = None
        elif operator(node) in _NOISE:
            read = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
            if read and all(argument in noise for argument in read):
                noise[node] = None
    return list(noise)


def _products(module: GraphModule, noise: Iterable[Node]) -> list[_Product]:
    """Return the values that are scaled by noise; x * a * b is one."""
    known, chains = set(noise), dict[Node, _Product]()
    for node in module.graph.nodes:
        if operator(node) not in _PRODUCTS or node in known:
            continue
        given = arguments(node)
        value, factor = given["self"], given["other"]
        if value in known and operator(node) == "aten.mul":
            value, factor = factor, value
        if factor not in known or not isinstance(value, Node) or shape(value) != shape(node):
            continue
        chain = _Product(value)
        if value in chains and len(value.users) == 1:
            chain = chains.pop(value)
        chain.nodes.append(node)
        chain.factors.append(factor)
        chains[node] = chain
    return list(chains.values())


def _means(module: GraphModule, noise: list[Node], products: list[_Product]) -> dict[Node, Tensor]:
    """Return, by product, what it multiplies with where every draw is its mean.

    Of the traced batch size, and as the product finds it: noise is scaled in place.
    """
    factors = {node: f for p in products for node, f in zip(p.nodes, p.factors, strict=True)}
    known, values, means = set(noise), dict[Node, Any](), dict[Node, Tensor]()

    def value(node: Node) -> Any:
        if node not in values:
            values[node] = _number(module, node, value)
        return values[node]

    with mathematics():
        for node in module.graph.nodes if factors else ():
            if node in known:
                args, kwargs = map_arg((node.args, node.kwargs), value)
                values[node] = node.target(*args, **kwargs)
            elif node in factors:
                means[node] = values[factors[node]].clone()
    return means


def _number(module: GraphModule, node: Node, value: Callable[[Node], Any]) -> Any:
    """Return a size, a stored tensor, or what a draw overwrites or takes its means from."""
    if not isinstance(node.meta["val"], Tensor):
        return concrete(node)
    if is_stored(node):
        return tensor(module, node)
    if operator(node) in {"aten.full", "aten.zeros", "aten.ones"}:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return torch.zeros(shape(node))


def _why_not_one(product: _Product, means: dict[Node, Tensor]) -> str | None:
    """Say why a noise has not the mean 1, or None."""
    if not all(factor.meta["val"].is_floating_point() for factor in product.factors):
        return "it multiplies with a random mask that is not scaled"
    scale = torch.ones((), dtype=torch.float64)
    for node in product.nodes:
        scale = scale * means[node]
    error = float((scale - 1).abs().max())
    return None if error <= _ONE else f"its noise has another mean than 1, by {error:.2g}"


def _rest(module: GraphModule, product: _Product, site: str) -> Change:
    """Let a product's readers read the value: a copy where another operator works in place."""
    first, last, value = product.nodes[0], product.last, product.value
    numbers = memory(module)
    own = {node for node in product.nodes if operator(node) == "aten.mul_"}
    changes = {numbers[x] for node in numbers if node not in own for x in mutated(node)}
    needs_copy = first not in own and changes & {numbers[value], numbers[last]}
    rest = insert(torch.ops.aten.clone.default, value, before=first) if needs_copy else value
    for node in reversed(product.nodes):
        replace(node, rest)
    return _change(site, last, rest, live=True, moved=product.nodes[:-1])


def _erase_unread(module: GraphModule, noise: list[Node]) -> None:
    """Erase the noise that nothing reads any more, and draws that nothing ever did.

    An operator that works in place counts as alive otherwise.
    """
    checks = (x for node in noise for x in node.users if operator(x) in _CHECKS)
    rest = {*noise, *checks, *(blank for node in noise for blank in _blank(node))}
    while rest:
        todo, part = [rest.pop()], set[Node]()
        while todo:
            node = todo.pop()
            part.add(node)
            related = {*node.all_input_nodes, *node.users} & rest
            rest -= related
            todo += related
        if all(user in part for node in part for user in node.users):
            for node in reversed(list(module.graph.nodes)):
                if node in part:
                    module.graph.erase_node(node)
    for node in reversed(list(module.graph.nodes)):
        if is_random(node) and not node.users and not is_in_place(node):
            module.graph.erase_node(node)


def _blank(draw: Node) -> Iterator[Node]:
    """Yield the tensor that a draw fills, which nothing else made."""
    if operator(draw) in _DRAWS:
        yield from draw.all_input_nodes[:1]
