"""Which layers gain nothing from int8 on a CPU: those whose matrix product is small.

A layer multiplies a matrix of (output channels, inputs of one output) by each position, group by
group. An integer kernel needs many rows and columns to be ahead of the float one by more than
quantizing its input and dequantizing its output cost. A depthwise convolution has one row a group,
the narrow pointwise ones of a mobile network 16 to 40 rows or columns. In float they also keep the
digits that they would lose: such layers are the most sensitive ones.

Measured, one thread of an AVX512-VNNI CPU, batch 1, with all layers in int8 and with those of 48 or
more: docs/benchmarks.md.
"""

import math

import onnx

from export.precision.quantize import layers_of

__all__ = ["small_layers"]


def small_layers(model: bytes, least: int) -> dict[str, str]:
    """Return the layers to be left in float, each with the reason.

    Args:
        model: A simplified float32 ONNX file.
        least: Rows and columns of the product from which int8 pays; 0 leaves none in float.

    Returns:
        Names as `layers_of` has them. Nothing if all are small: a choice between int8 and float is
        then that of the whole model, and its time is compared with fp32's.
    """
    graph = onnx.load_model_from_string(model).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    names = layers_of(model)
    found = {}
    for name in names:
        rows, columns = _product(nodes[name], shapes[nodes[name].input[1]])
        if min(rows, columns) < least:
            found[name] = f"a product of {rows} x {columns}: int8 pays from {least} x {least}"
    return found if len(found) < len(names) else {}


def _product(node: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the outputs of a group, and the inputs of one output."""
    numbers = {each.name: each.i for each in node.attribute}
    if node.op_type == "Conv":
        return shape[0] // numbers.get("group", 1), math.prod(shape[1:])
    return (shape[0], shape[1]) if numbers.get("transB") else (shape[1], shape[0])
