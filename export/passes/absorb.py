"""A way on which a scale and a shift leave the graph, planned to its end before any edit.

    Given   y = x * s + t    with x the result of, or y the input of, what is linear
    Result  y = x            with other weights before it, or behind

export/passes/into_producers.py plans the way back, export/passes/into_consumers.py the way on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from export.passes.affine import Affine, as_affine
from export.traced.graph import arguments, module_path, operator, shape, store, tensor
from export.traced.report import Change

__all__ = ["MAX_SHIFT", "ObstacleError", "Plan", "first_argument", "scaled_constant"]

# What may be added to values that are scaled only afterwards: as much as to the pixels of an image,
# 0 to 255. Half precision has eleven binary digits, and a larger sum leaves few to the values.
MAX_SHIFT = 256.0


class ObstacleError(Exception):
    """Why a scale and shift cannot go that way; never leaves the passes."""


@dataclass
class Plan:
    """A way to its end.

    Args:
        edits: What remains to be done, in this order.
        moved: The nodes whose values change by it.
        layers: The nodes that take the scale and shift over.
    """

    edits: list[Callable[[], None]] = field(default_factory=list)
    moved: list[Node] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)

    def apply(self) -> None:
        """Change the graph."""
        for edit in self.edits:
            edit()

    def add(self, layer: Node, edit: Callable[[], None]) -> None:
        """Let a node take over."""
        self.layers.append(layer)
        self.edits.append(edit)

    @property
    def names(self) -> str:
        """The layers that take over, by their modules."""
        return ", ".join(dict.fromkeys(module_path(layer) or layer.name for layer in self.layers))

    def backwards(self, site: str, what: str, old: Node, new: Node) -> Change:
        """Report that `new`, at whose producers the way ends, has the value that `old` had."""
        moved = tuple(node.name for node in self.moved)
        return Change(site, what, old.name, new.name, moved)

    def forwards(self, site: str, what: str) -> Change:
        """Report that the layers at which the way ends have the values that they had."""
        first, *others = [layer.name for layer in self.layers]
        moved = tuple(node.name for node in self.moved)
        return Change(site, what, first, first, moved, tuple(others))

    def check(self, affine: Affine, node: Node, *, positive: bool, no_shift: str) -> None:
        """Stop at a node that lets only positive scales through, or, for a reason, no shift."""
        if positive and bool((affine.scale <= 0).any()):
            raise ObstacleError(f"it scales by what is not positive, across {node.name}")
        if no_shift and not affine.is_scale:
            raise ObstacleError(no_shift)

    def change_stored(self, module: GraphModule, user: Node, stored: Node, affine: Affine) -> None:
        """Plan that `user` reads stored * scale + shift, along a dimension of the user's value."""
        if not stored.meta["val"].is_floating_point():
            raise ObstacleError(f"{user.name} reads whole numbers, which cannot be scaled")
        ndim = len(shape(user))

        def edit() -> None:
            numbers = tensor(module, stored)
            scale, shift = affine.scale.to(numbers.dtype), affine.shift.to(numbers.dtype)
            if affine.dim is not None:
                ones = [1] * (ndim - affine.dim - 1)
                scale, shift = scale.view(-1, *ones), shift.view(-1, *ones)
            changed = numbers * scale + shift
            name = str(stored.target)
            user.replace_input_with(
                stored, store(module, name, changed, before=user, instead_of=stored)
            )

        self.edits.append(edit)

    def scale_product(
        self, module: GraphModule, product: Node, constant: Any, affine: Affine
    ) -> None:
        """Plan that a product with something stored, or a quotient, takes a scale over."""
        scale = affine.scale if operator(product) == "aten.mul" else 1 / affine.scale
        if not bool(scale.isfinite().all()):
            raise ObstacleError(f"{product.name} would divide by zero")
        self.change_stored(module, product, constant, Affine(affine.dim, scale, scale * 0))
        self.layers.append(product)


def scaled_constant(module: GraphModule, product: Node) -> tuple[Node, Any, Affine] | None:
    """Return what a product or quotient scales, the constant, and by how much; else None."""
    found = as_affine(module, product)
    if found is None:
        return None
    source, affine = found
    given = arguments(product)
    return source, given["other"] if source is given["self"] else given["self"], affine


def first_argument(node: Node) -> Node:
    """Return the node that an operator reads first."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source
