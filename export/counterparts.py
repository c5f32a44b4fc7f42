"""Find the tensor of an ONNX file that carries each module's value: by the value itself.

Names do not tell. A convolution's node computes what the BatchNorm after it did, an activation in
place and a dropout leave no node, three projections are one. But a tensor that agrees with a
module's output on several images, number by number, is that output, whoever wrote the file.

Some outputs are in the file in another order of axes. Both are sorted then: the same numbers in
some order are the same value, and what was sorted into one place belongs together. Among equal
numbers any pairing will do, as an error depends on the numbers alone.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploy.bundle.manifest import Tolerance
from deploy.measure.compare import compare
from export.emulate_fp16 import emulate_fp16
from export.float64 import evaluate
from export.tensors import element_types, module_of, observe
from export.trace import frozen_copy

__all__ = [
    "Call",
    "Counterpart",
    "Lookup",
    "computed_floats",
    "find_counterparts",
    "module_values",
    "tensor_values",
]

# Of float32 against float64: 1e-6 is usual, 1e-4 was seen in deep models. Two tensors that differ
# by less are one for whoever looks for a fault.
SAME = 1e-4


@dataclass(frozen=True)
class Call:
    """One output of one call of a module.

    Attributes:
        module: Its name; "" is the model itself. Of a module with several names the first.
        number: 1 for the first call in a forward pass.
        output: The place among what was returned: 0, unless the module returns several tensors.
        kind: The module's class.
    """

    module: str
    number: int
    output: int
    kind: str

    def __str__(self) -> str:
        """Return the name as in `layer1.0.relu (call 2)`."""
        output = f"[{self.output}]" if self.output else ""
        number = f" (call {self.number})" if self.number > 1 else ""
        return f"{self.module or 'the model itself'}{output}{number}"


@dataclass(frozen=True)
class Counterpart:
    """The tensor that carries a module's value.

    Attributes:
        tensor: Its name.
        node: The name of the node that makes it, MODULE/OPERATOR.
        is_permuted: Whether its numbers are in another order than the module's.
    """

    tensor: str
    node: str
    is_permuted: bool


@dataclass(frozen=True)
class Lookup:
    """Where the values of a model are in a file.

    Attributes:
        found: The counterpart of each call that has one.
        missing: Each other call, with the reason.
        stray: The first node that, like all that follow from it, makes nothing of the model's;
            None if the file's outputs are the model's.
    """

    found: dict[Call, Counterpart]
    missing: dict[Call, str]
    stray: str | None


def module_values(model: nn.Module, inputs: Tensor) -> Iterator[dict[Call, NDArray[np.float64]]]:
    """Run a model in float64 on (N, ...) inputs one by one, and yield what its modules return.

    A module is listed when its call ends: after its children. What is not a floating-point tensor
    is left out.
    """
    frozen = frozen_copy(model).double()
    names = {module: name for name, module in frozen.named_modules()}
    values: dict[Call, Tensor] = {}
    numbers: Counter[str] = Counter()

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        name = names[module]
        numbers[name] += 1
        for i, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                call = Call(name, numbers[name], i, type(module).__name__)
                values[call] = leaf.clone()  # an operator in place may follow

    for module in names:
        module.register_forward_hook(keep)
    for x in inputs.cpu().double().split(1):
        values.clear()
        numbers.clear()
        evaluate(frozen, (x,))
        yield {call: value.numpy() for call, value in values.items()}


def tensor_values(
    proto: onnx.ModelProto, inputs: Tensor, names: list[str]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Run a graph on (N, ...) inputs one by one, fp16 emulated, and yield the named tensors."""
    emulated = onnx.load_model_from_string(emulate_fp16(proto.SerializeToString()))
    return observe(emulated, inputs.cpu().float().numpy(), names)


def computed_floats(proto: onnx.ModelProto) -> list[str]:
    """Return the names of the floating-point tensors that a graph's nodes make, in order."""
    types = element_types(proto)
    made = (name for node in proto.graph.node for name in node.output)
    return [n for n in made if types.get(n) in (TensorProto.FLOAT, TensorProto.FLOAT16)]


