"""What a sum adds up: its branches, each from the value that it reads to the sum.

    y = conv_1(x) * s_1 + t_1 + (conv_3(conv_2(x)) + x * s_0)     has three branches, all of x

However the sum is bracketed, and in place or not, it is one sum of all, as long as nothing but the
next sum reads an inner one. An inner product, BatchNorm at rest, or pair of layers is part of its
branch likewise.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.passes.affine import as_affine
from export.traced.aliases import is_in_place, memory
from export.traced.graph import arguments, is_stored, mutated, operator, shape
from export.traced.kernel_nodes import LAYERS, read
from export.traced.kernels import Kernel, loses_bias, sequence, sequence_cost

__all__ = [
    "SUMS",
    "Branch",
    "branches_of",
    "is_outermost_sum",
    "source_of",
    "sums_within",
    "why_not_moved",
]

SUMS = {"aten.add": 1, "aten.add_": 1, "aten.sub": -1, "aten.sub_": -1}
# What always makes memory of its own for its result, so that a sum in place changes nothing else.
_NEW = {*LAYERS, "aten.batch_norm", "aten.add", "aten.sub", "aten.mul", "aten.div"}


@dataclass(frozen=True, eq=False)
class Branch:
    """One addend: what is read, computed, scaled and shifted on the way to the sum.

    Args:
        top: The node that is added.
        factor: How many times; negative if it is subtracted.
        source: The node that is read.
        scale: Of what the kernel gives, `factor` included: (C,) or (1,) float64.
        shift: Likewise.
        dim: Along which they vary; None for everywhere.
        nodes: From `top` down to the kernel's, without the source. Nothing else reads them.
        layer: The convolution or linear layer among them that could put out the whole sum.
        kernel: What is computed of the source; None for nothing.
        cost: Its multiply-adds as it is now.
        is_row: Whether `kernel` stands for two layers in a row.
    """

    top: Node
    factor: float
    source: Node
    scale: Tensor
    shift: Tensor
    dim: int | None = None
    nodes: tuple[Node, ...] = ()
    layer: Node | None = None
    kernel: Kernel | None = None
    cost: int = 0
    is_row: bool = False


def is_outermost_sum(node: Node) -> bool:
    """Say whether a node is a sum of values, and no addend that only another sum reads."""
    return _is_sum(node) and not (len(node.users) == 1 and _is_sum(next(iter(node.users))))


def sums_within(root: Node) -> Iterator[Node]:
    """Yield a sum and those within it, which nothing else reads."""
    yield root
    for operand in dict.fromkeys(_operands(root)):
        if _is_inner(operand):
            yield from sums_within(operand)


def branches_of(module: GraphModule, root: Node) -> list[Branch]:
    """Return the branches of a sum; one that is added twice is one of twice the factor."""
    factors: dict[Node, float] = {}
    for top, factor in _addends(root, 1.0):
        factors[top] = factors.get(top, 0.0) + factor
    return _deepened(module, [_branch(module, top, factor) for top, factor in factors.items()])


def source_of(layer: Node) -> Any:
    """Return what a layer or pool reads."""
    given = arguments(layer)
    return given["input"] if "input" in given else given["self"]


def why_not_moved(module: GraphModule, reads: Iterable[Node], gone: set[Node]) -> str | None:
    """Say which value is changed in place between where it is read and where it would be, or None.

    Args:
        module: The traced module.
        reads: The values that are read anew.
        gone: The nodes that read them now; the first and the last that will are among them.
    """
    node, last, changes = min(gone), max(gone), []
    while node is not last:
        changes += [] if node in gone else [(node, changed) for changed in mutated(node)]
        node = node.next
    if not changes:
        return None
    numbers = memory(module)
    names = {numbers[node]: node.name for node in reads}
    for node, changed in changes:
        if numbers[changed] in names:
            return f"{names[numbers[changed]]} is changed in place by {node.name}"
    return None


def _is_sum(node: Node) -> bool:
    """Say whether a node is the sum or difference of two values of its own shape and type."""
    if operator(node) not in SUMS:
        return False
    for x in _operands(node):
        if not isinstance(x, Node) or is_stored(x) or not isinstance(x.meta["val"], Tensor):
            return False
        if shape(x) != shape(node) or x.meta["val"].dtype != node.meta["val"].dtype:
            return False
    if not node.meta["val"].is_floating_point() or isinstance(arguments(node)["alpha"], Node):
        return False
    return not is_in_place(node) or _is_private(_operands(node)[0])


def _is_inner(node: Node) -> bool:
    return len(node.users) == 1 and _is_sum(node)


def _operands(node: Node) -> tuple[Any, Any]:
    return arguments(node)["self"], arguments(node)["other"]


def _addends(node: Node, factor: float) -> Iterator[tuple[Node, float]]:
    second = factor * arguments(node)["alpha"] * SUMS[operator(node)]
    for operand, times in zip(_operands(node), (factor, second), strict=True):
        if _is_inner(operand):
            yield from _addends(operand, times)
        else:
            yield operand, times


def _branch(module: GraphModule, top: Node, factor: float) -> Branch:
    """Go down from an addend, through scales and shifts, to a layer or else to what it scales."""
    scale = torch.tensor([factor], dtype=torch.float64)
    branch = Branch(top, factor, top, scale, torch.zeros_like(scale))
    while len(branch.source.users) == 1:
        node, nodes = branch.source, (*branch.nodes, branch.source)
        kernel = read(module, node)
        if kernel is not None:
            return replace(
                branch,
                source=source_of(node),
                nodes=nodes,
                layer=node if operator(node) in LAYERS else None,
                kernel=kernel,
                cost=kernel.cost,
            )
        found = as_affine(module, node)
        if found is None:
            break
        value, affine = found
        if None not in (branch.dim, affine.dim) and branch.dim != affine.dim:
            break
        branch = replace(
            branch,
            source=value,
            scale=branch.scale * affine.scale,
            shift=branch.shift + branch.scale * affine.shift,
            dim=affine.dim if branch.dim is None else branch.dim,
            nodes=nodes,
        )
    return branch


def _deepened(module: GraphModule, branches: list[Branch]) -> list[Branch]:
    """Let a branch of two layers in a row (1x1 and 3x3) begin where another branch begins.

    Alone the two may be better off as they are; beside a 3x3 they come for free.
    """
    deeper = [_two_layers(module, branch) for branch in branches]
    starts = Counter(branch.source for branch in branches)
    starts += Counter(source_of(below) for below, _ in filter(None, deeper))
    total = sum(branch.cost for branch in branches)
    result = []
    for branch, row in zip(branches, deeper, strict=True):
        if row is None or branch.kernel is None or starts[source_of(row[0])] < 2:
            result.append(branch)
            continue
        below, kernel = row
        cost = sequence_cost(kernel, branch.kernel)
        if cost is None or cost > total + kernel.cost or loses_bias(kernel, branch.kernel):
            result.append(branch)
            continue
        result.append(
            replace(
                branch,
                source=source_of(below),
                nodes=(*branch.nodes, below),
                kernel=sequence(kernel, branch.kernel),
                cost=branch.cost + kernel.cost,
                is_row=True,
            )
        )
    return result


def _two_layers(module: GraphModule, branch: Branch) -> tuple[Node, Kernel] | None:
    """Return the layer or pool, and its kernel, that nothing but a branch's layer reads."""
    if branch.kernel is None or len(branch.source.users) > 1:
        return None
    kernel = read(module, branch.source)
    if kernel is None or len(kernel.stride) != len(branch.kernel.stride):
        return None
    return branch.source, kernel


def _is_private(node: Node) -> bool:
    """Say whether the memory of a value was made for it, and nothing but one node reads it."""
    if len(node.users) != 1:
        return False
    if operator(node) in SUMS and is_in_place(node):
        return _is_private(_operands(node)[0])
    return operator(node) in _NEW
