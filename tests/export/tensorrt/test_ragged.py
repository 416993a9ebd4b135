"""Ragged attention: the rewritten graph, computed with the operator as its schema describes it."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from encoders.reference import Reference
from encoders.source import resolve
from export.graph.trace import export_graph
from export.precision.half_precision import write_half
from export.tensorrt.artifact import packed_profiles
from export.tensorrt.ragged import DOMAIN, LENGTHS, OPERATOR, write_ragged
from export.tensorrt.view import GraphView, attribute
from mirror_runtime.bundle import Layout, Pooling, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import PackedRows, runs
from mirror_runtime.vectors import cosines
from tests.support.graphs import graph_of, rows, run, texts_of
from tests.support.tensorrt_binding import VERSIONS, binding
from tests.support.trace_cache import cached_traces


class TRT_Attention(OpRun):
    """Softmax(Q K^T) V within each text, without an implicit factor, as docs/TRT_custom_ops.md has it."""

    op_domain = DOMAIN

    def _run(self, query, key, value, mask, query_lengths, kv_lengths, **attributes: Any):
        assert mask is None
        assert (attributes["query_form"], attributes["kv_form"]) == ("packed_nhd", "packed_nhd")
        assert query_lengths.dtype == kv_lengths.dtype == np.int32
        assert (query_lengths[0], query_lengths[-1]) == (0, len(query))
        out = np.zeros_like(query)
        for begin, end in itertools.pairwise(query_lengths):
            scores = np.einsum("qhd,khd->hqk", query[begin:end], key[begin:end])
            weights = np.exp(scores - scores.max(-1, keepdims=True)) if scores.size else scores
            weights /= weights.sum(-1, keepdims=True) if scores.size else 1
            out[begin:end] = np.einsum("hqk,khd->qhd", weights, value[begin:end])
        return (out.astype(query.dtype),)


def compute(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = ReferenceEvaluator(str(path), new_ops=[TRT_Attention]).run(None, feed | ends(feed))
    return np.asarray(found)


def ends(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict.fromkeys(LENGTHS, PackedRows(**feed).run_ends)


def test_a_ragged_graph_has_the_vectors_of_the_masked_one(tiny_bundle: Path, tmp_path: Path):
    source = graph_of(tiny_bundle)
    made = write_ragged(source, tmp_path / "ragged.onnx")
    assert [tensor.name for tensor in made.inputs] == [tensor.name for tensor in (*source.inputs, *made.inputs[-2:])]
    feed = rows()
    np.testing.assert_allclose(compute(made.path, feed), run(source.path, feed), atol=1e-5)
    nodes = onnx.load(made.path).graph.node
    assert not [node for node in nodes if node.op_type in ("Softmax", "Where")], "no scores of pairs, and no block mask"
    attentions = [node for node in nodes if node.op_type == OPERATOR]
    assert len(attentions) == 2
    for node in attentions:
        # Two tensors: TensorRT is reported to crash where one is wired to both.
        assert list(node.input[3:]) == ["", *LENGTHS]


@pytest.mark.parametrize("kind", [None, TensorProto.FLOAT16])
def test_half_precision_may_be_added_up_in_fp32(tiny_bundle: Path, tmp_path: Path, kind: int | None):
    half = write_half(graph_of(tiny_bundle), tmp_path / "half.onnx", Precision.FP16)
    made = write_ragged(half, tmp_path / "ragged.onnx", kind)
    feed = rows()
    nodes = {out: node for node in onnx.load(made.path).graph.node for out in node.output}
    before = {nodes[name].op_type for node in nodes.values() if node.op_type == OPERATOR for name in node.input[:3]}
    assert before == ({"Reshape"} if kind is None else {"Cast"})
    assert cosines(texts_of(compute(made.path, feed)), texts_of(run(half.path, feed))).min() > 0.9999


def test_the_operator_is_what_the_binding_has_from_11_on():
    old, new = (binding(version) for version in VERSIONS)
    assert "AttentionIOForm" not in old["enums"]
    assert {"PACKED_NHD", "PADDED_BHND"} == set(new["enums"]["AttentionIOForm"])
    needed = {"query_form", "key_value_form", *LENGTHS, "causal_kind", "decomposable", "mask"}
    assert needed <= set(new["classes"]["IAttention"]["members"])
    assert "NONE" in new["enums"]["CausalMaskKind"]


def test_run_ends_separate_texts_rows_and_empty_rests_and_have_one_size_a_shape():
    feed = rows()
    found = PackedRows(**feed).run_ends
    assert found.dtype == np.int32
    assert found.tolist() == [0, 5, 9, 12, 16, *[32] * 6]
    assert found.size == runs((2, 16)) + 1
    zeros = np.zeros((2, 16), np.int64)
    empty = PackedRows(input_ids=zeros, position_ids=zeros, segment_ids=zeros).run_ends
    assert empty.tolist() == [0, 16, *[32] * 9]


def test_its_profiles_have_the_lengths_of_each_shape(tiny_bundle: Path, tmp_path: Path):
    made = write_ragged(graph_of(tiny_bundle), tmp_path / "ragged.onnx")
    first, second = packed_profiles(made.inputs, [(1, 16), (4, 64)])
    assert first["input_ids"] == ((1, 16),) * 3
    assert (first["query_lengths"], second["key_value_lengths"]) == (((6,),) * 3, ((69,),) * 3)


def test_attention_that_is_more_than_a_block_mask_is_refused(tiny_bundle: Path, tmp_path: Path):
    source = graph_of(tiny_bundle)
    proto = onnx.load(source.path)
    where = next(node for node in proto.graph.node if node.op_type == "Where")
    bias = helper.make_node("Add", [where.output[0], where.output[0]], ["biased"])
    for node in proto.graph.node:
        if node.op_type == "Add":
            node.input[:] = ["biased" if name == where.output[0] else name for name in node.input]
    proto.graph.node.insert(list(proto.graph.node).index(where) + 1, bias)
    onnx.save(proto, tmp_path / "biased.onnx")
    with pytest.raises(EngineError, match="a window, a causal mask or a bias"):
        write_ragged(replace(source, path=tmp_path / "biased.onnx"), tmp_path / "ragged.onnx")


@pytest.mark.trace
def test_a_pooling_that_reads_one_token_is_the_reason_that_is_named(tiny_bert: Path, tmp_path: Path):
    with cached_traces():
        reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.CLS))
        graph = export_graph(reference, Layout.PACKED, tmp_path / "cls.onnx")
    with pytest.raises(EngineError, match=r"only one token a text in its last layer \(pooling cls\)"):
        write_ragged(graph, tmp_path / "ragged.onnx", pooling=Pooling.CLS)


def test_a_scale_stays_one(tiny_bundle: Path, tmp_path: Path):
    """The operator has no implicit factor: the queries are scaled before it."""
    view = GraphView.load(write_ragged(graph_of(tiny_bundle), tmp_path / "ragged.onnx").path)
    scaled = [node for node in view.nodes if node.op_type == "Mul" and node.name.endswith("_scaled")]
    assert [view.constant(node.input[1]) for node in scaled] == [pytest.approx(16**-0.5)] * 2
    assert all(attribute(node, "TRT_decomposable") == 0 for node in view.nodes if node.op_type == OPERATOR)
