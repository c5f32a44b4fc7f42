"""What onnx's checker lets pass in a file: empty inputs, shapes that nobody knows, sheer size.

`Min(x, "")` passes the checker and crashes ONNX Runtime. So each input and output is held against
its operator's schema: empty only where that says optional. Then shapes are inferred strictly, at
the largest batch: each must be known, and what is alive at once may take 1 GiB. The weights' values
are left out, as inference reads only the small tensors that are shapes.

The device's own checks, which need no schema, are in `deploy/bundle/onnx_structure.py`.
"""

import math
from collections.abc import Iterator

import onnx

from deploy.bundle.allow_list import ELEMENT_BYTES

__all__ = ["MAX_ACTIVATION_BYTES", "peak_activation_bytes", "schema_problems"]

MAX_ACTIVATION_BYTES = 1 << 30

_MAX_READ = 4096  # elements of a stored tensor whose values shape inference may want


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
    inferred = onnx.shape_inference.infer_shapes(
        light, check_type=True, strict_mode=True, data_prop=True
    ).graph
    stored = {tensor.name for tensor in proto.graph.initializer}
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    return {value.name: _size_bytes(value) for value in values if value.name not in stored}


def _size_bytes(value: onnx.ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    count = math.prod(int(d.dim_value) for d in kind.shape.dim)
    return count * ELEMENT_BYTES.get(int(kind.elem_type), 16)
