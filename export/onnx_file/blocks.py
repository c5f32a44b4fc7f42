"""Let ONNX Runtime keep channels in blocks between float convolutions on x86.

Given   ReduceMean over rows and columns
        Mul of x (N, C, H, W) and a gate (N, C, 1, 1), read by convolutions
Result  GlobalAveragePool
        Mul of x and Resize(gate), both (N, C, H, W)

ONNX Runtime lays 8 or 16 channels side by side (NCHWc) for its convolutions on x86, activations and
pools included. ReduceMean has no such form, and a product only one for equal shapes: each
squeeze-and-excitation took an image out of its blocks and put it back. A Resize from 1 x 1 by
nearest neighbour has one, and costs less than that. The product is the same, bit for bit; a mean's
sum is of another order. For a batch of any size, the shape of the Resize is written down: without
that ONNX Runtime 1.32 does not see that both are equal, and all would be slower than before.
Measured: docs/benchmarks.md, squeeze-and-excitation.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["keep_blocks"]

# Which keep blocks in ONNX Runtime 1.32; Elu and Softplus were seen not to.
_UNARY = {
    "AveragePool",
    "Clip",
    "Gelu",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Sigmoid",
    "Tanh",
}

Shape = tuple[int | str, ...]


def keep_blocks(model: bytes) -> bytes:
    """Return a model in which squeeze-and-excitations between float convolutions stay in blocks.

    Args:
        model: An ONNX file of opset 18 or newer, float32 or with Q/DQ. What it computes in
            integers is left alone: that has no blocks.
    """
    proto = onnx.load_model_from_string(model)
    graph = proto.graph
    shapes = _shapes(onnx.shape_inference.infer_shapes(proto).graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers = _readers(graph)
    blocked: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if _is_pool(node, stored) and node.input[0] in blocked:
            _rename(node, "GlobalAveragePool")
            del node.input[1:], node.attribute[:]
        gate = _gate(node, shapes)
        if gate and blocked.issuperset(node.input) and _feeds_convolutions(node, readers, stored):
            resize = _resize(graph, gate, shapes[node.output[0]], node)
            nodes.append(resize)
            node.input[[*node.input].index(gate)] = resize.output[0]
            shapes[resize.output[0]] = shapes[node.output[0]]
            blocked.update(resize.output)
        nodes.append(node)
        if _keeps_blocks(node, blocked, shapes, stored):
            blocked.update(node.output)
    graph.ClearField("node")
    graph.node.extend(nodes)
    return bytes(proto.SerializeToString(deterministic=True))


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Return the shapes that are known, a free size by its name."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        shape = tuple(dim.dim_param or dim.dim_value for dim in dims)
        if all(shape):
            found[value.name] = shape
    return found


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto | None]]:
    """Return who reads each tensor; None is the caller."""
    readers: dict[str, list[onnx.NodeProto | None]] = {v.name: [None] for v in graph.output}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    return readers


def _is_pool(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Say whether a node is the mean of each channel of four dimensions, and keeps all four."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in stored:
        return False
    axes = sorted(int(axis) % 4 for axis in numpy_helper.to_array(stored[node.input[1]]).flat)
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    return axes == [2, 3] and numbers.get("keepdims", 1) == 1


def _gate(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> str:
    """Return which input of a product is one number for each channel of the other; "" if none."""
    if node.op_type != "Mul" or any(
        len(shapes.get(name, ())) != 4 for name in (*node.input, *node.output)
    ):
        return ""
    first, second = node.input
    for gate, x in ((first, second), (second, first)):
        batch, *sizes = shapes[x]
        is_gate = shapes[gate] == (batch, sizes[0], 1, 1) and sizes[1:] != [1, 1]
        if is_gate and all(isinstance(size, int) for size in sizes):
            return str(gate)
    return ""


def _feeds_convolutions(
    node: onnx.NodeProto,
    readers: Mapping[str, Sequence[onnx.NodeProto | None]],
    stored: Mapping[str, onnx.TensorProto],
) -> bool:
    reads = readers.get(node.output[0], [])
    return all(reader is not None and _is_blocked(reader, stored) for reader in reads)


def _is_blocked(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Say whether a node is a float convolution, of one group or of each channel alone."""
    if node.op_type != "Conv" or node.input[1] not in stored:
        return False
    outputs, inputs, *kernel = stored[node.input[1]].dims
    groups = {attribute.name: attribute.i for attribute in node.attribute}.get("group", 1)
    return len(kernel) == 2 and (groups == 1 or (inputs == 1 and groups == outputs))


def _keeps_blocks(
    node: onnx.NodeProto,
    blocked: set[str],
    shapes: Mapping[str, Shape],
    stored: Mapping[str, onnx.TensorProto],
) -> bool:
    if node.op_type in _UNARY:
        return node.input[0] in blocked
    if node.op_type in ("Add", "Mul"):
        return blocked.issuperset(node.input) and len({shapes.get(x) for x in node.input}) == 1
    return _is_blocked(node, stored)


def _resize(
    graph: onnx.GraphProto, gate: str, wide: Shape, product: onnx.NodeProto
) -> onnx.NodeProto:
    """Return what gives a gate the shape of what it multiplies."""
    name, scales = f"{product.output[0]}_gate", f"{product.output[0]}_scales"
    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, *wide[2:]], "f"), scales))
    graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, wide))
    node = helper.make_node(
        "Resize",
        [gate, "", scales],
        [name],
        name=product.name,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    _rename(node, "Resize")
    return node


def _rename(node: onnx.NodeProto, operator: str) -> None:
    """Give a node an operator, and its name, MODULE/OPERATOR, too."""
    node.name = f"{node.name}_{operator}"
    node.op_type = operator
