"""See how a selection of rows crosses one operator: what it then reads of its arguments.

    f(x)[rows] = f(x[rows])        f number by number, a norm or softmax along another dimension,
                                   a linear layer of the last one
    (a b)[rows] = a[rows] b        rows of a matrix product
    moved(x)[rows] = moved(x[rows'])

A row is what a value holds at one index of one dimension: a token's vector, or its row of an
attention's scores. Where a packed projection also makes what is needed of all tokens, the features
of the rows get a layer of their own:

    (x W^T + b)[rows, features] = x[rows] W[features]^T + b[features]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from export.passes.projections import as_heads
from export.traced.channels import backwards
from export.traced.graph import arguments, insert, is_stored, mutated, operator, shape, tensor
from export.traced.rearrange import is_movement, places_along, sizes, store_sized

__all__ = ["COSTLY", "SPLITS", "Rows", "Step", "own_projection", "selected", "step"]

_aten = torch.ops.aten
_PRODUCTS = {"aten.matmul", "aten.bmm"}
_NORMS = {"aten.layer_norm", "aten.rms_norm"}
_SOFTMAXES = {"aten.softmax", "aten.log_softmax"}
SPLITS = {"aten.split", "aten.split_with_sizes", "aten.chunk"}
_RESHAPES = {
    *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"),
    *("aten.squeeze", "aten.unsqueeze"),
}
_MOVEMENTS = {
    *("aten.permute", "aten.transpose", "aten.t", "aten.mT", "aten.swapaxes", "aten.movedim"),
    *("aten.select", "aten.slice", "aten.narrow"),
}
_POINTWISE = {"aten.hardswish", "aten.masked_fill", "aten.contiguous"}  # that torch has no tag for
COSTLY = {"aten.linear", *_PRODUCTS, *_NORMS, *_SOFTMAXES}
"""What is worth an operator or two to have it compute fewer rows."""

_BATCH = 1_000_003  # of the bookkeeping: a prime that is a factor of no other size


@dataclass(frozen=True)
class Rows:
    """Some indices of a dimension, which is as long for every batch size.

    Args:
        dim: The dimension, 0 or more.
        kept: The indices, each once, in their order.
    """

    dim: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """An operator that computes some rows of its result only.

    Args:
        rows: Of its result.
        reads: The values that it reads rows of, and which.
        build: Makes the operator's node, from the rows of those values and the node before which
            it is to stand.
    """

    rows: Rows
    reads: tuple[tuple[Node, Rows], ...]
    build: Callable[[Sequence[Node], Node], Node]


def selected(node: Node) -> Rows | None:
    """Return which rows of its argument a selection takes; None if a node is none."""
    if operator(node) not in {"aten.select", "aten.slice", "aten.narrow"}:
        return None
    given = arguments(node)
    source = given.pop("self")
    dim = given.pop("dim") % len(shape(source))
    length = source.meta["val"].shape[dim]
    numbers = [length, *(number for number in given.values() if number is not None)]
    if not all(isinstance(number, int) for number in numbers):
        return None
    every = range(length)
    if operator(node) == "aten.select":
        return Rows(dim, (every[given["index"]],))
    if operator(node) == "aten.slice":
        return Rows(dim, tuple(every[given["start"] : given["end"] : given["step"]]))
    start = given["start"] % length
    return Rows(dim, tuple(every[start : start + given["length"]]))


def step(node: Node, rows: Rows) -> Step | None:
    """Return how an operator computes some rows of its result; None where it needs all to do so."""
    name, dim = operator(node), rows.dim
    if node.op != "call_function" or any(mutated(node)):
        return None
    if not name:
        return _like(node, rows, {0: dim}) if _is_part(node) else None
    ndim = len(shape(node)) if name not in SPLITS else len(shape(node.all_input_nodes[0]))
    if name == "aten.linear":
        return _like(node, rows, {0: dim}) if dim < ndim - 1 else None
    if name in _PRODUCTS:
        ranks = [len(shape(side)) for side in node.all_input_nodes]
        return _like(node, rows, {0: ranks[0] - 2}) if dim == ndim - 2 and min(ranks) > 1 else None
    if name in _NORMS:
        normalized = len(arguments(node)["normalized_shape"])
        return _like(node, rows, {0: dim}) if dim < ndim - normalized else None
    if name in _SOFTMAXES or name in SPLITS:
        return _like(node, rows, {0: dim}) if arguments(node)["dim"] % ndim != dim else None
    if name in _RESHAPES or name in _MOVEMENTS:
        return _moved(node, rows)
    if name in _POINTWISE or torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        return _pointwise(node, rows)
    return None


def own_projection(module: GraphModule, part: Node, rows: Rows) -> Step | None:
    """Return how a part of a packed projection is made of rows of the projection's input.

    Args:
        module: The traced module.
        part: One result of the split of a packed projection, (B, H, T, d).
        rows: Of its dimension 2, tokens.
    """
    way = [part]
    while is_movement(way[-1]):
        way += way[-1].all_input_nodes[:1]
    layer = way[-1]
    if operator(layer) != "aten.linear" or any(len(node.users) > 1 for node in way[2:]):
        return None
    weight, bias = (arguments(layer)[name] for name in ("weight", "bias"))
    heads = as_heads(layer, part, places_along(way))
    if heads is None or heads.is_turned or rows.dim != 2 or len(shape(part)) != 4:
        return None
    if not is_stored(weight) or not (bias is None or is_stored(bias)):
        return None
    source = layer.all_input_nodes[0]
    natural = torch.arange(heads.tokens.numel())
    is_batch_first = torch.equal(heads.tokens, natural.view(heads.tokens.shape))
    if not is_batch_first and not torch.equal(heads.tokens, natural.view(heads.tokens.T.shape).T):
        return None
    if sizes(source)[:-1] != [*(heads.tokens if is_batch_first else heads.tokens.T).shape]:
        return None
    features = heads.rows.flatten()

    def build(read: Sequence[Node], before: Node) -> Node:
        stored: list[Node | None] = [None, None]
        for number, old in enumerate((weight, bias)):
            if old is not None:
                owner, _, leaf = str(old.target).rpartition(".")
                name = f"{owner}_selected.{leaf}"
                picked = tensor(module, old)[features]
                stored[number] = store_sized(module, name, picked, before=before)
        value = insert(_aten.linear.default, read[0], *stored, before=before)
        places = [-1, len(rows.kept)] if is_batch_first else [len(rows.kept), -1]
        value = insert(_aten.reshape.default, value, [*places, *heads.rows.shape], before=before)
        order = [0, 2, 1, 3] if is_batch_first else [1, 2, 0, 3]
        return insert(_aten.permute.default, value, order, before=before)

    return Step(rows, ((source, Rows(1 if is_batch_first else 0, rows.kept)),), build)


def _like(node: Node, rows: Rows, dims: dict[int, int]) -> Step:
    """Return the same operator for rows of some of its arguments.

    Args:
        node: The operator.
        rows: Of its result.
        dims: Of each argument, by its number, that has these rows, their dimension.
    """

    def build(read: Sequence[Node], before: Node) -> Node:
        args = list(node.args)
        for number, value in zip(dims, read, strict=True):
            args[number] = value
        return insert(node.target, *args, before=before, scope=node, **node.kwargs)  # type: ignore[arg-type]

    reads = [(node.args[number], Rows(dim, rows.kept)) for number, dim in dims.items()]
    return Step(rows, tuple(reads), build)  # type: ignore[arg-type]


def _is_part(node: Node) -> bool:
    return is_movement(node) and operator(node.args[0]) in SPLITS


def _pointwise(node: Node, rows: Rows) -> Step | None:
    """Every argument that is as long has the same rows; what is repeated along them has none."""
    if any(isinstance(argument, Node) for argument in node.kwargs.values()):
        return None
    ndim, length = len(shape(node)), shape(node)[rows.dim]
    dims = {}
    for number, argument in enumerate(node.args):
        if not isinstance(argument, Node) or not isinstance(argument.meta["val"], torch.Tensor):
            continue
        dim = rows.dim - ndim + len(shape(argument))
        if dim >= 0 and shape(argument)[dim] == length:
            dims[number] = dim
    return _like(node, rows, dims)


def _moved(node: Node, rows: Rows) -> Step | None:
    """Follow the dimension back to where it was, as long as it is, and in the same order."""
    found = backwards([node], rows.dim)
    if found is None:
        return None
    dim, places = found
    source = node.all_input_nodes[0]
    length = source.meta["val"].shape[dim]
    if not isinstance(length, int) or not torch.equal(places, torch.arange(length)):
        return None
    if operator(node) in _MOVEMENTS:
        return _like(node, rows, {0: dim})
    wanted = [size if size % _BATCH else -1 for size in sizes(node, _BATCH)]
    wanted[rows.dim] = len(rows.kept)
    if wanted.count(-1) > 1:
        return None

    def build(read: Sequence[Node], before: Node) -> Node:
        return insert(_aten.reshape.default, read[0], wanted, before=before, scope=node)

    return Step(rows, ((source, Rows(dim, rows.kept)),), build)
