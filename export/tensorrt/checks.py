"""Check a graph against TensorRT's rules without a GPU; every breach names its node."""

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
"""Breaches quoted in an error message; the others are counted."""


def breaches(view: GraphView) -> tuple[Breach, ...]:
    """Check a graph against every rule.

    Returns:
        All breaches; empty for a graph that TensorRT should accept.
    """
    return tuple(breach for rule in RULES for breach in rule(view))


def require_clean(view: GraphView, path: Path) -> None:
    """Raise if a graph breaks a rule.

    Args:
        view: the graph.
        path: its file, for the message.

    Raises:
        EngineError: it breaks a rule; the message names the first breaches with their nodes.
    """
    found = breaches(view)
    if found:
        shown = "; ".join(map(str, found[:SHOWN])) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise EngineError(f"{path.name} is not suitable for TensorRT: {shown}")


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


def report(path: Path, found: Sequence[Breach]) -> dict[str, object]:
    """Summarise the checks of one file for a JSON report."""
    return {
        "graph": path.name,
        "rules": [rule.__name__.removeprefix("check_") for rule in RULES],
        "breaches": [str(breach) for breach in found],
    }
