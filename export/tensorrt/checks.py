"""Check a graph against TensorRT's rules without a GPU; every breach names its node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from onnx import TensorProto

from export.tensorrt.number_rules import check_constants, check_masks, check_quantization, check_sums, quantized_type
from export.tensorrt.operator_rules import check_domains, check_operators, check_opset, check_types
from export.tensorrt.view import Finding, GraphView
from mirror_runtime.bundle import Precision

RULES: Mapping[str, Callable[[GraphView], Iterator[Finding]]] = {
    "domain": check_domains,
    "opset": check_opset,
    "types": check_types,
    "operator": check_operators,
    "constants": check_constants,
    "sums": check_sums,
    "quantization": check_quantization,
    "masks": check_masks,
}


def breaches(view: GraphView) -> list[str]:
    """Return every breach of every rule; empty for a graph that TensorRT should accept."""
    return [f"{node}: {problem} [{rule}]" for rule, check in RULES.items() for node, problem in check(view)]


def graph_precision(view: GraphView) -> Precision:
    """Return the precision in which a strongly typed engine of this graph computes its matrix products.

    A graph with quantised weights or activations is int8 or fp8, whatever the types of its other operators.
    """
    quantized = {quantized_type(view, node) for node in view.nodes if node.op_type == "DequantizeLinear"}
    if TensorProto.FLOAT8E4M3FN in quantized:
        return Precision.FP8
    if quantized:
        return Precision.INT8
    products = Counter(view.types.get(node.input[0]) for node in view.nodes if node.op_type in ("MatMul", "Gemm"))
    precisions: dict[int, Precision] = {TensorProto.FLOAT16: Precision.FP16, TensorProto.BFLOAT16: Precision.BF16}
    most = products.most_common(1)
    return precisions.get(most[0][0] or 0, Precision.FP32) if most else Precision.FP32
