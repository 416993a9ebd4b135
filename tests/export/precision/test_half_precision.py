"""fp16 and bf16 inside the graph: consistent types, a head in fp32, close vectors."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from encoders.reference import Reference
from encoders.source import resolve
from export.graph.trace import export_graph
from export.precision.half_precision import HALVES, write_half
from export.tensorrt.checks import breaches, graph_precision
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import Layout, Pooling, Precision
from mirror_runtime.engines.openvino_engine import OpenVinoEngine
from mirror_runtime.errors import EngineError
from mirror_runtime.host import has_bf16
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import cosines
from tests.support.graphs import graph_of, rows, run, texts_of
from tests.support.tiny_encoders import write_tiny_encoder


@pytest.mark.parametrize("half", list(HALVES))
@pytest.mark.parametrize("layout", list(Layout))
def test_products_are_in_half_and_the_head_and_both_ends_are_not(tiny_bundle, tmp_path, half, layout):
    source = graph_of(tiny_bundle, layout)
    made = write_half(source, tmp_path / "half.onnx", half)
    assert (made.inputs, made.outputs) == (source.inputs, source.outputs)
    view = GraphView.load(made.path)
    assert graph_precision(view) is half
    assert not breaches(view)
    kinds = {node.output[0]: view.types[node.output[0]] for node in view.nodes}
    norms = [n for n in view.nodes if n.op_type in ("LayerNormalization", "Softmax")]
    assert {kinds[n.output[0]] for n in norms} == {HALVES[half]}
    assert {kinds[n.output[0]] for n in view.nodes if n.op_type in ("Sqrt", "ReduceSum")} == {TensorProto.FLOAT}
    assert made.path.stat().st_size < 0.6 * source.path.stat().st_size


def test_fp16_vectors_stay_close(tiny_bundle, tmp_path):
    source = graph_of(tiny_bundle)
    made = write_half(source, tmp_path / "half.onnx", Precision.FP16)
    wanted, found = (run(graph.path, rows()) for graph in (source, made))
    assert found.dtype == np.float32
    assert cosines(texts_of(found), texts_of(wanted)).min() > 0.9999
    assert not found[0, 3].any()  # an empty slot


@pytest.mark.skipif(not has_bf16(), reason="OpenVINO runs bf16 files only on CPUs with bf16 instructions")
def test_bf16_vectors_stay_close(tiny_bundle, tmp_path):
    source = graph_of(tiny_bundle)
    made = write_half(source, tmp_path / "half.onnx", Precision.BF16)
    engine = OpenVinoEngine(made.path, Precision.BF16, 1)
    found = engine.run(PackedRows(**rows()))
    engine.close()
    assert cosines(texts_of(found), texts_of(run(source.path, rows()))).min() > 0.999


def test_a_weight_beyond_fp16_is_refused_and_bf16_named(tiny_bundle, tmp_path):
    source = graph_of(tiny_bundle)
    proto = onnx.load(source.path)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 2 and "embeddings" in t.name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e6), weight.name))
    onnx.save(proto, tmp_path / "wide.onnx")
    wide = dataclasses.replace(source, path=tmp_path / "wide.onnx")
    with pytest.raises(EngineError, match="which fp16 cannot hold: export bf16"):
        write_half(wide, tmp_path / "half.onnx", Precision.FP16)
    write_half(wide, tmp_path / "half.onnx", Precision.BF16)


@pytest.mark.trace
@pytest.mark.parametrize(("family", "pooling", "layers"), [("mpnet", Pooling.MEAN, 1), ("qwen3", Pooling.LAST, 2)])
def test_a_family_with_other_operators_is_halved_too(tmp_path, family, pooling, layers):
    """The traces are those of tests/end_to_end/test_parity_families.py."""
    write_tiny_encoder(family, tmp_path / family, layers=layers)
    reference = Reference.load(resolve(str(tmp_path / family), pooling=pooling))
    source = export_graph(reference, Layout.PACKED, tmp_path / "packed.onnx")
    if family == "qwen3":  # squares of such states exceed fp16
        proto = onnx.load(source.path)
        table = next(tensor for tensor in proto.graph.initializer if "embed_tokens" in tensor.name)
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * np.float32(5000), table.name))
        onnx.save(proto, source.path)
    made = write_half(source, tmp_path / "half.onnx", Precision.FP16)
    assert not [breach for breach in breaches(GraphView.load(made.path)) if not breach.endswith("[masks]")]
    found, wanted = (texts_of(run(graph.path, rows(20))) for graph in (made, source))
    assert cosines(found, wanted).min() > 0.9999
