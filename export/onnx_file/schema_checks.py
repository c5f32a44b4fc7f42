"""What onnx's checker lets pass in a file: empty inputs, shapes that nobody knows, sheer size.

`Min(x, "")` passes the checker and crashes ONNX Runtime. So each input and output is held against
its operator's schema: empty only where that says optional. Then shapes are inferred strictly, at
the largest batch: each must be known, and what is alive at once may take 1 GiB. The weights' values
are left out, as inference reads only the small tensors that are shapes.

The device's own checks, which need no schema, are in `deploy/bundle/onnx_structure.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from deploy.bundle.allow_list import ELEMENT_BYTES

__all__ = ["MAX_ACTIVATION_BYTES", "peak_activation_bytes", "schema_problems"]

MAX_ACTIVATION_BYTES = 1 << 30

_MAX_READ = 4096  # elements of a stored tensor whose values shape inference may want
_SHAPE_ARITHMETIC = """
    Add Cast Concat Div Gather Mul Range Reshape Slice Squeeze Sub Unsqueeze
"""


def schema_problems(proto: onnx.ModelProto, *, max_batch: int) -> list[str]:
    """Say what is wrong with a model of a single opset.

    Args:
        proto: The model, which the checker has accepted.
        max_batch: The largest batch that it is for.
    """
    version = proto.opset_import[0].version
    broken = [text for node in proto.graph.node for text in _node_problems(node, version)]
    if broken:
        return broken
    try:
        shapes = _infer(proto, max_batch)
    except onnx.shape_inference.InferenceError as error:
        return [f"shapes that contradict each other: {' '.join(str(error).split())[:300]}"]
    outputs = [name for node in proto.graph.node for name in node.output if name]
    unknown = [name for name in outputs if shapes.get(name) is None]
    if unknown:
        return [f"tensors of unknown shape: {', '.join(unknown[:5])}"]
    sizes = {name: size for name, size in shapes.items() if size is not None}
    peak = peak_activation_bytes(proto.graph, sizes)
    if peak > MAX_ACTIVATION_BYTES:
        return [
            f"{peak / 2**20:.0f} MiB of activations at once in a batch of {max_batch}, over "
            f"{MAX_ACTIVATION_BYTES >> 20} MiB: set a smaller --max-batch or image size"
        ]
    return []


def peak_activation_bytes(graph: onnx.GraphProto, sizes: dict[str, int]) -> int:
    """Return the most bytes that are alive at once, each tensor from its maker to its last reader.

    Args:
        graph: Sorted nodes.
        sizes: Bytes of each tensor that is made; what is missing counts nothing.
    """
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = sum(sizes.get(value.name, 0) for value in graph.input)
    peak = alive
    for i, node in enumerate(graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, alive)
        done = {name for name in (*node.input, *node.output) if last.get(name, i) == i}
        alive -= sum(sizes.get(name, 0) for name in done)
    return peak


def _node_problems(node: onnx.NodeProto, version: int) -> Iterator[str]:
    what = f"{node.name} ({node.op_type})"
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        yield f"{what} is no operator of opset {version}"
        return
    if schema.deprecated:
        yield f"{what} is deprecated in opset {version}"
    for kind, names, formal, most in (
        ("input", node.input, schema.inputs, schema.max_input),
        ("output", node.output, schema.outputs, schema.max_output),
    ):
        if len(names) > most:
            yield f"{what} has {len(names)} {kind}s, of at most {most}"
            continue
        for i in range(max(len(names), len(formal))):
            option = formal[min(i, len(formal) - 1)].option
            is_there = i < len(names) and names[i] != ""
            is_optional = option == onnx.defs.OpSchema.FormalParameterOption.Optional
            is_end = option == onnx.defs.OpSchema.FormalParameterOption.Variadic and i >= len(names)
            if not is_there and not is_optional and not (is_end and i > 0):
                yield f"{what} lacks its {kind} {i}"


def _infer(proto: onnx.ModelProto, max_batch: int) -> dict[str, int | None]:
    """Return the bytes of each tensor that is made; None where a dimension is not known."""
    light = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = max_batch
    for value in proto.graph.output:
        graph.output.append(onnx.ValueInfoProto(name=value.name))
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= _MAX_READ:
            graph.initializer.append(tensor)
        else:
            stand_in = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, tensor.dims
            )
            graph.input.append(stand_in)
    while True:
        inferred = onnx.shape_inference.infer_shapes(
            light, check_type=True, strict_mode=True, data_prop=True
        ).graph
        values = {v.name: v for v in (*inferred.input, *inferred.output, *inferred.value_info)}
        if not _fold(graph, values):
            break
    stored = {tensor.name for tensor in proto.graph.initializer}
    sizes = {name: _size_bytes(value) for name, value in values.items() if name not in stored}
    folded = [tensor for tensor in graph.initializer if tensor.name not in stored]
    return sizes | {tensor.name: len(tensor.raw_data) for tensor in folded}


def _fold(graph: onnx.GraphProto, values: dict[str, onnx.ValueInfoProto]) -> bool:
    """Compute what of a graph is arithmetic on shapes; say whether anything was left to compute.

    Shape inference follows the values of shapes through most operators, but not to a Range, as
    torch writes it for a strided view of a batch.
    """
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept, before = [], len(known)
    for node in graph.node:
        found = _compute(node, known, values)
        if found is None:
            kept.append(node)
            continue
        known[node.output[0]] = found
        graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    return len(known) > before


def _compute(
    node: onnx.NodeProto,
    known: dict[str, NDArray[Any]],
    values: dict[str, onnx.ValueInfoProto],
) -> NDArray[Any] | None:
    """Return a node's only output if it is small and follows from shapes; else None."""
    if node.op_type == "Shape" and node.input[0] in values:
        kind = values[node.input[0]].type.tensor_type
        dims = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
        is_known = kind.HasField("shape") and len(dims) == len(kind.shape.dim)
        bounds = {a.name: a.i for a in node.attribute}
        whole = np.array(dims, np.int64)
        return whole[bounds.get("start", 0) : bounds.get("end")] if is_known else None
    if node.op_type not in _SHAPE_ARITHMETIC.split() or not all(
        n in known for n in node.input if n
    ):
        return None
    if node.op_type == "Range" and _range_length(*(known[n] for n in node.input)) > _MAX_READ:
        return None
    try:
        (found,) = ReferenceEvaluator(node).run(None, {n: known[n] for n in node.input if n})
    except (IndexError, ValueError):  # inference says what is wrong with it
        return None
    array = np.asarray(found)
    return array if array.size <= _MAX_READ else None


def _range_length(start: Any, limit: Any, delta: Any) -> float:
    return abs(float(limit - start) / float(delta)) if delta else math.inf


def _size_bytes(value: onnx.ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    count = math.prod(int(d.dim_value) for d in kind.shape.dim)
    return count * ELEMENT_BYTES.get(int(kind.elem_type), 16)
