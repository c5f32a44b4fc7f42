"""Where an exported file parts from the PyTorch model, in the names of its modules.

A module's output has to be found in the file before it can be compared: BatchNorm is folded, layers
are packed and nodes rewritten. It is found by its value. The fp32 file computes to 1e-6 what the
model does, so that the tensor that carries a module's output has its numbers, in its order or with
its axes permuted. The fp16 and int8 files keep the tensors' names.

A module whose output no tensor carries is either gone by right, as a convolution before its folded
BatchNorm, or the file is wrong. The simplified graph tells them apart: it is proved, in float64, so
what is gone by right is not in it either.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from export.judge.module_report import ModuleDiff, ModuleRow
from export.onnx_file.tensors import element_types, observe
from export.precision.emulate_fp16 import emulate_fp16
from export.traced.float64 import evaluate
from export.traced.trace import frozen_copy

__all__ = ["compare_modules"]

_Array = NDArray[np.floating[Any]]
_SAME = 1e-3  # scaled error of float32 in a deep model; the next best tensor is off by far more
_MOST_AXES = 5  # without the batch's; 120 permutations


def compare_modules(
    model: nn.Module,
    simplified: GraphModule,
    fp32: bytes,
    file: bytes,
    *,
    inputs: Tensor,
    limit: float,
    fed: NDArray[Any] | None = None,
) -> ModuleDiff:
    """Compare every module's output in PyTorch with the tensor of a file that carries it.

    Args:
        model: The model, in evaluation mode.
        simplified: What `simplify` made of it.
        fp32: The fp32 file that was exported from that; it may be the one in question.
        file: The file in question. fp16 nodes are emulated, and Q/DQ computed as they are written.
        inputs: (N, ...) images, pre-processed, float32; two are enough.
        limit: The scaled error at which they part.
        fed: What the files take, if that is not the images as they are.
    """
    fed = inputs.numpy() if fed is None else fed
    calls = _calls(model, inputs)
    kept = _Values()
    for name, value in _node_values(simplified, inputs).items():
        kept.add(name, value)
    found = _run(fp32, fed)
    theirs = found if file == fp32 else _run(emulate_fp16(file), fed)
    rows = [_row(name, kind, value, kept, found, theirs) for name, kind, value in calls]
    return ModuleDiff(tuple(rows), limit, _output_error(model, file, inputs, theirs))


class _Values:
    """Named arrays, found by their content."""

    def __init__(self) -> None:
        self.arrays: dict[str, _Array] = {}
        self._by_size: dict[int, list[str]] = {}

    def add(self, name: str, value: _Array) -> None:
        if value.dtype.kind == "f" and value.ndim > 1:
            self.arrays[name] = value
            self._by_size.setdefault(value.size, []).append(name)

    def find(self, value: _Array, tolerance: float) -> tuple[str, tuple[int, ...]] | None:
        """Return the first array with a value's numbers, and the value's axes in its order."""
        spread = float(np.ptp(value))
        if not spread > 0:  # a constant is anywhere
            return None
        bound = tolerance * spread
        ends = float(value.min()), float(value.max())
        for name in self._by_size.get(value.size, []):
            array = self.arrays[name]
            near = abs(array.min() - ends[0]) <= bound and abs(array.max() - ends[1]) <= bound
            if not near:
                continue
            for axes in _permutations(value.ndim):
                turned = value.transpose(axes).reshape(array.shape)
                if np.abs(array - turned).max() <= bound:
                    return name, axes
        return None


def _permutations(rank: int) -> Iterator[tuple[int, ...]]:
    """Yield the orders of a value's axes; the batch comes first, the usual order before others."""
    if rank - 1 > _MOST_AXES:
        yield tuple(range(rank))
        return
    for rest in itertools.permutations(range(1, rank)):
        yield (0, *rest)


def _one_by_one(inputs: Tensor) -> list[Tensor]:
    return [inputs[i : i + 1] for i in range(len(inputs))]


