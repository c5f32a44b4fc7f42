"""The ONNX operators that each TensorRT reads.

NVIDIA's parser decides by the operator's name, and TensorRT-RTX, which judges an export, is newer
than what runs on most boards: what it accepts, TensorRT 8.6 may not know. So the lists are ours.

Source: the support matrix docs/operators.md of onnx-tensorrt at its releases 8.6-GA and 10.1-GA,
every operator marked as supported. 10.1 is the newest that we have read: later releases add
operators (and take none away), so for those boards the list is on the safe side.
"""

__all__ = ["TENSORRT_8_6", "TENSORRT_10_1"]

_COMMON = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements
    ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor
"""

TENSORRT_8_6 = frozenset(_COMMON.split())
TENSORRT_10_1 = TENSORRT_8_6 | {"CastLike", "DeformConv", "Gelu", "Hardmax", "Mish"}
