"""Let ONNX Runtime keep channels in blocks between float convolutions on x86.

Given   ReduceMean over rows and columns
        Mul of x (N, C, H, W) and a gate (N, C, 1, 1), read by convolutions
Result  GlobalAveragePool
        Mul of x and Resize(gate), both (N, C, H, W)

ONNX Runtime lays 8 or 16 channels side by side (NCHWc) for its convolutions on x86, activations and
pools included. ReduceMean has no such form, and a product only one for equal shapes: each
squeeze-and-excitation took an image out of its blocks and put it back. A Resize from 1 x 1 by
nearest neighbour has one, from ONNX Runtime 1.25 on, and costs less than that. The numbers that are
multiplied are the same; a mean's sum is of another order. For a batch of any size the shape of the
Resize is written down: else ONNX Runtime does not see that both are equal, and all is slower.

Which convolutions have blocks depends on the CPU: with AVX-512 a block is 16 channels, with AVX2 8.
What is said here holds for both. Where it did not, the Resize would stay plain, and cost more.
Measured: docs/benchmarks.md, squeeze-and-excitation.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["OLDEST_RUNTIME", "keep_blocks"]

OLDEST_RUNTIME = (1, 25)
"""The oldest ONNX Runtime that gains by it; in older ones EfficientNet-B0 takes 1.1 to 1.3 times as
long as without."""

# Seen in ONNX Runtime 1.32; Elu and Softplus have none.
_HAVE_BLOCKS = {
    "AveragePool",
    "Gelu",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "MaxPool",
    "Relu",
    "Sigmoid",
    "Tanh",
}
_ARE_FUSED = {"Clip", "LeakyRelu"}  # have blocks as a part of the convolution before them only
_LARGEST_BLOCK = 16

Shape = tuple[int | str, ...]
Stored = Mapping[str, onnx.TensorProto]


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
    convolved: set[str] = set()  # of which the only reader may become a part
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        (output, *_), reads = node.output, readers.get(node.output[0], [])
        if _is_pool(node, stored) and node.input[0] in blocked:
            node.name, node.op_type = f"{node.name}_GlobalAveragePool", "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
        gate = _gate(node, shapes)
        if gate and blocked.issuperset(node.input) and _want_blocks(reads, stored):
            resize = _resize(graph, gate, shapes[output], node)
            node.input[[*node.input].index(gate)] = resize.output[0]
            nodes.append(resize)
        nodes.append(node)
        if _gives_blocks(node, stored):
            blocked.add(output)
            if len(reads) == 1:
                convolved.add(output)
        elif _keeps_blocks(node, blocked, convolved, shapes):
            blocked.add(output)
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


def _is_pool(node: onnx.NodeProto, stored: Stored) -> bool:
    """Say whether a node is the mean of each channel of four dimensions, and keeps all four."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in stored:
        return False
    axes = sorted(int(axis) % 4 for axis in numpy_helper.to_array(stored[node.input[1]]).flat)
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    return axes == [2, 3] and numbers.get("keepdims", 1) == 1


def _gate(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> str:
    """Return which input of a product is one number for each channel of the other; "" if none.

    Of less than a block of channels none is looked for: who reads those makes no blocks.
    """
    if node.op_type != "Mul" or any(
        len(shapes.get(name, ())) != 4 for name in (*node.input, *node.output)
    ):
        return ""
    first, second = node.input
    for gate, x in ((first, second), (second, first)):
        batch, *sizes = shapes[x]
        channels, *others = (size if isinstance(size, int) else 0 for size in sizes)
        is_gate = shapes[gate] == (batch, channels, 1, 1) and others != [1, 1]
        if is_gate and channels >= _LARGEST_BLOCK and all(others):
            return str(gate)
    return ""


def _gives_blocks(node: onnx.NodeProto, stored: Stored) -> bool:
    """Say whether a node is a float convolution with blocks, whatever their size."""
    if node.op_type != "Conv" or not stored.keys() >= {*node.input[1:]}:
        return False
    outputs, inputs, *kernel = stored[node.input[1]].dims
    groups = {attribute.name: attribute.i for attribute in node.attribute}.get("group", 1)
    if groups == 1:
        is_blocked = inputs < 8 or inputs % 4 == 0
    else:
        is_blocked = inputs == 1 and groups == outputs and groups % 4 == 0
    return is_blocked and len(kernel) == 2


def _want_blocks(reads: Sequence[onnx.NodeProto | None], stored: Stored) -> bool:
    """Say whether all readers are convolutions with blocks."""
    return bool(reads) and all(node is not None and _gives_blocks(node, stored) for node in reads)


def _keeps_blocks(
    node: onnx.NodeProto, blocked: set[str], convolved: set[str], shapes: Mapping[str, Shape]
) -> bool:
    if len(node.output) > 1:
        return False
    if node.op_type in _ARE_FUSED:
        return node.input[0] in convolved
    if node.op_type in _HAVE_BLOCKS:
        return node.input[0] in blocked
    if node.op_type in ("Add", "Mul"):
        first, second = (shapes.get(name) for name in node.input)
        return first is not None and first == second and blocked.issuperset(node.input)
    return False


def _resize(
    graph: onnx.GraphProto, gate: str, shape: Shape, product: onnx.NodeProto
) -> onnx.NodeProto:
    """Return what gives a gate the shape of what it multiplies."""
    name, scales = f"{product.output[0]}/gate", f"{product.output[0]}/scales"
    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, *shape[2:]], "f"), scales))
    graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return helper.make_node(
        "Resize",
        [gate, "", scales],
        [name],
        name=f"{product.name}_Resize",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
