"""Recognise the nodes that scale and shift: y = x * scale + shift, each number for one channel.

BatchNorm at rest, LayerScale, a normalisation of the pixels, a frozen BatchNorm written out and the
factor of attention's scores are all of this kind.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.traced.graph import arguments, is_stored, operator, shape, tensor

__all__ = ["Affine", "as_affine", "batchnorm_affine", "why_not_affine"]

_PRODUCTS = {"aten.mul", "aten.div"}
_SUMS = {"aten.add", "aten.sub"}


@dataclass(frozen=True)
class Affine:
    """A scale and a shift for every index of one dimension.

    Args:
        dim: Of the value that is scaled, counted from 0; None for one scale and shift of all.
        scale: (C,) float64, or (1,) where `dim` is None; zero and negative numbers are legal.
        shift: Likewise.
    """

    dim: int | None
    scale: Tensor
    shift: Tensor

    @property
    def is_scale(self) -> bool:
        """Whether nothing is shifted."""
        return not bool(self.shift.any())

    @property
    def is_shift(self) -> bool:
        """Whether nothing is scaled."""
        return bool((self.scale == 1).all())


def as_affine(module: GraphModule, node: Node) -> tuple[Node, Affine] | None:
    """Return what a node scales and shifts, and by how much; None if it does not."""
    if operator(node) == "aten.batch_norm":
        if why_not_affine(node):
            return None
        return arguments(node)["input"], batchnorm_affine(module, node)
    if operator(node) not in _PRODUCTS | _SUMS or "rounding_mode" in node.kwargs:
        return None
    given = arguments(node)
    if given.get("alpha", 1) != 1:
        return None
    left, right = given["self"], given["other"]
    is_swapped = not _is_constant(right) and _is_constant(left)
    if is_swapped and operator(node) == "aten.div":
        return None
    value, constant = (right, left) if is_swapped else (left, right)
    if not isinstance(value, Node) or is_stored(value) or not _is_constant(constant):
        return None
    if not isinstance(value.meta.get("val"), Tensor) or shape(value) != shape(node):
        return None
    if not value.meta["val"].is_floating_point():
        return None
    spread = _along_one_dim(module, constant, shape(value))
    if spread is None:
        return None
    dim, numbers = spread
    one, zero = torch.ones_like(numbers), torch.zeros_like(numbers)
    if operator(node) == "aten.mul":
        return value, Affine(dim, numbers, zero)
    if operator(node) == "aten.div":
        return (value, Affine(dim, 1 / numbers, zero)) if bool(numbers.all()) else None
    if operator(node) == "aten.add":
        return value, Affine(dim, one, numbers)
    return value, Affine(dim, -one if is_swapped else one, numbers if is_swapped else -numbers)


def why_not_affine(batchnorm: Node) -> str | None:
    """Say why a BatchNorm is no fixed scale and shift, or None."""
    if operator(batchnorm) != "aten.batch_norm":
        return f"{operator(batchnorm)} is not understood"
    given = arguments(batchnorm)
    if given["running_mean"] is None:
        return "it has no running statistics and normalises by those of the batch"
    if given["training"]:
        return "its training flag is live: it always normalises by the batch's statistics"
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given[name] is not None and not is_stored(given[name]):
            return f"its {name} is computed in the graph"
    return None


def batchnorm_affine(module: GraphModule, batchnorm: Node) -> Affine:
    """Return gamma / sqrt(var + eps) and beta - mean * scale, in float64."""
    given = arguments(batchnorm)
    mean = tensor(module, given["running_mean"]).double()
    var = tensor(module, given["running_var"]).double()
    scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
    if given["weight"] is not None:
        scale = tensor(module, given["weight"]).double()
    if given["bias"] is not None:
        shift = tensor(module, given["bias"]).double()
    scale = scale / torch.sqrt(var + given["eps"])
    return Affine(1, scale, shift - mean * scale)


def _is_constant(argument: Any) -> bool:
    if is_stored(argument):
        return bool(argument.meta["val"].is_floating_point())
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def _along_one_dim(
    module: GraphModule, constant: Any, size: tuple[int, ...]
) -> tuple[int | None, Tensor] | None:
    """Return the dimension of a value along which a constant varies, and its numbers there."""
    if not isinstance(constant, Node):
        return None, torch.tensor([constant], dtype=torch.float64)
    numbers = tensor(module, constant).double()
    if numbers.ndim > len(size):
        return None
    wide = [dim for dim, length in enumerate(numbers.shape) if length > 1]
    if len(wide) > 1:
        return None
    if not wide:
        return None, numbers.reshape(1)
    return wide[0] + len(size) - numbers.ndim, numbers.flatten()
