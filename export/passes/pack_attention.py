"""Pack the projections of query, key and value into one, and split its result in one step.

    Given   q, k, v = x W_q^T + b_q, x W_k^T + b_k, x W_v^T + b_v
    Result  p = x [W_q; W_k; W_v]^T + [b_q; b_k; b_v]     one product with x
            p (B, T, 3 H d), reshaped (B, T, 3 H, d), permuted (B, 3 H, T, d), split (B, H, T, d)

    Given   a projection that is packed already, in whatever order, and taken apart by selections
    Result  the same, with its rows in the order of the split, and without those that nothing reads

An ONNX file then holds one Split, and no Gather, Slice or Squeeze. Where query and key come from
different inputs (cross-attention, class attention), those of one input are packed: key and value.

Source: the rows of a linear layer are independent of one another.
"""

import operator as python
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.attention import Attention, find_attentions, name_sites, trace_back
from export.passes.projections import (
    Layout,
    ObstacleError,
    Part,
    Projection,
    layout_of,
    moved_input,
    take_apart,
)
from export.traced.graph import arguments, insert, operator, tensor
from export.traced.rearrange import sizes, spread, store_sized
from export.traced.report import Change, PassReport

__all__ = ["pack_attention"]

_aten = torch.ops.aten
_PICKS = {"aten.select", "aten.slice", "aten.narrow", "aten.unbind"}


