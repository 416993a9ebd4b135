"""What can be checked of a graph for TensorRT without a GPU, rule by rule, each breach named by its node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onnx import TensorProto

from export.tensorrt.number_rules import check_constants, check_masks, check_sums
from export.tensorrt.quantization_rules import check_quantization, quantized_type
from export.tensorrt.typing_rules import check_domains, check_operators, check_opset, check_types
from export.tensorrt.view import Breach, GraphView
from mirror_runtime.bundle import Precision
from mirror_runtime.errors import EngineError

RULES: tuple[Callable[[GraphView], Iterator[Breach]], ...] = (
    check_domains,
    check_opset,
    check_types,
    check_operators,
    check_constants,
    check_sums,
    check_quantization,
    check_masks,
)

SHOWN = 5
"""Breaches spelled out in an error message; the rest is counted."""


def breaches(view: GraphView) -> tuple[Breach, ...]:
    """Hold a graph against every rule.

    Returns:
        What breaks which rule where; empty for a graph that TensorRT should take.
    """
    return tuple(breach for rule in RULES for breach in rule(view))


def require_clean(view: GraphView, path: Path) -> None:
    """Refuse a graph where it breaks a rule.

    Args:
        view: the graph.
        path: its file, for the message.

    Raises:
        EngineError: naming the first breaches with their nodes.
    """
    found = breaches(view)
    if found:
        shown = "; ".join(map(str, found[:SHOWN])) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise EngineError(f"{path.name} is not fit for TensorRT: {shown}")


def graph_precision(view: GraphView) -> Precision:
    """Say what a strongly typed engine of this graph computes its matrix products in: what the file itself holds.

    A graph with quantised weights or activations is int8 or fp8, whatever the rest is in.
    """
    quantized = {quantized_type(view, node) for node in view.nodes if node.op_type == "DequantizeLinear"}
    if TensorProto.FLOAT8E4M3FN in quantized:
        return Precision.FP8
    if quantized:
        return Precision.INT8
    products = Counter(view.types.get(node.input[0]) for node in view.nodes if node.op_type in ("MatMul", "Gemm"))
    kinds: dict[int, Precision] = {TensorProto.FLOAT16: Precision.FP16, TensorProto.BFLOAT16: Precision.BF16}
    most = products.most_common(1)
    return kinds.get(most[0][0] or 0, Precision.FP32) if most else Precision.FP32


def report(path: Path, found: Sequence[Breach]) -> dict[str, object]:
    """Sum up the checks of one file for a JSON report."""
    return {
        "graph": path.name,
        "rules": [rule.__name__.removeprefix("check_") for rule in RULES],
        "breaches": [str(breach) for breach in found],
    }
