"""Keep ONNX Runtime from turning an integer product and its bias into a float one.

Given   DequantizeLinear -> MatMul, of three dimensions or more -> Add, a bias of shape (N,)
Result  the same, with a bias of shape (1, 1, N)

ONNX Runtime 1.32 first fuses a MatMul of known size and the sum with a vector into Reshape, Gemm,
Reshape (MatMulAddFusion), and looks for integer products afterwards. The Reshape then stands
between the DequantizeLinear and its reader: the weights are dequantized anew at every run, and
multiplied in float. With the bias as (1, 1, N) nothing is fused, and the MatMul becomes
MatMulIntegerToFloat.
Measured, one thread: ViT-Ti and ConvNeXt-T in int8 took 1.4 and 1.6 times as long as in fp32.
"""

from collections.abc import Collection, Mapping

import onnx

__all__ = ["part_biases"]

_SUFFIX = "_row"


def part_biases(graph: onnx.GraphProto, ranks: Mapping[str, int], chosen: Collection[str]) -> None:
    """Reshape the biases of quantized products, in place; other readers keep theirs.

    Args:
        graph: With Q/DQ.
        ranks: Numbers of dimensions, by the tensor's name; of those whose size is known.
        chosen: Names of the quantized layers.
    """
    makers = {tensor: node for node in graph.node for tensor in node.output}
    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    made: set[str] = set()
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for i, (product, bias) in enumerate((node.input, reversed(node.input))):
            maker = makers.get(product)
            is_product = maker is not None and maker.op_type == "MatMul" and maker.name in chosen
            if is_product and bias in vectors and ranks.get(product, 0) > 2:
                if bias not in made:
                    made.add(bias)
                    graph.initializer.append(_row(vectors[bias]))
                node.input[1 - i] = bias + _SUFFIX


def _row(vector: onnx.TensorProto) -> onnx.TensorProto:
    row = onnx.TensorProto()
    row.CopyFrom(vector)
    row.name = vector.name + _SUFFIX
    del row.dims[:]
    row.dims.extend([1, 1, vector.dims[0]])
    return row
