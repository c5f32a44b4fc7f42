"""Choose which nodes of a graph compute in fp16, by what they do with real images.

    fp16 has 11 bits, ends at 65,504 and loses what is smaller than 6e-8

1. A node stays fp32 if what it reads, makes or sums comes near the end of fp16 on the images that
   were given. Other images reach further than these: "near" is a quarter of the range.
2. If the answers, emulated, are still too far from fp32's, whole kinds of operators (softmax,
   normalisation, ...) are tried in fp32, and the one that helps most stays, then the next.
3. Of a kind that helps, the fewest nodes stay that help almost as much.

Each such island is in the report, with the error with and without it.

Sources: Micikevicius et al., "Mixed precision training", arXiv:1710.03740; NVIDIA's advice to keep
normalisation in fp32 (TensorRT's developer guide, "Reduced precision").
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from deploy.errors import CheckFailedError
from export.emulate_fp16 import emulate_fp16, locate_nonfinite
from export.fp16_range import out_of_range
from export.half import convertible, write_fp16
from export.run_onnx import run_batches
from export.tensors import element_types, module_of

__all__ = ["Island", "MixedPrecision", "to_fp16"]

_LIMIT = 5e-3  # scaled error: ten roundings of fp16, 2^-11 each, all in one direction
_HELPS = 0.8  # an island must bring the error down to this share
_ALMOST = 1.1  # of the error with a whole kind in fp32, that fewer nodes may have
_SEARCHED_ON = 8  # images; the result is judged on all


@dataclass(frozen=True)
class Island:
    """A node that stays fp32.

    Attributes:
        node: Its name.
        module: The module that it belongs to.
        operator: Its ONNX operator.
        reason: Why.
        error_with: Scaled error of the answers, emulated, with this island (and all others).
        error_without: With this node, or with all that stay for the same reason, in fp16 instead;
            infinite if the answers are then not finite.
    """

    node: str
    module: str
    operator: str
    reason: str
    error_with: float
    error_without: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is None."""
        return {
            "node": self.node,
            "module": self.module,
            "operator": self.operator,
            "reason": self.reason,
            "error_with": _finite(self.error_with),
            "error_without": _finite(self.error_without),
        }


@dataclass(frozen=True)
class MixedPrecision:
    """A graph of fp16 and fp32 nodes.

    Attributes:
        model: The ONNX file; input and output are fp32.
        islands: The nodes that stay fp32 though they could compute in fp16.
        fp16_nodes: How many compute in fp16.
        fp32_nodes: How many nodes on floating-point numbers do not, casts apart.
        scaled_error: Of the answers on all images, emulated, to those of the fp32 graph.
    """

    model: bytes
    islands: tuple[Island, ...]
    fp16_nodes: int
    fp32_nodes: int
    scaled_error: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the model."""
        return {
            "method": "fp16 emulated: outputs of fp16 nodes rounded; a GPU's sums not reproduced",
            "islands": [island.to_json() for island in self.islands],
            "fp16_nodes": self.fp16_nodes,
            "fp32_nodes": self.fp32_nodes,
            "scaled_error": self.scaled_error,
        }


def to_fp16(model: bytes, inputs: NDArray[np.float32], *, limit: float = _LIMIT) -> MixedPrecision:
    """Write a graph in fp16, but for the nodes that real images show to need fp32.

    Args:
        model: An fp32 ONNX file; its nodes are called MODULE/OPERATOR.
        inputs: (N, ...) real images, pre-processed.
        limit: The scaled error of the answers above which precision is bought with fp32 nodes.

    Raises:
        CheckFailedError: Answers are not finite, whatever stays fp32; the module is named.
    """
    search = _Search(model, inputs[:_SEARCHED_ON])
    proto = search.proto
    reasons = out_of_range(proto, inputs, among=search.candidates)
    must = frozenset(reasons)
    if not math.isfinite(search.error(must)):
        _refuse(search.write(must), inputs)
    chosen, reasons = _buy_precision(search, reasons, limit=limit)
    written = search.write(chosen)
    error = _error(written, inputs, run_batches(model, inputs))
    if not math.isfinite(error):
        _refuse(written, inputs)
    nodes = {node.name: node for node in proto.graph.node}
    islands = [
        Island(
            node=name,
            module=module_of(nodes[name]),
            operator=nodes[name].op_type,
            reason=reasons[name],
            error_with=search.error(chosen),
            error_without=without,
        )
        for name, without in _errors_without(search, chosen, reasons).items()
    ]
    types = element_types(proto)
    floats = sum(types.get(node.output[0]) == TensorProto.FLOAT for node in proto.graph.node)
    half = len(search.candidates) - len(chosen)
    return MixedPrecision(written, tuple(islands), half, floats - half, error)


class _Search:
    """Writes the graph with some nodes in fp32, and measures the error; each choice once."""

    def __init__(self, model: bytes, inputs: NDArray[np.float32]) -> None:
        self.proto = onnx.load_model_from_string(model)
        self.candidates = convertible(self.proto)
        self._inputs, self._reference = inputs, run_batches(model, inputs)
        self._errors: dict[frozenset[str], float] = {}

    def write(self, single: Collection[str]) -> bytes:
        half = [name for name in self.candidates if name not in single]
        return bytes(write_fp16(self.proto, half).SerializeToString(deterministic=True))

    def error(self, single: frozenset[str]) -> float:
        if single not in self._errors:
            self._errors[single] = _error(self.write(single), self._inputs, self._reference)
        return self._errors[single]


def _error(model: bytes, inputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the scaled error of the emulated answers, infinite if one is not finite."""
    answers = run_batches(emulate_fp16(model), inputs)
    if not np.isfinite(answers).all():
        return math.inf
    return float(np.abs(answers - reference).max() / np.ptp(reference))


