"""Rules on numbers: what half precision cannot represent, attention masks, and the scales of explicit quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from export.tensorrt.view import TYPE_NAMES, Finding, GraphView, attribute, floats

HALVES: Mapping[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
LARGEST: Mapping[int, float] = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895313892515355e38}
SMALLEST: Mapping[int, float] = {TensorProto.FLOAT16: 2.0**-24, TensorProto.BFLOAT16: 2.0**-133}
"""The largest and the smallest positive number of each type."""

LARGEST_ADDEND = 32752.0
"""The largest magnitude of a number added to fp16 scores: the sum of two of these is finite."""

SUMS = frozenset({"ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum"})

MASKS = frozenset({"segment_ids", "attention_mask"})
"""Inputs that mark which positions are text."""

LENGTH = 64
"""Length of the rows that masks are computed for."""

_CARRIERS = frozenset(
    {
        *("Add", "Sub", "Mul", "Neg", "Where", "Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice"),
        *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators that pass a constant on, so that a later Cast applies to it."""

_SCALERS = frozenset({"Cast", "Add", "Sub", "Mul", "Div", "Identity", "Where", "QuantizeLinear", "DequantizeLinear"})
"""Operators between attention scores and their softmax."""


def check_constants(view: GraphView) -> Iterator[Finding]:
    """Find constants that are not finite, that become infinite or zero in half precision, or that overflow scores."""
    for name, tensor in view.constants.items():
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, *HALVES):
            continue
        array = view.constant(name)
        assert array is not None  # the name is that of a constant
        values = np.abs(floats(array))
        place = _place(view, name)
        if not np.isfinite(values).all():
            yield place, f"{name} holds infinity or NaN (a mask fill of -3.4e38 becomes -inf in fp16): use -10000"
            continue
        added = any(node.op_type in ("Where", "Add", "Sub", "Mul") for node in view.consumers.get(name, []))
        fills = tensor.data_type == TensorProto.FLOAT16 and values.size == 1
        if added and fills and values.max() > LARGEST_ADDEND:
            yield place, f"{name} is {floats(array).min():.4g} and overflows fp16 when a score is added: use -10000"
        if tensor.data_type in HALVES or values.size > 64:
            continue  # fp16 values are finite, and weights are checked by their type where they are cast
        largest, positive = values.max(initial=0.0), values[values > 0]
        for half in _casts(view, name):
            if largest > LARGEST[half]:
                yield place, f"{name} reaches {largest:.4g} and becomes infinite in {HALVES[half]}: use -10000"
            elif positive.size and positive.min() < SMALLEST[half]:
                yield place, f"{name} is {positive.min():.4g} and becomes 0 in {HALVES[half]}: keep it in fp32"


def check_sums(view: GraphView) -> Iterator[Finding]:
    """Find long sums in half precision (pooling, norms, a decomposed LayerNorm), and divisors that may be 0 in it."""
    for node in view.nodes:
        half = HALVES.get(view.types.get(node.input[0], 0)) if node.input else None
        if half is None:
            continue
        if node.op_type in SUMS:
            problem = f"it sums in {half}: cast to fp32 first (the LayerNormalization operator does so itself)"
            yield view.label(node), problem
        if node.op_type == "Div" and (floor := view.producer.get(node.input[1])) is not None:
            bounds = [view.constant(name) for name in floor.input if name in view.constants]
            if floor.op_type in ("Max", "Clip") and any(b is not None and (floats(b) == 0).all() for b in bounds):
                yield view.label(node), f"its divisor's floor is 0 in {half}: divide in fp32"


def check_masks(view: GraphView) -> Iterator[Finding]:
    """Find attention in which a position may attend to nothing: its softmax is NaN, or covers other texts.

    The mask is extracted from the graph and computed for rows with several texts, with one, and with none.
    """
    depends = _dependencies(view)
    masks: dict[str, str] = {}
    for node in view.nodes:
        if node.op_type != "Softmax":
            continue
        mask = _mask_of(view, node, depends)
        if mask is None:
            yield view.label(node), "its scores have no mask: texts would attend to each other"
        else:
            masks.setdefault(mask, view.label(node))
    for mask, label in masks.items():
        values = _compute(view, mask)
        if values.dtype == np.bool_:
            blind = ~values.any(-1)
        elif not np.isfinite(values.astype(np.float64)).all():
            yield label, f"its mask {mask} holds infinity or NaN: fill with -10000"
            continue
        else:
            blind = values.astype(np.float64).max(-1) < -1.0
        # Check square masks only: slots without a text may attend to nothing, since their vectors are zeros anyway.
        if values.shape[-2:] == (LENGTH, LENGTH) and blind.any():
            problem = f"its mask {mask} leaves {int(blind.sum())} positions that attend to nothing"
            yield label, f"{problem}: let empty positions attend to each other"


