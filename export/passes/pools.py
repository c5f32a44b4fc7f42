"""Operators through which a scale and a shift of each channel pass: pools, means, resizing.

    Given   y = pool(x * s + t)
    Result  y = pool(x) * s + t

Exact for weighted means whose weights sum to 1 (a pool that counts padded zeros is none, and takes
a scale alone), and for maxima where every s is positive.
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from export.traced.graph import arguments, operator, shape

__all__ = ["Passage", "passage"]

_MEANS = {f"aten.adaptive_avg_pool{n}d": n for n in (1, 2, 3)} | {
    "aten.upsample_linear1d": 1,
    "aten.upsample_nearest1d": 1,
    "aten.upsample_nearest2d": 2,
    "aten.upsample_bilinear2d": 2,
    "aten.upsample_bicubic2d": 2,
    "aten._upsample_bilinear2d_aa": 2,
    "aten._upsample_bicubic2d_aa": 2,
    "aten.upsample_nearest3d": 3,
    "aten.upsample_trilinear3d": 3,
}
_AVERAGES = {f"aten.avg_pool{n}d": n for n in (1, 2, 3)}
_MAXIMA = {f"aten.max_pool{n}d": n for n in (1, 2, 3)}
_REDUCTIONS = {"aten.mean": False, "aten.amax": True}


@dataclass(frozen=True)
class Passage:
    """What an operator lets through.

    Args:
        dim: Where the dimension lies on its other side; None for "everywhere".
        needs_positive: Only positive scales pass.
        needs_no_shift: Why a shift does not pass; "" if it does.
    """

    dim: int | None
    needs_positive: bool = False
    needs_no_shift: str = ""


def passage(node: Node, dim: int | None, *, is_backwards: bool) -> Passage | None:
    """Return what a pool, mean, padding or resizing lets through, or None if it is none of these.

    Args:
        node: An operator.
        dim: Of its input, or `is_backwards` of its result; None for "everywhere".
        is_backwards: Whether the way goes from the result to the input.
    """
    name = operator(node)
    spatial = (_MEANS | _AVERAGES | _MAXIMA).get(name)
    if spatial is not None:
        if dim is not None and dim >= len(shape(node)) - spatial:
            return None
        return Passage(dim, name in _MAXIMA, _why_no_shift(node) if name in _AVERAGES else "")
    if name in _REDUCTIONS and "dim" in arguments(node):
        through = _through_reduction(node, dim, is_backwards=is_backwards)
        return None if through is _BLOCKED else Passage(through, _REDUCTIONS[name])
    if name == "aten.pad":
        given = arguments(node)
        first = len(shape(node)) - len(given["pad"]) // 2
        if dim is not None and dim >= first:
            return None
        is_constant = given["mode"] == "constant"
        if is_constant and given["value"]:
            return None
        return Passage(dim, needs_no_shift=f"{node.name} pads with zeros" * is_constant)
    return None


_BLOCKED = -1


def _through_reduction(node: Node, dim: int | None, *, is_backwards: bool) -> int | None:
    given = arguments(node)
    source = given["input"] if "input" in given else given["self"]
    ndim = len(shape(source))
    axes = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    reduced = {int(d) % ndim for d in axes if d is not None} or set(range(ndim))
    if dim is None:
        return None
    if given["keepdim"]:
        return _BLOCKED if dim in reduced else dim
    kept = [d for d in range(ndim) if d not in reduced]
    if is_backwards:
        return kept[dim]
    return kept.index(dim) if dim in kept else _BLOCKED


def _why_no_shift(pool: Node) -> str:
    given: dict[str, Any] = arguments(pool)
    padding = given["padding"]
    is_padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    if is_padded and given["count_include_pad"]:
        return f"{pool.name} counts padded zeros"
    return f"{pool.name} divides by another number" if given.get("divisor_override") else ""
