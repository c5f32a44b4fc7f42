"""Compute only the tokens that are read.

    Given   y = x + f(norm(x)),  z = head(norm(y)[:, 0])         f a perceptron
    Result  y = x[:, :1] + f(norm(x[:, :1])),  z = head(norm(y)[:, 0])

    Given   softmax(q k^T) v, of which only the rows of some tokens are read
    Result  softmax(q[rows] k^T) v      and these rows of q from these rows of its input

A classifier that reads the class token alone needs, of its last block, the keys and values of all
tokens and all else of that one. From what is selected the way leads back through whatever works row
by row (export/passes/rows.py), to where others read more. It is walked to its ends before anything
is changed. Nothing is computed twice, and nothing is changed where no product, norm or softmax gets
fewer rows: a selection between a convolution and its activation would only part what runtimes
compute as one. More than half of the rows are as good as all: what is selected is copied, too.

Source: Touvron et al., "Going deeper with image transformers", arXiv:2103.17239, section 3 (class
attention: there the query is the class token's by design).
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from export.passes.rows import COSTLY, SPLITS, Rows, Step, own_projection, selected, step
from export.traced.graph import insert, module_path, operator, replace
from export.traced.rearrange import store_sized
from export.traced.report import Change, PassReport

__all__ = ["skip_unread"]

_aten = torch.ops.aten


def skip_unread(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Let a traced module compute the rows that are read, in place."""
    plan = _plan(module)
    replaced: dict[Node, Node] = {}
    changed: list[Change] = []
    for region in _regions(plan):
        changed += _apply(module, plan, region, replaced)
    return module, PassReport(tuple(changed))


def _plan(module: GraphModule) -> dict[Node, Step]:
    """Return the nodes of which some rows are never read, each with how it computes the others."""
    plan: dict[Node, Step] = {}
    for node in reversed(module.graph.nodes):  # readers first
        rows = _read(node, plan)
        found = None if rows is None else step(node, rows)
        if found is not None:
            plan[node] = found
        elif operator(node) in SPLITS:  # its parts were planned as if it could give them fewer rows
            for part in node.users:
                planned = plan.pop(part, None)
                own = planned and own_projection(module, part, planned.rows)
                if own:
                    plan[part] = own
    return plan


def _read(node: Node, plan: dict[Node, Step]) -> Rows | None:
    """Return the rows of a value that are read, if they are no more than half of one dimension."""
    reads: list[Rows] = []
    for user in node.users:
        times = sum(leaf is node for leaf in tree_leaves((user.args, user.kwargs)))
        if user in plan:
            found = [rows for value, rows in plan[user].reads if value is node]
        else:
            rows = selected(user)
            found = [] if rows is None else [rows]
        if len(found) != times:  # it reads all of it, too
            return None
        reads += found
    if len({rows.dim for rows in reads}) != 1:
        return None
    if operator(node) in SPLITS:  # all of its parts have as many
        return reads[0] if len({*reads}) == 1 else None
    kept = tuple(sorted({index for rows in reads for index in rows.kept}))
    length = node.meta["val"].shape[reads[0].dim]
    if not isinstance(length, int) or not kept or 2 * len(kept) > length:
        return None
    return Rows(reads[0].dim, kept)


def _regions(plan: dict[Node, Step]) -> list[set[Node]]:
    """Return the nodes of a plan that hang together, where something costly is among them."""
    neighbours: dict[Node, set[Node]] = {node: set() for node in plan}
    for node, planned in plan.items():
        for value, _ in planned.reads:
            if value in plan:
                neighbours[node].add(value)
                neighbours[value].add(node)
    regions, seen = [], set[Node]()
    for node in plan:
        region, waiting = set[Node](), [node]
        while waiting:
            following = waiting.pop()
            if following not in seen:
                seen.add(following)
                region.add(following)
                waiting += neighbours[following]
        if any(operator(member) in COSTLY for member in region):
            regions.append(region)
    return regions


def _apply(
    module: GraphModule, plan: dict[Node, Step], region: set[Node], replaced: dict[Node, Node]
) -> list[Change]:
    """Insert the nodes that compute fewer rows, and let them stand for the selections of these.

    Args:
        module: The traced module.
        plan: Of all nodes.
        region: The nodes that are to go.
        replaced: Selections that are gone, each with what stands for it; added to.
    """
    new: dict[Node, Node] = {}
    taken: dict[tuple[Node, Rows], Node] = {}

    def take(value: Node, rows: Rows, before: Node) -> Node:
        if (value, rows) not in taken:
            kept = rows.kept
            source = new.get(value) or replaced.get(value, value)
            if value in new:
                has = plan[value].rows.kept
                kept = tuple(has.index(index) for index in kept)
            is_whole = operator(value) in SPLITS or len(kept) == source.meta["val"].shape[rows.dim]
            taken[value, rows] = (
                source if is_whole else _insert(module, source, Rows(rows.dim, kept), before)
            )
        return taken[value, rows]

    changes = []
    moved = tuple(node.name for node in module.graph.nodes if node in region)
    for node in list(module.graph.nodes):
        if node in region:
            operands = [take(value, rows, node) for value, rows in plan[node].reads]
            new[node] = plan[node].build(operands, node)
        elif node.all_input_nodes and node.all_input_nodes[0] in region:
            rows = selected(node)
            assert rows is not None
            (source,) = node.all_input_nodes
            has, length = plan[source].rows.kept, source.meta["val"].shape[rows.dim]
            if operator(node) == "aten.select":
                place = has.index(rows.kept[0])
                value = insert(_aten.select.int, new[source], rows.dim, place, before=node)
            else:
                value = take(source, rows, node)
            what = f"{len(region)} operators before it compute {len(has)} of {length} rows"
            site = module_path(node) or node.name
            changes.append(Change(site, what, node.name, value.name, moved))
            replaced[node] = value
            replace(node, value)
    for node in reversed(list(module.graph.nodes)):
        if node in region:
            module.graph.erase_node(node)
    return changes


def _insert(module: GraphModule, source: Node, rows: Rows, before: Node) -> Node:
    """Insert a selection of rows that keeps their dimension."""
    steps = _differences(rows.kept)
    if len(steps) < 2:
        first, last = rows.kept[0], rows.kept[-1]
        ends = (first, last + 1, *steps)
        return insert(_aten.slice.Tensor, source, rows.dim, *ends, before=before)
    name = f"{module_path(before)}.rows"
    index = store_sized(module, name, torch.tensor(rows.kept), before=before)
    return insert(_aten.index_select.default, source, rows.dim, index, before=before)


def _differences(numbers: Iterable[int]) -> set[int]:
    return {after - before for before, after in pairwise(numbers)}