def _compute(view: GraphView, name: str) -> NDArray[np.generic]:
    """Compute one value for rows with several texts, with one, and with none."""
    needed: set[str] = {name}
    nodes: list[NodeProto] = []
    for node in reversed(view.nodes):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    segments = np.array([[1] * 8 + [2] * 24 + [3] * 16 + [0] * 16, [1] * LENGTH, [0] * LENGTH], np.int64)
    positions = np.array([[*range(8), *range(24), *range(16), *[0] * 16], [*range(LENGTH)], [0] * LENGTH], np.int64)
    samples = {
        "segment_ids": segments,
        "position_ids": positions,
        "attention_mask": (segments > 0).astype(np.int64),
    }
    # A mask reads only the size of any other input.
    feed = {source: samples.get(source, np.zeros_like(segments)) for source in sorted(needed & view.inputs.keys())}
    graph = onnx.helper.make_graph(
        nodes,
        "mask",
        [view.inputs[source] for source in feed],
        [onnx.helper.make_empty_tensor_value_info(name)],
        [tensor for key, tensor in view.constants.items() if key in needed and key not in view.producer],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", view.opset)])
    with np.errstate(over="ignore"):  # overflows become infinite, which the caller reports
        results: Any = ReferenceEvaluator(model).run(None, feed)
    return np.asarray(results[0])


def _dependencies(view: GraphView) -> dict[str, frozenset[str]]:
    """Return the graph inputs whose values each value depends on; dependence on sizes does not count."""
    depends = {name: frozenset({name}) for name in view.inputs}
    for node in view.nodes:
        names = () if node.op_type in ("Shape", "Size") else node.input
        sources = frozenset[str]().union(*(depends.get(name, frozenset()) for name in names))
        depends |= dict.fromkeys(node.output, sources)
    return depends


def _mask_of(view: GraphView, softmax: NodeProto, depends: dict[str, frozenset[str]]) -> str | None:
    """Find the value that is added to a softmax's scores, or selects among them, and depends only on mask inputs."""
    name = softmax.input[0]
    while (node := view.producer.get(name)) is not None:
        if node.op_type in ("Add", "Where", "Sub"):
            for operand in node.input:
                sources = depends.get(operand, frozenset())
                if sources & MASKS and sources <= {*MASKS, "position_ids"}:
                    return operand
        if node.op_type not in _SCALERS:
            return None
        name = node.input[0]
    return None


def _casts(view: GraphView, name: str) -> set[int]:
    """Return the half-precision types that a constant is cast to, directly or behind `_CARRIERS`."""
    found: set[int] = set()
    seen = {name}
    todo = [name]
    while todo:
        for node in view.consumers.get(todo.pop(), []):
            if node.op_type not in _CARRIERS:
                continue
            for output in node.output:
                kind = view.types.get(output, 0)
                if node.op_type == "Cast" and kind in HALVES:
                    found.add(kind)
                elif output not in seen and kind in (TensorProto.FLOAT, TensorProto.DOUBLE):
                    seen.add(output)
                    todo.append(output)
    return found


def _place(view: GraphView, name: str) -> str:
    """Return the name of a constant's first consumer."""
    consumers = view.consumers.get(name)
    return view.label(consumers[0]) if consumers else "graph"


FIRST_OPSET: Mapping[int, int] = {
    TensorProto.INT8: 10,
    TensorProto.FLOAT8E4M3FN: 19,
    TensorProto.INT4: 21,
    TensorProto.FLOAT4E2M1: 23,
}
"""The first opset of each quantised type."""

HALF_SCALE_OPSET = 19
"""The first opset whose scales may be fp16 or bf16."""


def check_quantization(view: GraphView) -> Iterator[Finding]:
    """Find Q and DQ nodes that break TensorRT's rules of explicit quantisation."""
    for node in view.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        label = view.label(node)
        for problem in (*_type(view, node), *_scale(view, node), *_zero_point(view, node)):
            yield label, problem
        readers = [reader for reader in view.consumers.get(node.output[0], []) if reader.op_type != "DequantizeLinear"]
        if node.op_type == "QuantizeLinear" and readers:
            yield label, f"its result is read by {view.label(readers[0])}: only DequantizeLinear may follow"


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
