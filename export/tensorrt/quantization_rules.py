"""Rules of TensorRT's explicit quantisation: symmetric, constant scales, per tensor or per channel of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import NodeProto, TensorProto

from export.tensorrt.operators import TYPE_NAMES
from export.tensorrt.view import Breach, GraphView, attribute, floats

FIRST_OPSET: Mapping[int, int] = {
    TensorProto.INT8: 10,
    TensorProto.FLOAT8E4M3FN: 19,
    TensorProto.INT4: 21,
    TensorProto.FLOAT4E2M1: 23,
}
"""The first opset of each quantised type."""

HALF_SCALE_OPSET = 19
"""The first opset whose scales may be fp16 or bf16."""


def check_quantization(view: GraphView) -> Iterator[Breach]:
    """Find Q and DQ nodes that break TensorRT's rules of explicit quantisation."""
    for node in view.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        label = view.label(node)
        for problem in (*_type(view, node), *_scale(view, node), *_zero_point(view, node)):
            yield Breach(rule="quantization", node=label, problem=problem)
        readers = [reader for reader in view.consumers.get(node.output[0], []) if reader.op_type != "DequantizeLinear"]
        if node.op_type == "QuantizeLinear" and readers:
            yield Breach(
                rule="quantization",
                node=label,
                problem=f"its result is read by {view.label(readers[0])}: only DequantizeLinear may follow",
            )


def quantized_type(view: GraphView, node: NodeProto) -> int:
    """Return the quantised element type of a Q or DQ node; ONNX's default is uint8."""
    if node.op_type == "DequantizeLinear":
        return view.types.get(node.input[0], TensorProto.UINT8)
    if len(node.input) > 2 and node.input[2]:
        return view.types.get(node.input[2], TensorProto.UINT8)
    return int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8


def _type(view: GraphView, node: NodeProto) -> Iterator[str]:
    kind = quantized_type(view, node)
    name = TYPE_NAMES.get(kind, TensorProto.DataType.Name(kind))
    if kind not in FIRST_OPSET:
        yield f"it quantises to {name}; TensorRT accepts INT8, FP8 (E4M3), INT4 and FP4 only"
    elif view.opset < FIRST_OPSET[kind]:
        yield f"{name} needs opset {FIRST_OPSET[kind]}; the graph's is {view.opset}"


def _zero_point(view: GraphView, node: NodeProto) -> Iterator[str]:
    if len(node.input) < 3 or not node.input[2]:
        return
    zero = view.constant(node.input[2])
    if zero is None:
        yield f"its zero point {node.input[2]} is computed; it must be the constant 0"
    elif (floats(zero) != 0).any():
        worst = int(np.abs(floats(zero)).max())
        yield f"its zero point {node.input[2]} is {worst}, not 0; TensorRT is symmetric only: calibrate symmetrically"


def _scale(view: GraphView, node: NodeProto) -> Iterator[str]:
    name = node.input[1]
    scale = view.constant(name)
    if scale is None:
        yield f"its scale {name} is computed; TensorRT accepts constant scales only"
        return
    values, kind = floats(scale), view.constants[name].data_type
    if not np.isfinite(values).all() or (values <= 0).any():
        yield f"its scale {name} holds {values.min():.4g}; scales must be positive and finite"
    if kind != TensorProto.FLOAT and view.opset < HALF_SCALE_OPSET:
        yield f"its scale {name} is {TYPE_NAMES.get(kind, kind)}, which needs opset {HALF_SCALE_OPSET}"
    value = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
    around = view.types.get(value)
    if around is not None and around != kind:
        types = f"{TYPE_NAMES.get(kind, kind)} and {value} is {TYPE_NAMES.get(around, around)}"
        yield f"its scale {name} is {types}: both must have the same type"
    if values.size > 1:
        yield from _channels(view, node, values.shape)


def _channels(view: GraphView, node: NodeProto, scales: tuple[int, ...]) -> Iterator[str]:
    if not view.is_weight(node.input[0]):
        yield f"it has {scales} scales for a computed value: activations have one, weights one per channel"
        return
    weight = view.constants.get(node.input[0])
    if weight is None or attribute(node, "block_size", 0) or len(scales) != 1:
        return
    axis, rank = int(attribute(node, "axis", 1)), len(weight.dims)
    if not -rank <= axis < rank:
        yield f"its axis is {axis}; {node.input[0]} has {rank} dimensions"
    elif weight.dims[axis] != scales[0]:
        yield f"it has {scales[0]} scales for {weight.dims[axis]} channels of {node.input[0]} along axis {axis}"
