"""The ONNX operators and types that TensorRT's parser accepts, from onnx-tensorrt's `docs/operators.md`, as data.

The table of TensorRT 10.15, with the addition of 11.0 (Swish). An operator that is not listed is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import TensorProto

OPSETS = (9, 24)
"""First and last opset of ai.onnx that the parsers of TensorRT 10.15 to 11.2 support."""

TYPE_NAMES: Mapping[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.INT8: "INT8",
    TensorProto.INT4: "INT4",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
"""TensorRT's names of the element types that it has; every other type is a breach."""

CHECKED_TYPES = frozenset({"FP32", "FP16", "BF16", "FP8", "FP4", "INT8", "INT4", "UINT8"})
"""Types that are checked: the table is incomplete for indices, shapes and conditions."""

_FLOAT = "FP32 FP16 BF16"
_NUMBER = "FP32 FP16 BF16 INT32 INT64"
_ANY = "FP32 FP16 BF16 INT32 INT64 BOOL"

_BY_TYPES: Mapping[str, str] = {
    "BOOL": "And Not Or Xor",
    "FP32": "STFT",
    "FP32 FP16": """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign
    """,
    _FLOAT: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
        CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization
        GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log
        LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu
        QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization
        RNN RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh
        ThresholdedRelu Upsample
    """,
    _NUMBER: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg
        Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TensorScatter TopK
    """,
    _ANY: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence
        Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    _FLOAT + " INT8 FP8": "Attention",
    _FLOAT + " INT8 INT32 INT64": "Gelu",
    _FLOAT + " FP8 INT32 INT64": "Mean",
    _ANY + " UINT8": "Cast CastLike",
    _ANY + " INT8 FP8 FP4 INT4": "Constant ConstantOfShape",
    "INT8 FP8 FP4 INT4": "DequantizeLinear",
}

SUPPORTED: Mapping[str, frozenset[str]] = {
    operator: frozenset(types.split()) for types, operators in _BY_TYPES.items() for operator in operators.split()
}
"""The types that each supported operator accepts."""

WHY_NOT: Mapping[str, str] = {
    "DynamicQuantizeLinear": "scales computed at run time (ONNX Runtime's dynamic int8); export static QDQ int8",
    "MatMulInteger": "ONNX Runtime's dynamic int8; export static QDQ int8",
    "ConvInteger": "ONNX Runtime's dynamic int8; export static QDQ int8",
    "QLinearMatMul": "the QOperator format; export static QDQ int8",
    "QLinearConv": "the QOperator format; export static QDQ int8",
    "NonZero": "its output's shape depends on the data, which CUDA graphs do not support",
}
"""Operators found in graphs for other engines, with the remedy."""

DATA_DEPENDENT = frozenset({"NonZero", "NonMaxSuppression"})
"""Supported by the parser, but treated as breaches: see `WHY_NOT`."""
