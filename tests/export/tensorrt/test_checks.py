"""Each rule for TensorRT graphs: a sound graph passes, and a breach is reported with its node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from encoders.reference import Reference
from encoders.source import resolve
from export.graph.trace import export_graph
from export.tensorrt.checks import breaches, graph_precision
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import Layout, Pooling, Precision
from mirror_runtime.errors import EngineError

Change = Callable[[onnx.ModelProto], object]
"""Breaks a rule in a sound graph."""

ATTENTION = """
<ir_version: 9, opset_import: ["" : {opset}]>
packed (int64[rows,length] input_ids, int64[rows,length] position_ids, int64[rows,length] segment_ids)
    => (float[rows,length,8] embedding)
{{
    words = Gather (table, input_ids)
    places = Gather (positions, position_ids)
    tokens = Add (words, places)
    queries = MatMul (tokens, weight)
    turned = Transpose <perm = [0, 2, 1]> (tokens)
    products = MatMul (queries, turned)
    scores = Mul (products, scale)
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    down = Unsqueeze (segment_ids, axis2)
    across = Unsqueeze (segment_ids, axis1)
    same = Equal (down, across)
    mask = Where (same, zero, blocked)
    masked = Add (scores, mask)
    attention = Softmax <axis = -1> (masked)
    seen = MatMul (attention, tokens)
    normal = LayerNormalization (seen, gain)
    wide = Cast <to = 1> (normal)
    axes = Constant <value_ints = [2]> ()
    square = Mul (wide, wide)
    total = ReduceSum (square, axes)
    floored = Max (total, tiny)
    length = Sqrt (floored)
    embedding = Div (wide, length)
}}
"""


def half_graph(opset: int = 21, dtype: type = np.float16) -> onnx.ModelProto:
    """Build attention over packed rows in fp16 with a head in fp32, in the exporter's form."""
    model = onnx.parser.parse_model(ATTENTION.format(opset=opset))
    random = np.random.default_rng(0)
    constants = {
        "table": random.normal(size=(16, 8)).astype(dtype),
        "positions": random.normal(size=(64, 8)).astype(dtype),
        "weight": random.normal(size=(8, 8)).astype(dtype),
        "gain": np.ones(8, dtype),
        "scale": np.array(0.125, dtype),
        "zero": np.array(0, dtype),
        "blocked": np.array(-10_000, dtype),
        "tiny": np.array(1e-24, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    return model


def quantized_graph() -> onnx.ModelProto:
    """Build the same with symmetric int8 at one product: one scale for tokens, one per column of weights."""
    model = half_graph()
    weight = floats_of(model, "weight")
    scales = np.abs(weight).max(0) / 127
    remove(model, "weight")
    weights = {"int8": np.round(weight / scales).astype(np.int8), "scale": scales.astype(np.float16)}
    weights["zero"] = np.zeros(8, np.int8)
    for name, values in weights.items():
        put(model, f"weight_{name}", values)
    put(model, "tokens_scale", np.array(0.02, np.float16))
    put(model, "tokens_zero", np.array(0, np.int8))
    nodes = [
        helper.make_node("QuantizeLinear", ["tokens", "tokens_scale", "tokens_zero"], ["tokens_q"], "q_tokens"),
        helper.make_node("DequantizeLinear", ["tokens_q", "tokens_scale", "tokens_zero"], ["tokens_dq"], "dq_tokens"),
        helper.make_node("DequantizeLinear", [f"weight_{x}" for x in weights], ["weight"], "dq_weight", axis=1),
    ]
    at = position(model, "queries")
    model.graph.node[at].input[0] = "tokens_dq"
    for node in reversed(nodes):
        model.graph.node.insert(at, node)
    onnx.checker.check_model(model, full_check=True)
    return model


def found(model: onnx.ModelProto) -> list[str]:
    return breaches(GraphView(model))


def only(model: onnx.ModelProto, rule: str, *parts: str) -> None:
    """Assert that every breach is of one rule, and that one message contains all parts."""
    messages = found(model)
    assert messages
    assert all(message.endswith(f"[{rule}]") for message in messages), messages
    assert any(all(part in message for part in parts) for message in messages), messages


def position(model: onnx.ModelProto, output: str) -> int:
    return next(i for i, node in enumerate(model.graph.node) if output in node.output)


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return model.graph.node[position(model, output)]


def floats_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    values = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
    return np.asarray(values, np.float64)


def remove(model: onnx.ModelProto, name: str) -> None:
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == name))


