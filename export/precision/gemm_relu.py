"""Keep ONNX Runtime from joining an integer product and the ReLU behind it in float.

Given   DequantizeLinear -> Gemm -> Relu, read by nothing else
Result  DequantizeLinear -> Gemm -> Flatten -> Relu

ONNX Runtime 1.32 first makes one FusedGemm of the two, and looks for integer products afterwards:
the weights are dequantized anew at every run, and multiplied in float. A Flatten of two dimensions
copies nothing, and stays. Other activations were seen not to be joined. A Relu that the next
integer layer reads is left alone: it becomes a part of that layer's QuantizeLinear before.
Measured: docs/benchmarks.md, VGG-11.
"""

from collections.abc import Collection

import onnx
from onnx import helper

__all__ = ["part_relus"]


def part_relus(graph: onnx.GraphProto, chosen: Collection[str]) -> None:
    """Put a Flatten before the ReLUs of quantized Gemms, in place; it stands at the end.

    Args:
        graph: With Q/DQ.
        chosen: Names of the quantized layers.
    """
    makers = {tensor: node for node in graph.node for tensor in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node.op_type)
    for node in [node for node in graph.node if node.op_type == "Relu"]:
        product, maker = node.input[0], makers.get(node.input[0])
        if maker is None or maker.op_type != "Gemm" or maker.name not in chosen:
            continue
        is_quantized = readers.get(node.output[0]) == ["QuantizeLinear"]
        if len(readers[product]) == 1 and not is_quantized:
            flat, name = f"{product}_flat", f"{node.name}_Flatten"
            graph.node.append(helper.make_node("Flatten", [product], [flat], name=name))
            node.input[0] = flat
