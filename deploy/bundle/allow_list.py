"""The operators that a bundle's model may be made of, and the bounds of their attributes.

One table for both ends: the export refuses to write, and the device to load, anything else. Each is
an operator of ONNX's own domain that computes tensors from tensors. Left out are control flow,
functions, sequences, strings, random numbers, signals, losses, and operators whose result has a
size that only its values tell (NonZero, Unique, NonMaxSuppression): it could not be bounded.
BatchNormalization and Dropout are what the export removes. EPContext, which can carry an engine, is
of another domain.

The inputs are those of every opset from 17 to 23 together: `x` must be there, `?` may be missing or
empty, `*` is any number of others, none empty. ONNX's checker lets `Min(x, "")` pass, and ONNX
Runtime crashes on it.
"""

from collections.abc import Mapping

__all__ = ["BOUNDS", "ELEMENT_BYTES", "MAX_DIM", "MAX_RANK", "OPERATORS", "OPSETS"]

OPSETS = range(17, 24)

_BY_INPUTS = {
    "": "Constant",
    "x": """
        Abs Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BitwiseNot Cast Ceil Celu
        ConstantOfShape Cos Cosh DepthToSpace Det DynamicQuantizeLinear Elu Erf Exp EyeLike Flatten
        Floor Gelu GlobalAveragePool GlobalLpPool GlobalMaxPool HardSigmoid HardSwish Hardmax
        Identity IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization LpPool MaxPool
        MeanVarianceNormalization Mish Neg Not Reciprocal Relu Round Selu Shape Shrink Sigmoid Sign
        Sin Sinh Size Softmax Softplus Softsign SpaceToDepth Sqrt Tan Tanh ThresholdedRelu
        Transpose""",
    "x*": "Concat Einsum Max Mean Min Sum",
    "x?": """
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Split Squeeze Trilu""",
    "x??": "Clip",
    "x???": "Resize",
    "xx": """
        Add AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CenterCropPad CumSum
        Div Equal Expand Gather GatherElements GatherND Greater GreaterOrEqual GridSample Less
        LessOrEqual MatMul Mod Mul Or PRelu Pow RMSNormalization Reshape ReverseSequence Sub Tile
        TopK Unsqueeze Xor""",
    "xx?": "Conv ConvTranspose DequantizeLinear Gemm LayerNormalization QuantizeLinear",
    "xx??": "ConvInteger MatMulInteger Pad",
    "xxx": """
        Col2Im GroupNormalization InstanceNormalization OneHot Range RoiAlign ScatterElements
        ScatterND Where""",
    "xxx?": "RotaryEmbedding",
    "xxx??": "DeformConv Slice",
    "xxx???": "Attention GRU RNN",
    "xxx?????": "LSTM",
    "xxxxxxxx": "QLinearMatMul",
    "xxxxxxxx?": "QLinearConv",
}
OPERATORS: Mapping[str, str] = {
    name: inputs for inputs, names in _BY_INPUTS.items() for name in names.split()
}
"""The inputs of each operator."""

MAX_RANK = 8
MAX_DIM = 1 << 28

BOUNDS: Mapping[str, tuple[int, int]] = {
    "axes": (-MAX_RANK, MAX_RANK),
    "axis": (-MAX_RANK, MAX_RANK),
    "batch_axis": (0, MAX_RANK),
    "batch_dims": (0, MAX_RANK),
    "blocksize": (1, 256),
    "dilations": (1, 4096),
    "group": (1, 65_536),
    "hidden_size": (1, 65_536),
    "kernel_shape": (1, 4096),
    "kv_num_heads": (1, 4096),
    "num_groups": (1, 65_536),
    "num_heads": (1, 4096),
    "num_outputs": (1, 4096),
    "offset_group": (1, 65_536),
    "output_height": (1, 4096),
    "output_padding": (0, 4096),
    "output_shape": (1, 65_536),
    "output_width": (1, 4096),
    "pads": (0, 65_536),
    "perm": (0, MAX_RANK - 1),
    "q_num_heads": (1, 4096),
    "rotary_embedding_dim": (0, 65_536),
    "sampling_ratio": (0, 64),
    "size": (1, 4096),
    "strides": (1, 4096),
    "time_axis": (0, 1),
}
"""The least and largest value of attributes that decide over memory, time or an address."""

ELEMENT_BYTES: Mapping[int, int] = {
    1: 4,  # float32
    2: 1,  # uint8
    3: 1,  # int8
    4: 2,  # uint16
    5: 2,  # int16
    6: 4,  # int32
    7: 8,  # int64
    9: 1,  # bool
    10: 2,  # float16
    11: 8,  # float64
    12: 4,  # uint32
    13: 8,  # uint64
}
"""The element types that a tensor may have, by ONNX's number. Text is none of them."""