def pack_attention(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Pack the projections of a traced module's attentions, in place."""
    changed, skipped = [], {}
    for site, layers in _groups(module):
        reasons = []
        for stops in (False, True):
            try:
                change = _pack(module, site, [take_apart(n, stops=stops) for n in layers])
            except ObstacleError as reason:
                reasons.append(str(reason))
                continue
            changed += [change] if change is not None else []
            break
        else:
            skipped[site] = reasons[0]
    return module, PassReport(tuple(changed), skipped)


def _groups(module: GraphModule) -> list[tuple[str, list[Node]]]:
    """Return, by site, the linear layers that one attention feeds with the same input.

    A layer whose result is taken apart by selections makes a group of its own, whatever follows:
    it is most likely a packed projection, of an attention that is not written plainly.
    """
    groups: list[tuple[str, list[Node]]] = []
    grouped: set[Node] = set()
    for attention in find_attentions(module.graph):
        layers = _projections_of(module, attention)
        inputs = {layer: moved_input(layer)[0] for layer in layers}
        for source in dict.fromkeys(inputs.values()):
            same = [layer for layer in layers if inputs[layer] is source]
            if not grouped.intersection(same):
                groups.append((attention.site, same))
                grouped.update(same)
    rest = [n for n in module.graph.nodes if n not in grouped and operator(n) == "aten.linear"]
    packed = [layer for layer in rest if _is_taken_apart(layer)]
    names = name_sites(packed)
    return [*groups, *((names[layer], [layer]) for layer in packed)]


def _is_taken_apart(layer: Node) -> bool:
    """Say whether several selections are made of a layer's result."""
    picks = [operator(node) for node in spread(layer) if operator(node) in _PICKS]
    return len(picks) > 1 or "aten.unbind" in picks


def _projections_of(module: GraphModule, attention: Attention) -> list[Node]:
    """Return the linear layers that an attention's query, key and value come from."""
    found = []
    for operand in attention.operands:
        source = trace_back(module, operand)[-1]
        while operator(source) in {"aten.layer_norm", "aten.rms_norm"}:  # of queries and keys
            source = trace_back(module, source.all_input_nodes[0])[-1]
        if operator(source) == "aten.linear" and source not in found:
            found.append(source)
    return found


def _pack(module: GraphModule, site: str, projections: Sequence[Projection]) -> Change | None:
    """Replace projections by one; None where nothing is gained.

    Raises:
        ObstacleError: Their results do not fit into one split.
    """
    parts = [part for projection in projections for part in projection.parts]
    blocks = _blocks(projections)
    movements = [node for projection in projections for node in projection.movements]
    has_picks = any(operator(node) in _PICKS for node in movements)
    cost = 2 * len(projections) + sum(not _is_free(node) for node in movements)
    packed_cost = 2 + 3 + sum(_count_behind(part) for part in parts)
    gains = has_picks or _has_unread(projections, blocks)
    if len(blocks) < 2 or packed_cost > cost or (packed_cost == cost and not gains):
        return None
    try:
        if any(part.rows.shape[1] != parts[0].rows.shape[1] for part in parts):
            raise ObstacleError("its heads are of different widths")
        layout = layout_of(projections)
    except ObstacleError:
        if has_picks or len(projections) > 1:
            raise
        return None  # it is one Split already
    return _rewrite(module, site, projections, blocks, layout)


def _blocks(projections: Sequence[Projection]) -> list[tuple[Node, Tensor]]:
    """Return the different sets of rows that are read, each with its layer.

    Raises:
        ObstacleError: Two parts share some rows, but not all.
    """
    found: list[tuple[Node, Tensor]] = []
    for projection in projections:
        for part in projection.parts:
            if _block_of(part, projection.layer, found) is not None:
                continue
            for layer, rows in found:
                if layer is projection.layer and torch.isin(rows, part.rows).any():
                    raise ObstacleError("two of its query, key and value share features")
            found.append((projection.layer, part.rows))
    layers = [projection.layer for projection in projections]
    return sorted(found, key=lambda block: (layers.index(block[0]), int(block[1].min())))


def _has_unread(projections: Sequence[Projection], blocks: Sequence[tuple[Node, Tensor]]) -> bool:
    """Say whether some features of a projection are in no block: nothing reads them."""
    read = sum(rows.numel() for _, rows in blocks)
    return read < sum(sizes(projection.layer)[-1] for projection in projections)


def _block_of(part: Part, layer: Node, blocks: Sequence[tuple[Node, Tensor]]) -> int | None:
    for number, (other, rows) in enumerate(blocks):
        if other is layer and torch.equal(rows, part.rows):
            return number
    return None


def _is_free(node: Node) -> bool:
    """Say whether a movement needs no operator in the ONNX file: Split takes its results itself."""
    if operator(node):
        return operator(node) in {"aten.contiguous", "aten.clone", "aten.alias"}
    source = node.args[0]
    return isinstance(source, Node) and operator(source) != "aten.unbind"


def _count_behind(part: Part) -> int:
    """Return how many operators a part takes behind the split."""
    return int(part.is_turned) + int(len(sizes(part.node)) == 3)


def _rewrite(
    module: GraphModule,
    site: str,
    projections: Sequence[Projection],
    blocks: Sequence[tuple[Node, Tensor]],
    layout: Layout,
) -> Change:
    """Insert the packed projection and its split, and remove the old ones."""
    layers = [projection.layer for projection in projections]
    names = ", ".join(_name(layer) for layer in layers)
    what = f"{names} packed" if len(layers) > 1 else "split in one step"
    first = next(node for node in module.graph.nodes if node in layers)
    packed = _insert_layer(module, layout.source, layers, blocks, before=first)
    heads = [len(rows) for _, rows in blocks]
    shape, order = [-1, layout.length], [0, 2, 1, 3]
    if not layout.is_batch_first:
        shape, order = [layout.length, -1], [1, 2, 0, 3]
    shape += [sum(heads), blocks[0][1].shape[1]]
    value = insert(_aten.reshape.default, packed, shape, before=first)
    value = insert(_aten.permute.default, value, order, before=first)
    value = insert(_aten.split_with_sizes.default, value, heads, 1, before=first)
    results = [insert(python.getitem, value, number, before=first) for number in range(len(heads))]

    erased = [
        node for projection in projections for node in (projection.layer, *projection.movements)
    ]
    promises: dict[int, tuple[str, str]] = {}
    for projection in projections:
        for part in projection.parts:
            number = _block_of(part, projection.layer, blocks)
            assert number is not None
            new = _reshaped(results[number], part, first)
            promises[number] = part.node.name, new.name
            part.node.replace_all_uses_with(new)
    before, after = promises[max(promises)]  # the value, most likely: a scale moves the query
    moved = tuple(node.name for node in erased if node.name != before)
    for node in reversed(list(module.graph.nodes)):
        if node in erased and not node.users:
            module.graph.erase_node(node)
    return Change(site, what, before, after, moved)


def _insert_layer(
    module: GraphModule,
    source: Node,
    layers: Sequence[Node],
    blocks: Sequence[tuple[Node, Tensor]],
    *,
    before: Node,
) -> Node:
    """Insert a linear layer of the blocks' rows."""
    calls = {layer: arguments(layer) for layer in layers}
    rows = [(calls[layer], block.flatten()) for layer, block in blocks]
    weight = torch.cat([tensor(module, call["weight"])[block] for call, block in rows])
    biases = [
        weight.new_zeros(len(block))
        if call["bias"] is None
        else tensor(module, call["bias"])[block]
        for call, block in rows
    ]
    has_bias = any(call["bias"] is not None for call in calls.values())
    prefixes = [str(calls[layer]["weight"].target).rpartition(".")[0] for layer in layers]
    owner = prefixes[0].rpartition(".")[0]
    name = "_".join(prefix.rpartition(".")[2] for prefix in prefixes)
    packed = f"{owner}.{name}".strip(".")
    only = calls[before] if len(layers) == 1 else {}
    new = [
        store_sized(
            module, f"{packed}.weight", weight, before=before, instead_of=only.get("weight")
        )
    ]
    if has_bias:
        bias = torch.cat(biases)
        new.append(
            store_sized(module, f"{packed}.bias", bias, before=before, instead_of=only.get("bias"))
        )
    return insert(_aten.linear.default, source, *new, before=before)


def _reshaped(value: Node, part: Part, before: Node) -> Node:
    """Give a result of the split, (B, H, T, d), the shape of the part that it replaces."""
    if part.is_turned:
        value = insert(_aten.transpose.int, value, -2, -1, before=before)
    if len(sizes(part.node)) == 3:
        shape = [-1, *sizes(part.node)[1:]]
        value = insert(_aten.reshape.default, value, shape, before=before)
    return value


def _name(layer: Node) -> str:
    return str(arguments(layer)["weight"].target).rpartition(".")[0] or layer.name