def find_counterparts(
    model: nn.Module, file: bytes, inputs: Tensor, *, tolerance: float = SAME
) -> Lookup:
    """Look for every module's value among the tensors of a file.

    Args:
        model: A classifier, of which the file is an export.
        file: The ONNX file.
        inputs: (N, 3, H, W) images, at least two different ones: a tensor must agree on all.
        tolerance: The scaled error up to which a tensor is taken for a module's value. In another
            order of axes never more than 1e-4: sorted, any two tensors are alike.
    """
    proto = onnx.load_model_from_string(file)
    makers = {name: node for node in proto.graph.node for name in node.output}
    names = computed_floats(proto)
    candidates: dict[Call, dict[str, _Match]] = {}
    missing: dict[Call, str] = {}
    images = zip(module_values(model, inputs), tensor_values(proto, inputs, names), strict=True)
    for values, tensors in images:
        spans = {name: _span(tensor) for name, tensor in tensors.items()}
        for call, value in values.items():
            if not np.ptp(value) > 0:
                missing[call] = "constant" if np.isfinite(value).all() else "not finite"
            span = _span(value)
            before = candidates.get(call, dict.fromkeys(names, _Match(0.0, False)))
            candidates[call] = {
                name: match.worse(again)
                for name, match in before.items()
                if call not in missing and _may_be(spans[name], span, tolerance)
                if (again := _match(tensors[name], value, tolerance))
            }
    order = {name: i for i, name in enumerate(makers)}
    found: dict[Call, Counterpart] = {}
    for call, matches in candidates.items():
        if matches:
            best = min(
                matches,
                key=lambda name: (
                    not _is_within(makers[name], call.module),
                    matches[name].error,
                    order[name],
                ),
            )
            found[call] = Counterpart(best, makers[best].name, matches[best].is_permuted)
    for i, call in enumerate(candidates):
        if call not in found:
            missing.setdefault(call, _whereabouts(call, [*candidates][i + 1 :], found))
    sound = {name for matches in candidates.values() for name in matches}
    return Lookup(found, missing, _first_stray(proto.graph, sound))


@dataclass(frozen=True)
class _Match:
    error: float
    is_permuted: bool

    def worse(self, other: "_Match") -> "_Match":
        return _Match(max(self.error, other.error), self.is_permuted or other.is_permuted)


_Span = tuple[int, float, float]


def _span(value: NDArray[Any]) -> _Span:
    """Return what no order of axes changes, and what tells most tensors apart."""
    return value.size, float(value.min()), float(value.max())


def _may_be(tensor: _Span, value: _Span, tolerance: float) -> bool:
    (size, low, high), (wanted, lowest, highest) = tensor, value
    slack = tolerance * (highest - lowest)
    return size == wanted and abs(low - lowest) <= slack and abs(high - highest) <= slack


def _match(tensor: NDArray[Any], value: NDArray[np.float64], tolerance: float) -> _Match | None:
    """Compare a tensor with a value in the same order, then in any."""
    error = _error(tensor.ravel(), value.ravel())
    if error <= tolerance:
        return _Match(error, False)
    error = _error(np.sort(tensor, axis=None), np.sort(value, axis=None))
    return _Match(error, True) if error <= min(SAME, tolerance) else None


def _error(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    return compare(actual, reference, _ANY).max_scaled_error


_ANY = Tolerance(max_scaled_error=1.0, min_top1_agreement=0.0, reason="measured, not judged")


def _is_within(node: NodeProto, module: str) -> bool:
    """Say whether a node was written for a module or one inside it; equal values are told so."""
    return f"{module_of(node)}.".startswith(f"{module}." if module else "")


def _whereabouts(call: Call, later: list[Call], found: dict[Call, Counterpart]) -> str:
    """Say which later call's value a missing module's node computes, if any."""
    for other in later:
        if other in found and found[other].node.rpartition("/")[0] == call.module:
            return f"folded into {other}"
    return "not in the graph"


def _first_stray(graph: onnx.GraphProto, sound: set[str]) -> str | None:
    """Return the first node of which neither an output nor what is made of it is a sound tensor.

    What lies between two of the model's values, within attention, is none and need not be wrong:
    the value after it would be.
    """
    needed = set(sound)
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(filter(None, node.input))  # one that is left out is called ""
    if needed.issuperset(value.name for value in graph.output):
        return None
    return next(node.name for node in graph.node if not needed.intersection(node.output))
