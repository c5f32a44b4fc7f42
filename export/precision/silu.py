"""Let ONNX Runtime compute x * sigmoid(x) by one kernel where x comes from integers.

Given   DequantizeLinear -> Sigmoid, Mul
Result  DequantizeLinear -> Flatten -> Sigmoid, Mul -> Reshape

ONNX Runtime 1.32 first gives each reader of a DequantizeLinear one of its own, and then looks for
the SiLUs that it fuses (QuickGeluFusion): the factor and what the Sigmoid reads are no longer the
same tensor, and x is dequantized twice. A node between them keeps it one. Identity is removed
before that, a Reshape is computed in integers and the DequantizeLinear moved behind it; a Flatten
stays, and copies nothing. The values are the same, bit for bit.
Measured: docs/benchmarks.md, EfficientNet-B0.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["join_silus"]


def join_silus(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Rewrite the SiLUs of dequantized tensors, in place; new nodes stand at the end.

    Args:
        graph: With Q/DQ.
        shapes: Of the tensors, from `known_shapes`; a SiLU of another keeps its form.
    """
    makers = {tensor: node for node in graph.node for tensor in node.output}
    reads = Counter(tensor for node in graph.node for tensor in node.input)
    reads.update(value.name for value in graph.output)
    for product in [node for node in graph.node if node.op_type == "Mul"]:
        for x, gate in (product.input, reversed(product.input)):
            dequantize, sigmoid = makers.get(x), makers.get(gate)
            if (
                dequantize is not None
                and dequantize.op_type == "DequantizeLinear"
                and sigmoid is not None
                and sigmoid.op_type == "Sigmoid"
                and sigmoid.input[0] == x
                and reads[gate] == 1
                and product.output[0] in shapes
            ):
                _join(graph, x, sigmoid, product, shapes[product.output[0]])


def _join(
    graph: onnx.GraphProto,
    x: str,
    sigmoid: onnx.NodeProto,
    product: onnx.NodeProto,
    shape: tuple[int, ...],
) -> None:
    output = product.output[0]
    flat, joined, sizes = f"{output}_silu_in", f"{output}_silu_out", f"{output}_silu_shape"
    sigmoid.input[0] = flat
    for i, name in enumerate(product.input):
        if name == x:
            product.input[i] = flat
    product.output[0] = joined
    graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), sizes))
    graph.node.extend(
        [
            helper.make_node("Flatten", [x], [flat], name=f"{product.name}_Flatten"),
            helper.make_node("Reshape", [joined, sizes], [output], name=f"{product.name}_Reshape"),
        ]
    )
