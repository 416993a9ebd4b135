"""Rules on operators, opset and types: what TensorRT's parser accepts, and what strong typing requires.

The table of operators is that of onnx-tensorrt's `docs/operators.md` for TensorRT 10.15, with the addition of 11.0
(Swish). An operator that is not listed is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from export.tensorrt.view import TYPE_NAMES, Finding, GraphView, attribute

OPSETS = (9, 24)
"""First and last opset of ai.onnx that the parsers of TensorRT 10.15 to 11.2 support."""

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

STANDARD = ("", "ai.onnx")
OUTPUT_TYPES = frozenset({"FP32", "FP16", "BF16", "INT32", "INT64", "UINT8", "BOOL"})
"""Types allowed for a network's outputs: the quantised types exist only between Q and DQ nodes."""


def check_domains(view: GraphView) -> Iterator[Finding]:
    """Find operators outside ai.onnx.

    The parser looks them up by name only: it would take `com.microsoft.Gelu` for ONNX's Gelu, and most others fail as
    a missing plugin.
    """
    for node in view.nodes:
        if node.domain not in STANDARD:
            problem = f"its domain is {node.domain}; TensorRT accepts ai.onnx only. Export without fusing operators"
            yield view.label(node), problem
    for function in view.proto.functions:
        yield f"function {function.name}", "local functions are not supported"


def check_opset(view: GraphView) -> Iterator[Finding]:
    """Find an opset outside the parser's range."""
    first, last = OPSETS
    if not first <= view.opset <= last:
        yield "graph", f"its opset is {view.opset}; TensorRT accepts {first} to {last}"


def check_operators(view: GraphView) -> Iterator[Finding]:
    """Find operators that the parser does not have, types that they do not accept, and outputs of unknown size."""
    for node in view.nodes:
        if node.domain not in STANDARD:
            continue  # reported by `check_domains`
        label, operator = view.label(node), node.op_type
        if operator not in SUPPORTED or operator in DATA_DEPENDENT:
            reason = WHY_NOT.get(operator)
            why = f": {reason}" if reason else ""
            yield label, f"TensorRT cannot use {operator} here{why}"
            continue
        # A scale or zero point follows the quantised value; the rules of quantisation check them.
        quantizes = operator in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[:1] if quantizes else [*node.input, *node.output]:
            kind = _kind(view, name)
            if kind is not None and kind in CHECKED_TYPES and kind not in SUPPORTED[operator]:
                known = ", ".join(sorted(SUPPORTED[operator]))
                yield label, f"{name} is {kind}; {operator} accepts {known}"
        if operator in ("LayerNormalization", "Attention") and len([name for name in node.output if name]) > 1:
            yield label, "only its first output is supported"
    for value in view.proto.graph.output:
        kind = _kind(view, value.name)
        if kind is not None and kind not in OUTPUT_TYPES:
            yield "graph", f"its output {value.name} is {kind}: cast it to FP32 or FP16"


def check_types(view: GraphView) -> Iterator[Finding]:
    """Find nodes whose inputs have different types: a strongly typed network does not cast implicitly."""
    for name, kind in view.types.items():
        if kind not in TYPE_NAMES and (name in view.constants or name in view.inputs):
            yield "graph", f"{name} is {_type_name(kind)}, a type that TensorRT does not have"
    for node in view.nodes:
        if node.domain in STANDARD:
            yield from _agree(view, node)


def _agree(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    """Bind the operator's type parameters to its inputs' types, then fill in unknown output types."""
    try:
        schema = onnx.defs.get_schema(node.op_type, view.opset)
    except onnx.defs.SchemaError:
        return  # reported by `check_operators`
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    bound: dict[str, str] = {}  # the first input of each type parameter
    for name, formal in zip(node.input, _formals(schema.inputs, len(node.input)), strict=True):
        if not name or name not in view.types or not formal.is_homogeneous:
            continue
        found, first = _tensor_type(view, name), bound.setdefault(formal.type_str, name)
        if found not in allowed.get(formal.type_str, {formal.type_str}):
            yield view.label(node), f"{name} is {found}, which {node.op_type} does not accept"
        elif found != _tensor_type(view, first):
            problem = f"{name} is {found} beside {first}, which is {_tensor_type(view, first)}: cast one of them"
            yield view.label(node), problem
    for name, formal in zip(node.output, _formals(schema.outputs, len(node.output)), strict=True):
        if name and name not in view.types:  # type inference stops at a breach; the nodes after it are still checked
            kind = attribute(node, "to") if node.op_type == "Cast" else view.types.get(bound.get(formal.type_str, ""))
            view.types |= {} if kind is None else {name: kind}


def _formals(formals: Sequence[Any], count: int) -> list[Any]:
    """Return the formal parameter of each actual one: the last may stand for several."""
    return [formals[min(i, len(formals) - 1)] for i in range(count)]


def _tensor_type(view: GraphView, name: str) -> str:
    """Return a value's type as ONNX writes it, such as "tensor(float)"."""
    return f"tensor({_type_name(view.types[name]).lower()})"


def _kind(view: GraphView, name: str) -> str | None:
    """Return TensorRT's name of a value's type, ONNX's name where it has none, and None where it is unknown."""
    kind = view.types.get(name)
    return None if kind is None else TYPE_NAMES.get(kind, _type_name(kind))


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))
