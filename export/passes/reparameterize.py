"""Merge the branches of a block, and layers in a row, into one convolution or linear layer.

    Given   y = conv_1(x) * s_1 + t_1 + conv_2(x) + ... + x * s_0 + t_0
    Result  y = conv(x)           the kernels summed, x being a kernel of ones in the middle

    Given   y = conv_2(conv_1(x))     one of them 1x1
    Result  y = conv(x)               the kernels multiplied

Exact where the branches read the same x with the same stride, and nothing else reads a branch. It
is done where the one layer takes no more multiply-adds than its parts: a 3x3 and a 1x1, a 7x7 and a
dilated 3x3 become one; a 1x3 and a 3x1 alone (6 taps, and 9 as one), and a depthwise convolution
and the pointwise one behind it, do not. Blocks are known by their algebra, never by their class.
The kernels' algebra stands in export/traced/kernels.py.

Source: Ding et al., "RepVGG", arXiv:2101.03697, section 3.3; "ACNet", arXiv:1908.03930; "Diverse
Branch Block", arXiv:2103.13425, section 3.2; Vasu et al., "MobileOne", arXiv:2206.04040.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch.fx import GraphModule, Node

from export.passes.branches import (
    SUMS,
    Branch,
    branches_of,
    is_outermost_sum,
    source_of,
    sums_within,
    why_not_moved,
)
from export.traced.graph import arguments, insert, module_path, operator, shape
from export.traced.kernel_nodes import LAYERS, read, write
from export.traced.kernels import (
    Kernel,
    identity,
    loses_bias,
    parallel,
    parallel_cost,
    sequence,
    sequence_cost,
)
from export.traced.report import Change, PassReport

__all__ = ["reparameterize"]

_WRITTEN = "written by reparameterize"  # in a node's meta: a site of its module's name is taken


def reparameterize(module: GraphModule) -> tuple[GraphModule, PassReport]:
    """Merge a traced module's parallel branches, and then its layers in a row, in place."""
    changed: list[Change] = []
    skipped: dict[str, str] = {}
    names = _site_names(module)
    for kinds, merge in ((SUMS, _merge_sum), (LAYERS, _merge_row)):
        for node in list(module.graph.nodes):
            if operator(node) in kinds and node in names:
                result = merge(module, node, names[node])
                if isinstance(result, Change):
                    changed.append(result)
                elif result:
                    skipped[names[node]] = result
    return module, PassReport(tuple(changed), skipped)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some branches of one source, the kernel of their sum, and its multiply-adds."""

    branches: tuple[Branch, ...]
    kernel: Kernel
    cost: int

    @property
    def source(self) -> Node:
        return self.branches[0].source

    @property
    def layers(self) -> list[Node]:
        return [branch.layer for branch in self.branches if branch.layer is not None]


def _merge_sum(module: GraphModule, root: Node, name: str) -> Change | str | None:
    """Merge the branches of a sum that read the same; or say why some are not."""
    branches = branches_of(module, root)
    reason, parts = _why_no_branch(branches), []
    for source in dict.fromkeys(branch.source for branch in branches):
        of_source = _merged(_alike([b for b in branches if b.source is source], root))
        parts += [part for part in of_source if len(part.branches) > 1]
        reason = reason or _why_apart(of_source)
    if not parts:
        return reason

    taken = [branch for part in parts for branch in part.branches]
    rest = [branch for branch in branches if branch not in taken]
    gone = {node for branch in taken for node in branch.nodes} | set(sums_within(root))
    obstacle = why_not_moved(module, [p.source for p in parts] + [b.top for b in rest], gone)
    if obstacle:
        return obstacle

    mains = [max(part.layers, key=_weight_size) for part in parts]
    for main, part in zip(mains, parts, strict=True):
        write(module, main, part.source, part.kernel)
    result = _add_up(mains, rest, root)
    kind = "linear layer" if operator(mains[0]) == "aten.linear" else "convolution"
    into = f"one {kind}" if len(mains) == 1 else f"{len(mains)} layers"
    moved = tuple(sorted(node.name for node in gone - {root, result}))
    change = Change(
        name, f"{len(taken)} branches merged into {into}", root.name, result.name, moved
    )
    root.replace_all_uses_with(result)
    for node in sorted(gone - set(mains), reverse=True):
        module.graph.erase_node(node)
    return change


def _merge_row(module: GraphModule, layer: Node, name: str) -> Change | str | None:
    """Merge a layer with the one before it, that it alone reads; or say why it is not exact."""
    before = source_of(layer)
    if operator(before) not in LAYERS or len(before.users) > 1:
        return None
    a, b = read(module, before), read(module, layer)
    if a is None or b is None or len(a.stride) != len(b.stride):
        return None
    cost = sequence_cost(a, b)
    if cost is None or cost > a.cost + b.cost:
        return None
    if loses_bias(a, b):
        return f"{layer.name} pads with zeros, which the bias of {before.name} is not added to"
    source = source_of(before)
    obstacle = why_not_moved(module, [source], {before, layer})
    if obstacle:
        return obstacle
    write(module, layer, source, sequence(a, b))
    layer.meta[_WRITTEN] = True
    what = f"merged with {module_path(before) or before.name} before it"
    change = Change(name, what, layer.name, layer.name, (before.name,))
    module.graph.erase_node(before)
    return change


def _site_names(module: GraphModule) -> dict[Node, str]:
    """Name each outermost sum, and each layer, by its module, or by its node if not alone there."""
    sites = [n for n in module.graph.nodes if is_outermost_sum(n) or operator(n) in LAYERS]
    paths = Counter(module_path(node) for node in sites)
    names = {}
    for node in sites:
        path = module_path(node)
        is_unique = path and paths[path] == 1 and _WRITTEN not in node.meta
        names[node] = path if is_unique else f"{path}.{node.name}".lstrip(".")
    return names


def _alike(branches: list[Branch], root: Node) -> list[_Part]:
    """Return the branches, all of one source, that a layer of one kind could compute."""
    first = next((b for b in branches if b.layer is not None), None)
    if first is None or first.kernel is None or len(branches) == 1:
        return []
    kind = operator(first.layer)
    channels = len(shape(root)) - 1 if kind == "aten.linear" else 1
    parts = []
    for branch in branches:
        kernel = branch.kernel or identity(first.kernel)
        is_of_kind = branch.layer is None or operator(branch.layer) == kind
        has_same_space = len(kernel.stride) == len(first.kernel.stride)
        if is_of_kind and has_same_space and branch.dim in (None, channels):
            scaled = kernel.scaled(branch.scale, branch.shift)
            parts.append(_Part((branch,), scaled, branch.cost or kernel.cost))
    return parts


def _merged(parts: list[_Part]) -> list[_Part]:
    """Merge two at a time, those that save most first, as long as that costs nothing."""
    while True:
        best: tuple[int, _Part, _Part] | None = None
        for a, b in combinations(parts, 2):
            cost = parallel_cost(a.kernel, b.kernel) if a.layers or b.layers else None
            if cost is not None and cost <= a.cost + b.cost:
                saved = a.cost + b.cost - cost
                if best is None or saved > best[0]:
                    best = saved, a, b
        if best is None:
            return parts
        _, a, b = best
        kernel = parallel(a.kernel, b.kernel)
        merged = _Part(a.branches + b.branches, kernel, kernel.cost)
        parts = [merged, *(part for part in parts if part not in (a, b))]


def _add_up(layers: list[Node], rest: list[Branch], root: Node) -> Node:
    """Write, before a sum, the sum of its merged layers and of what is left of it."""
    result = layers[0]
    addends = [(layer, 1.0) for layer in layers[1:]]
    addends += [(branch.top, branch.factor) for branch in rest]
    for node, factor in addends:
        times: dict[str, Any] = {} if factor == 1 else {"alpha": factor}
        result = insert(torch.ops.aten.add.Tensor, result, node, before=root, **times)
        result.meta[_WRITTEN] = True
    return result


def _why_apart(parts: list[_Part]) -> str | None:
    """Say why the first two layers among some parts could not be merged, or None.

    Of two layers in a row nothing is said: that a residual branch stays one is no surprise.
    """
    single = [part for part in parts if part.layers and not any(b.is_row for b in part.branches)]
    for a, b in combinations(single, 2):
        pair = f"{a.layers[0].name} and {b.layers[0].name}"
        if a.kernel.stride != b.kernel.stride:
            return f"{pair} have different strides"
        cost = parallel_cost(a.kernel, b.kernel)
        if cost is None:
            return f"{pair} pad so differently that no one convolution puts out their size"
        return f"{pair} as one would take {cost} multiply-adds, now they take {a.cost + b.cost}"
    return None


def _why_no_branch(branches: list[Branch]) -> str | None:
    """Say why a layer in a sum, beside others of what it reads, cannot be merged, or None."""
    for branch in branches:
        layer = branch.source
        if branch.kernel is not None or operator(layer) not in LAYERS:
            continue
        if not any(b.source is source_of(layer) for b in branches):
            continue
        if len(layer.users) > 1:
            return f"the output of {layer.name} has {len(layer.users)} consumers"
        return f"the weight or bias of {layer.name} is computed in the graph"
    return None


def _weight_size(layer: Node) -> int:
    return int(arguments(layer)["weight"].meta["val"].numel())
