"""int8 and fp8 inside the graph: symmetric constant scales, close vectors, and batch invariance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.bundle.build import Request, build
from export.graph import trace
from export.graph.rewrite import Rewrite
from export.precision import quantize
from export.precision.calibration import ActivationStats, Calibration, Origin, calibration_texts, linear_inputs
from export.precision.channel_splitting import CHANNELS_PER_EXTRA_COLUMN, Columns
from export.precision.quantize import (
    FORMATS,
    SPLITTING_GAIN,
    QuantizedInput,
    best_quantization,
    plan_quantization,
    write_quantized,
    write_quantized_for_gpu,
)
from export.proof.proof_texts import parity_texts
from export.tensorrt.checks import breaches, graph_precision
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import Layout, Pooling, Precision, read_manifest
from mirror_runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mirror_runtime.engines.openvino_core import read_graph
from mirror_runtime.engines.openvino_engine import OpenVinoEngine
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import cosines
from tests.support.graphs import graph_of, rows, run, texts_of
from tests.support.tiny_encoders import write_tiny_bert

WORDS = ["the cat sat on the mat.", "a man is playing a guitar", "dog", "river 3 times, the dog?", "on on on on on on"]


@pytest.fixture(scope="module")
def packed(tiny_bundle):
    return graph_of(tiny_bundle)


@pytest.fixture(scope="module")
def calibration(tiny_bundle, packed):
    return Calibration.run(packed.path, tiny_bundle, read_manifest(tiny_bundle).encoder, WORDS * 8)


@pytest.fixture(scope="module")
def plans(packed, calibration):
    return {precision: plan_quantization(packed.path, calibration, precision) for precision in FORMATS}


@pytest.fixture(scope="module")
def int8(packed, plans, tmp_path_factory):
    """The packed graph in int8, as CPUs get it."""
    return write_quantized(packed, tmp_path_factory.mktemp("int8") / "q.onnx", plans[Precision.INT8])


def close_to(packed, engine, path: Path, precision: Precision = Precision.INT8) -> float:
    """Return the lowest cosine between the vectors of a file on an engine and those of the fp32 graph."""
    loaded = engine(path, precision, 1)
    found = loaded.run(PackedRows(**rows()))
    loaded.close()
    return float(cosines(texts_of(found), texts_of(run(packed.path, rows()))).min())


def test_scales_are_constant_and_symmetric_and_the_bias_stands_before_the_split(int8):
    graph = onnx.load(int8.path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert found
    for node in found:
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        assert not zero.any()
        assert zero.dtype == np.int8
        assert (scale > 0).all()
        assert scale.size == 1 or node.input[0].endswith("_weight")
    products = [node.input[1].endswith("_weight_dequantized") for node in graph.node if node.op_type == "MatMul"]
    assert sum(products) == 8  # 2 layers: query-key-value and 3 more
    producers = {out: node for node in graph.node for out in node.output}
    splits = [node for node in graph.node if node.op_type == "Split"]
    assert len(splits) == 2
    assert all(producers[node.input[0]].op_type == "Add" for node in splits)
    readers = [node.op_type for node in graph.node for split in splits if set(split.output) & set(node.input)]
    assert readers == ["Reshape"] * 6


def test_openvino_neither_splits_products_nor_moves_single_numbers_of_keys(int8):
    nodes = read_graph(int8.path, None).get_ops()
    assert not [node for node in nodes if node.get_type_name() == "VariadicSplit"]
    orders = [node.input_value(1).get_node() for node in nodes if node.get_type_name() == "Transpose"]
    assert orders
    assert [0, 2, 3, 1] not in [order.data.tolist() for order in orders]


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_int8_vectors_stay_close_on_each_engine(packed, int8, engine):
    assert close_to(packed, engine, int8.path) > 0.98


def test_layers_that_share_weights_have_scales_of_their_own(tiny_bundle, packed, tmp_path):
    proto = onnx.load(packed.path)
    products = [node for nodes in linear_inputs(Rewrite(packed.path)).values() for node in nodes]
    assert len(products) == 12  # 6 a layer
    shared = {second.input[1]: first.input[1] for first, second in zip(products[:6], products[6:], strict=True)}
    for node in proto.graph.node:
        node.input[:] = [shared.get(name, name) for name in node.input]
    onnx.save(proto, tmp_path / "shared.onnx")
    graph = replace(packed, path=tmp_path / "shared.onnx")
    measured = Calibration.run(graph.path, tiny_bundle, read_manifest(tiny_bundle).encoder, WORDS * 8)
    plan = plan_quantization(graph.path, measured, Precision.INT8)
    keys = [key for quantized in plan.inputs for key in quantized.layers]
    assert len(set(keys)) == len(keys) == 12
    assert len({weights for weights, _ in keys}) == 6
    made = write_quantized(graph, tmp_path / "q.onnx", plan)
    assert close_to(graph, OnnxRuntimeEngine, made.path) > 0.98
    scales = [t for t in onnx.load(made.path).graph.initializer if t.name.endswith("_weight_scale")]
    assert len(scales) == 8  # 2 layers: query-key-value and 3 more


@pytest.mark.parametrize("precision", list(FORMATS))
def test_the_files_for_gpus_keep_every_rule_of_tensorrt(packed, plans, tmp_path, precision):
    made = write_quantized_for_gpu(packed, tmp_path / "q.onnx", plans[precision])
    view = GraphView.load(made.path)
    assert not breaches(view)
    assert graph_precision(view) is precision
    half = onnx.TensorProto.FLOAT16
    assert half in {view.types.get(node.input[0]) for node in view.nodes if node.op_type == "Softmax"}
    assert close_to(packed, OnnxRuntimeEngine, made.path, precision) > 0.97


def test_the_file_for_cpus_has_small_tables_which_tensorrt_does_not_accept(int8):
    tables = [t for t in onnx.load(int8.path).graph.initializer if "embeddings" in t.name and len(t.dims) == 2]
    assert {tensor.data_type for tensor in tables if tensor.dims[1] > 1} == {onnx.TensorProto.INT8}
    view = GraphView.load(int8.path)
    assert graph_precision(view) is Precision.INT8
    assert all(breach.endswith("[operator]") for breach in breaches(view))
    assert any("Gather" in breach for breach in breaches(view))


def test_a_text_does_not_depend_on_its_batch(int8):
    one = rows()
    other = {**one, "input_ids": one["input_ids"].copy()}
    other["input_ids"][0, 5:] = 7
    other["input_ids"][1] = 9
    found, again = (run(int8.path, feed)[0, :1] for feed in (one, other))
    assert cosines(found, again).min() > 0.99999


def channels(count: int, other: int, factor: float) -> tuple[ActivationStats, np.ndarray]:
    """Return statistics of channels, one far wider or narrower than the others, and a layer's weights."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(256, count)).astype(np.float32)
    values[:, other] *= factor
    stats = ActivationStats(peak=np.abs(values).max(0), rows=values, origin=Origin.ACTIVATION)
    return stats, draw.normal(size=(count, 32)).astype(np.float32)