def _buy_precision(
    search: _Search, reasons: dict[str, str], *, limit: float
) -> tuple[frozenset[str], dict[str, str]]:
    """Keep kinds of operators in fp32, the most helpful first, until the error is small."""
    chosen, reasons = frozenset(reasons), dict(reasons)
    while search.error(chosen) > limit:
        before = search.error(chosen)
        kinds = _kinds(search, chosen)
        if not kinds:
            break
        best = min(kinds, key=lambda kind: search.error(chosen | kinds[kind]))
        after = search.error(chosen | kinds[best])
        if after > _HELPS * before:
            break
        enough = max(limit, _ALMOST * after)
        in_order = [name for name in search.candidates if name in kinds[best]]
        few = _fewest(in_order, lambda some: search.error(chosen | some) <= enough)  # noqa: B023
        reasons |= dict.fromkeys(few, f"precision: {best} in fp32")
        chosen |= few
    return chosen, reasons


def _kinds(search: _Search, chosen: frozenset[str]) -> dict[str, frozenset[str]]:
    """Return what may be tried in fp32: the nodes of an operator, without and with their readers.

    A difference of two exact numbers is no use if it is rounded before: that takes both.
    """
    free = [n for n in search.proto.graph.node if n.name in {*search.candidates} - chosen]
    readers: dict[str, set[str]] = {}
    for node in free:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    kinds: dict[str, frozenset[str]] = {}
    for operator in sorted({node.op_type for node in free}):
        members = [node for node in free if node.op_type == operator]
        kinds[operator] = frozenset(node.name for node in members)
        reading = (readers.get(name, set()) for node in members for name in node.output)
        kinds[f"{operator} and what reads it"] = kinds[operator].union(*reading)
    return kinds


def _fewest(names: list[str], is_enough: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """Return a small part of the names that is enough; all of them are.

    Halves are left out while what remains is enough, then quarters, and so on to single ones
    (delta debugging): about 2 log n trials when few matter.
    """
    kept, size = list(names), len(names) // 2
    while size:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if rest and is_enough(frozenset(rest)):
                kept = rest
            else:
                start += size
        size //= 2
    return frozenset(kept)


def _errors_without(
    search: _Search, chosen: frozenset[str], reasons: dict[str, str]
) -> dict[str, float]:
    """Return the error without each island: one by one if they are few, else by their reasons."""
    if len(chosen) <= _SEARCHED_ON:
        return {name: search.error(chosen - {name}) for name in _ordered(search, chosen)}
    groups: dict[str, frozenset[str]] = {}
    for name in chosen:
        group = reasons[name].partition(":")[0]
        groups[group] = groups.get(group, frozenset()) | {name}
    return {
        name: search.error(chosen - groups[reasons[name].partition(":")[0]])
        for name in _ordered(search, chosen)
    }


def _ordered(search: _Search, names: Iterable[str]) -> list[str]:
    chosen = {*names}
    return [name for name in search.candidates if name in chosen]


def _refuse(model: bytes, inputs: NDArray[np.float32]) -> None:
    where = locate_nonfinite(model, inputs)
    raise CheckFailedError(
        "an fp16 model answers with finite numbers",
        found=f"the first that is not finite comes from '{where}'",
        remedy="look at this module's weights and activations; or export fp32 only",
    )


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