def put(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Add a constant, or change it."""
    if any(tensor.name == name for tensor in model.graph.initializer):
        remove(model, name)
    model.graph.initializer.append(numpy_helper.from_array(value, name))


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        (half_graph(), Precision.FP16),
        (quantized_graph(), Precision.INT8),
        (half_graph(22, np.float32), Precision.FP32),
        (half_graph(22, ml_dtypes.bfloat16), Precision.BF16),
    ],
    ids=["fp16", "int8", "fp32", "bf16"],
)
def test_a_sound_graph_has_its_precision_and_no_breach(model: onnx.ModelProto, precision: Precision):
    assert found(model) == []
    assert graph_precision(GraphView(model)) is precision


def append(operator: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, inputs, outputs, name, **attributes))


def constant(name: str, value: object, dtype: type = np.float16) -> Change:
    return lambda model: put(model, name, np.asarray(value, dtype))


def contrib_softmax(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    softmax = node(model, "attention")
    softmax.op_type, softmax.domain = "BiasSoftmax", "com.microsoft"


def cast_mask(model: onnx.ModelProto) -> None:
    """Compute the mask in fp32 with the smallest float, then cast it to fp16."""
    put(model, "blocked", np.array(np.finfo(np.float32).min, np.float32))
    put(model, "zero", np.array(0, np.float32))
    at = position(model, "mask")
    model.graph.node[at].output[0] = "mask32"
    model.graph.node.insert(at + 1, helper.make_node("Cast", ["mask32"], ["mask"], "narrow", to=TensorProto.FLOAT16))


def vanishing_epsilon(model: onnx.ModelProto) -> None:
    put(model, "small", np.array(1e-12, np.float32))
    append("Cast", ["small"], ["none"], "narrow", to=TensorProto.FLOAT16)(model)


def head_in_half(model: onnx.ModelProto) -> None:
    put(model, "tiny", np.array(0, np.float16))
    node(model, "wide").attribute[0].i = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def two_breaches(model: onnx.ModelProto) -> None:
    put(model, "scale", np.array(0.125, np.float32))
    put(model, "gain", np.ones(8, np.float32))


def opset(version: int) -> Change:
    return lambda model: setattr(model.opset_import[0], "version", version)


def unmasked(model: onnx.ModelProto) -> None:
    node(model, "attention").input[0] = "scores"


def blind_positions(model: onnx.ModelProto) -> None:
    put(model, "nothing", np.array(0, np.int64))
    at = position(model, "mask")
    model.graph.node.insert(at, helper.make_node("And", ["same", "own"], ["both"], "both"))
    model.graph.node.insert(at, helper.make_node("Greater", ["down", "nothing"], ["own"], "own"))
    node(model, "mask").input[0] = "both"


@pytest.mark.parametrize(
    ("change", "rule", "parts"),
    [
        (append("DynamicQuantizeLinear", ["embedding"], [*"abc"], "dynamic"), "operator", ("dynamic", "static QDQ")),
        (append("NonZero", ["embedding"], ["places"], "nonzero"), "operator", ("nonzero", "CUDA graph")),
        (append("Cast", ["embedding"], ["bytes"], "to_int8", to=3), "operator", ("to_int8", "bytes is INT8")),
        (constant("blocked", -65504), "constants", ("node_12_mask", "overflows fp16")),
        (vanishing_epsilon, "constants", ("narrow", "becomes 0 in fp16")),
        (head_in_half, "sums", ("node_20_total", "sums in fp16")),
        (constant("scale", 0.125, np.float32), "types", ("node_6_scores", "scale is tensor(float) beside products")),
        (two_breaches, "types", ("node_16_normal", "gain is tensor(float)")),  # behind another breach
        (opset(25), "opset", ("25", "9 to 24")),
        (unmasked, "masks", ("node_14_attention", "have no mask")),
        (blind_positions, "masks", ("node_14_attention", "80 positions that attend to nothing")),
    ],
)
def test_a_breach_is_reported_with_its_node(change: Change, rule: str, parts: tuple[str, ...]):
    model = half_graph()
    change(model)
    only(model, rule, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (constant("tokens_zero", 3, np.int8), ("q_tokens", "tokens_zero is 3, not 0", "symmetric")),
        (constant("weight_zero", [-1] * 8, np.int8), ("dq_weight", "weight_zero is 1, not 0")),
        (constant("tokens_scale", 0), ("q_tokens", "positive")),
        (constant("weight_scale", [1] * 4), ("dq_weight", "4 scales for 8 channels", "axis 1")),
        (constant("tokens_scale", [1] * 8), ("q_tokens", "activations have one")),
        (lambda m: node(m, "weight").attribute[0].__setattr__("i", 5), ("dq_weight", "axis is 5")),
    ],
)
def test_a_breach_of_the_quantisation_rules_is_reported(change: Change, parts: tuple[str, ...]) -> None:
    model = quantized_graph()
    change(model)
    only(model, "quantization", *parts)


@pytest.mark.parametrize(
    ("make", "change", "parts"),
    [
        (half_graph, contrib_softmax, ("BiasSoftmax node_14_attention", "com.microsoft", "[domain]")),
        (half_graph, constant("blocked", -np.inf), ("node_12_mask", "blocked holds infinity", "[constants]")),
        (half_graph, cast_mask, ("node_12_mask", "becomes infinite in fp16")),
        (quantized_graph, constant("tokens_zero", 128, np.uint8), ("q_tokens", "UINT8", "[quantization]")),
        (quantized_graph, constant("tokens_zero", 128, np.uint8), ("q_tokens", "128, not 0")),
        (quantized_graph, opset(18), ("q_tokens", "needs opset 19")),
        (quantized_graph, constant("tokens_scale", 0.02, np.float32), ("q_tokens", "both must have the same type")),
        (
            quantized_graph,
            lambda m: node(m, "queries").input.__setitem__(0, "tokens_q"),
            ("q_tokens", "only DequantizeLinear may"),
        ),
    ],
)
def test_a_breach_that_causes_others_is_reported_too(make: Any, change: Change, parts: tuple[str, ...]):
    model = make()
    change(model)
    assert any(all(part in message for part in parts) for message in found(model)), found(model)


def test_a_truncated_file_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(half_graph().SerializeToString()[:-100])
    for bad in (path, tmp_path / "absent.onnx"):
        with pytest.raises(EngineError, match=r"cannot be read as ONNX"):
            GraphView.load(bad)


@pytest.mark.trace
@pytest.mark.parametrize("layout", list(Layout))
def test_heads_that_read_one_position_are_suitable(tiny_bert: Path, tmp_path: Path, layout):
    """The last layer computes only the slots, whose mask depends on the positions too. Other heads: tests of heads."""
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.CLS))
    graph = export_graph(reference, layout, tmp_path / "graph.onnx")
    assert breaches(GraphView.load(graph.path)) == []