def test_the_widest_channel_of_a_feed_forward_layer_gets_more_columns():
    stats, weights = channels(192, 5, 30)
    form = FORMATS[Precision.INT8]
    plain, wide = (best_quantization(stats, weights, form, splittable=splittable) for splittable in (False, True))
    assert not plain.columns.has_splits
    assert wide.columns.copies[5] == 1 + 192 // CHANNELS_PER_EXTRA_COLUMN
    assert wide.columns.copies.sum() == 192 + 192 // CHANNELS_PER_EXTRA_COLUMN
    assert wide.error <= SPLITTING_GAIN * plain.error
    calm = replace(stats, peak=np.ones_like(stats.peak), rows=np.clip(stats.rows, -1, 1))
    assert not best_quantization(calm, weights, form, splittable=True).columns.has_splits


def test_the_scale_covers_a_channel_that_did_not_fire_in_calibration():
    chosen = best_quantization(*channels(64, 9, 0.01), FORMATS[Precision.INT8])
    assert 127 * chosen.scale * chosen.smoothing[9] >= 2


@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_split_channels_give_the_same_vectors(packed, plans, tmp_path, engine):
    plan = plans[Precision.INT8]
    inputs = tuple(with_splits(quantized) if i % 4 == 3 else quantized for i, quantized in enumerate(plan.inputs))
    made = write_quantized(packed, tmp_path / "q.onnx", replace(plan, inputs=inputs))
    inner = {tuple(tensor.dims) for tensor in onnx.load(made.path).graph.initializer if tensor.name.endswith("_weight")}
    assert {dims for dims in inner if 64 + 3 in dims}
    assert close_to(packed, engine, made.path) > 0.98


def with_splits(quantized: QuantizedInput) -> QuantizedInput:
    copies = np.ones_like(quantized.columns.copies)
    copies[[0, 3]] = 3, 2
    return replace(quantized, columns=Columns(copies), smoothing=quantized.smoothing * copies.astype(np.float32))