def _stacked(values: Sequence[_Array]) -> _Array:
    """Return the values for each image as one array, the images first.

    Each image is run alone, and axes of size 1 are dropped: wherever a model keeps its batch, as
    sequence-first attention does in the second place, the images are found in the first.
    """
    return np.stack([np.squeeze(value) for value in values])


def _node_values(simplified: GraphModule, inputs: Tensor) -> dict[str, _Array]:
    """Run a graph in float64 on each image and return the value of each node."""
    values: dict[str, list[_Array]] = {}
    for image in _one_by_one(inputs):
        evaluate(
            simplified,
            (image,),
            on_value=lambda name, value: values.setdefault(name, []).append(value.numpy().copy()),
        )
    return {name: _stacked(parts) for name, parts in values.items()}


def _calls(model: nn.Module, inputs: Tensor) -> list[tuple[str, str, _Array]]:
    """Run the model in float64 on each image; return each module's name, class and output."""
    frozen, seen = frozen_copy(model), dict[str, int]()
    calls: dict[str, tuple[str, list[_Array]]] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not tensors or not tensors[0].is_floating_point():
                return
            seen[name] = seen.get(name, 0) + 1
            label = name if seen[name] == 1 else f"{name}#{seen[name]}"
            # A copy: the next module may change it in place.
            _, parts = calls.setdefault(label, (type(module).__name__, []))
            parts.append(tensors[0].detach().clone().numpy())

        return record

    for name, module in frozen.named_modules():
        if name:
            module.register_forward_hook(hook(name))
    for image in _one_by_one(inputs):
        seen.clear()
        evaluate(frozen, (image,))
    return [(label, kind, _stacked(parts)) for label, (kind, parts) in calls.items()]


def _run(file: bytes, inputs: NDArray[Any]) -> _Values:
    """Return every float tensor of a file, for all inputs."""
    proto = onnx.load_model_from_string(file)
    types = element_types(proto)
    made = [n for node in proto.graph.node for n in node.output if n]
    names = [name for name in made if types.get(name) == TensorProto.FLOAT]
    runs = [*observe(proto, inputs, names)]
    quantized = _after_quantization(proto)
    values = _Values()
    for name in names:
        values.add(name, _stacked([np.asarray(run[quantized.get(name, name)]) for run in runs]))
    return values


def _after_quantization(proto: onnx.ModelProto) -> dict[str, str]:
    """Return, for a tensor that passes Q/DQ, what comes out.

    For a CPU, ONNX Runtime's quantizer drops a ReLU whose work the range does, and gives its
    name to the tensor before: the module's output is what comes out.
    """
    nodes = proto.graph.node
    given = {node.output[0]: node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    return {
        given[node.input[0]]: node.output[0]
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in given
    }


def _row(
    name: str, kind: str, value: _Array, kept: _Values, found: _Values, theirs: _Values
) -> ModuleRow:
    peak = float(np.abs(value).max()) if value.size else 0.0
    place = found.find(value, _SAME) if value.ndim > 1 else None
    if place is None:
        is_lost = value.ndim > 1 and kept.find(value, _SAME) is not None
        return ModuleRow(name, kind, None, None, peak, is_lost)
    tensor, axes = place
    array = theirs.arrays.get(tensor)
    if array is None or array.size != value.size:
        return ModuleRow(name, kind, None, None, peak, is_lost=False)
    return ModuleRow(name, kind, tensor, _error(array, value.transpose(axes)), peak, is_lost=False)


def _error(actual: _Array, expected: _Array) -> float:
    difference = np.abs(actual - expected.reshape(actual.shape)).max()
    error = float(difference / np.ptp(expected))
    return error if math.isfinite(error) else math.inf


def _output_error(model: nn.Module, file: bytes, inputs: Tensor, theirs: _Values) -> float:
    (output,) = onnx.load_model_from_string(file).graph.output
    frozen = frozen_copy(model)
    expected = _stacked([evaluate(frozen, (image,))[0].numpy() for image in _one_by_one(inputs)])
    return _error(theirs.arrays[output.name], expected)
