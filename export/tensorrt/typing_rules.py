"""Operators, opset and types: what TensorRT's parser takes, and what a strongly typed network must agree in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from export.tensorrt.operators import CHECKED_TYPES, DATA_DEPENDENT, OPSETS, SUPPORTED, TYPE_NAMES, WHY_NOT
from export.tensorrt.view import Breach, GraphView, attribute

STANDARD = ("", "ai.onnx")
OUTPUT_TYPES = frozenset({"FP32", "FP16", "BF16", "INT32", "INT64", "UINT8", "BOOL"})
"""What may leave a network: the quantised types exist between a Q and a DQ only."""


def check_domains(view: GraphView) -> Iterator[Breach]:
    """Refuse operators outside ai.onnx.

    The parser looks them up by name alone: `com.microsoft.Gelu` would be taken for ONNX's Gelu, and most others fail as
    a missing plugin.
    """
    for node in view.nodes:
        if node.domain not in STANDARD:
            yield Breach(
                rule="domain",
                node=view.label(node),
                problem=f"its domain is {node.domain}; TensorRT takes ai.onnx only. Export without fusing operators",
            )
    for function in view.proto.functions:
        yield Breach(
            rule="domain", node=f"function {function.name}", problem="local functions are not used by our graphs"
        )


def check_opset(view: GraphView) -> Iterator[Breach]:
    """Refuse opsets outside the parser's range."""
    first, last = OPSETS
    if not first <= view.opset <= last:
        yield Breach(rule="opset", node="graph", problem=f"its opset is {view.opset}; TensorRT takes {first} to {last}")


def check_operators(view: GraphView) -> Iterator[Breach]:
    """Refuse operators that the parser does not have, types that they do not take, and outputs of unknown size."""
    for node in view.nodes:
        if node.domain not in STANDARD:
            continue  # named by `check_domains`
        label, operator = view.label(node), node.op_type
        if operator not in SUPPORTED or operator in DATA_DEPENDENT:
            reason = WHY_NOT.get(operator)
            yield Breach(
                rule="operator", node=label, problem=f"TensorRT has no {operator}" + (f": {reason}" if reason else "")
            )
            continue
        # A scale or zero point follows the quantised value; the rules of quantisation check them.
        quantizes = operator in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[:1] if quantizes else [*node.input, *node.output]:
            kind = _kind(view, name)
            if kind is not None and kind in CHECKED_TYPES and kind not in SUPPORTED[operator]:
                known = ", ".join(sorted(SUPPORTED[operator]))
                yield Breach(rule="operator", node=label, problem=f"{name} is {kind}; {operator} takes {known}")
        if operator in ("LayerNormalization", "Attention") and len([name for name in node.output if name]) > 1:
            yield Breach(rule="operator", node=label, problem="only its first output is supported")
    for value in view.proto.graph.output:
        kind = _kind(view, value.name)
        if kind is not None and kind not in OUTPUT_TYPES:
            yield Breach(
                rule="operator", node="graph", problem=f"its output {value.name} is {kind}: cast it to FP32 or FP16"
            )


def check_types(view: GraphView) -> Iterator[Breach]:
    """Refuse nodes whose inputs disagree in type: a strongly typed network casts nothing by itself."""
    for name, kind in view.types.items():
        if kind not in TYPE_NAMES and (name in view.constants or name in view.inputs):
            yield Breach(
                rule="types", node="graph", problem=f"{name} is {_type_name(kind)}, a type that TensorRT does not have"
            )
    for node in view.nodes:
        if node.domain in STANDARD:
            yield from _agree(view, node)


def _agree(view: GraphView, node: NodeProto) -> Iterator[Breach]:
    """Bind the operator's type parameters to the types found, input by input, then complete unknown output types."""
    try:
        schema = onnx.defs.get_schema(node.op_type, view.opset)
    except onnx.defs.SchemaError:
        return  # named by `check_operators`
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    bound: dict[str, str] = {}  # the first input of each type parameter
    for name, formal in zip(node.input, _formals(schema.inputs, len(node.input)), strict=True):
        if not name or name not in view.types or not formal.is_homogeneous:
            continue
        found, first = _tensor_type(view, name), bound.setdefault(formal.type_str, name)
        if found not in allowed.get(formal.type_str, {formal.type_str}):
            problem = f"{name} is {found}, which {node.op_type} refuses"
            yield Breach(rule="types", node=view.label(node), problem=problem)
        elif found != _tensor_type(view, first):
            problem = f"{name} is {found} beside {first}, which is {_tensor_type(view, first)}: cast one of them"
            yield Breach(rule="types", node=view.label(node), problem=problem)
    for name, formal in zip(node.output, _formals(schema.outputs, len(node.output)), strict=True):
        if name and name not in view.types:  # type inference stops at a breach; what follows it is checked all the same
            kind = attribute(node, "to") if node.op_type == "Cast" else view.types.get(bound.get(formal.type_str, ""))
            view.types |= {} if kind is None else {name: kind}


def _formals(formals: Sequence[Any], count: int) -> list[Any]:
    """Give the formal parameter of each actual one: the last may stand for several."""
    return [formals[min(i, len(formals) - 1)] for i in range(count)]


def _tensor_type(view: GraphView, name: str) -> str:
    """Give a value's type in ONNX's words."""
    return f"tensor({_type_name(view.types[name]).lower()})"


def _kind(view: GraphView, name: str) -> str | None:
    """TensorRT's name of a value's type; ONNX's own name where it has none; None where it is unknown."""
    kind = view.types.get(name)
    return None if kind is None else TYPE_NAMES.get(kind, _type_name(kind))


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))