def test_layers_are_left_in_float_until_the_worst_text_is_close(packed, calibration, plans, monkeypatch):
    before = plans[Precision.INT8]
    assert all(quantized.quantized for quantized in before.inputs)
    target = 1 - (1 - before.worst_cosine) / 2
    monkeypatch.setattr(quantize, "FLOOR_MARGIN", target - 0.98)
    plan = plan_quantization(packed.path, calibration, Precision.INT8)
    left_out = sum(not quantized.quantized for quantized in plan.inputs)
    assert 0 < left_out < len(plan.inputs)
    assert plan.worst_cosine >= target


def test_the_inputs_of_linear_layers_are_found_with_their_origin(packed, calibration):
    names = linear_inputs(Rewrite(packed.path))
    assert len(names) == 8  # in each of two layers: of query-key-value, the output projection and both feed-forwards
    origins = [stats.origin for stats in calibration.activations]
    assert origins == [Origin.NORM, Origin.ATTENTION, Origin.NORM, Origin.ACTIVATION] * 2
    for stats in calibration.activations:
        assert np.isfinite(stats.peak).all()
        assert stats.rows.shape[1] == stats.peak.size


def test_calibration_texts_prove_nothing_and_those_without_a_token_are_an_error(tiny_bundle, packed):
    texts = [text for text, _ in zip(calibration_texts(), range(300), strict=False)]
    assert len(texts) == 300
    assert not {text for text in texts if text} & set(parity_texts())
    with pytest.raises(InputError, match="pass --calibration"):
        Calibration.run(packed.path, tiny_bundle, read_manifest(tiny_bundle).encoder, [])


def test_a_file_runs_only_in_its_own_precision_and_whole(packed, int8, tmp_path):
    for engine, graph, precision, message in (
        (OnnxRuntimeEngine, int8, Precision.FP32, "is a graph in int8, not fp32"),
        (OnnxRuntimeEngine, packed, Precision.INT8, "is a graph in fp32, not int8"),
        (OnnxRuntimeEngine, packed, Precision.BF16, "no bf16 kernels"),
        (OpenVinoEngine, int8, Precision.FP32, "is a graph in int8: it cannot run in fp32"),
        (OpenVinoEngine, packed, Precision.INT8, "is a graph in floating point: it cannot run in int8"),
    ):
        with pytest.raises(EngineError, match=message):
            engine(graph.path, precision, 1)
    (tmp_path / "torn.onnx").write_bytes(packed.path.read_bytes()[:-5000])
    for engine in (OnnxRuntimeEngine, OpenVinoEngine):
        with pytest.raises(EngineError, match=r"cannot load torn\.onnx"):
            engine(tmp_path / "torn.onnx", Precision.FP32, 1)


def test_large_weights_go_beside_the_file_and_inputs_without_smoothing_have_no_product(
    packed, plans, int8, tmp_path, monkeypatch
):
    monkeypatch.setattr(trace, "EXTERNAL_DATA_BYTES", 1000)
    made = write_quantized(packed, tmp_path / "q.onnx", plans[Precision.INT8])
    assert (tmp_path / "q.onnx_data").is_file()
    np.testing.assert_array_equal(run(made.path, rows()), run(int8.path, rows()))
    plan = plans[Precision.INT8]
    plain = replace(plan, inputs=tuple(replace(q, smoothing=np.ones_like(q.smoothing)) for q in plan.inputs))
    made = write_quantized(packed, tmp_path / "q.onnx", plain)
    assert not [n for n in onnx.load(made.path).graph.node if n.output[0].endswith("_smooth")]


@pytest.mark.trace
def test_both_graphs_of_an_encoder_that_computes_only_cls_are_quantised_and_halved(tmp_path):
    """Its last layer computes one token, and is the only one: its norms are named `layer_norm` and `layer_norm_1`."""
    write_tiny_bert(tmp_path / "encoder", layers=1)
    texts, words = (*WORDS, "", "the river and the dog are on the mat. " * 3), tuple(WORDS * 8)
    chosen: dict[str, Any] = {"precisions": (Precision.INT8, Precision.FP16), "texts": texts, "calibration": words}
    built = build(Request(encoder=str(tmp_path / "encoder"), output=tmp_path / "bundle", pooling=Pooling.CLS, **chosen))
    assert not built.refused
    for precision, floor in ((Precision.INT8, 0.98), (Precision.FP16, 0.9999)):
        proven = {(a.layout, a.parity.min_cosine > floor) for a in built.manifest.artifacts if a.precision is precision}
        assert proven == {(Layout.PADDED, True), (Layout.PACKED, True)}
