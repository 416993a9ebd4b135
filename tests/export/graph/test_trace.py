"""The exported graphs: standard operators, the contract's names, and weights beside them."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.graph import trace
from export.graph.trace import check_graph, export_graph, signature
from mirror_runtime.bundle import Layout, Pooling
from mirror_runtime.errors import EngineError
from tests.support.graphs import rows, run

pytestmark = pytest.mark.trace


@pytest.fixture(scope="module")
def reference(tiny_bert: Path) -> Reference:
    return Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN))


def write(reference: Reference, layout: Layout, folder: Path) -> Path:
    return export_graph(reference, layout, folder / "graph.onnx").path


@pytest.mark.parametrize("layout", list(Layout))
def test_a_graph_holds_standard_operators_and_nothing_of_this_machine(reference, tmp_path, layout):
    path = write(reference, layout, tmp_path)
    proto = onnx.load(path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert b"/site-packages/" not in path.read_bytes()
    names = [output.name for output in proto.graph.output]
    assert names == (["last_hidden_state", "sentence_embedding"] if layout is Layout.PADDED else ["embedding"])


def test_large_weights_lie_beside_the_graph_and_it_still_runs(reference, tmp_path, monkeypatch):
    whole = write(reference, Layout.PACKED, tmp_path / "whole")
    monkeypatch.setattr(trace, "EXTERNAL_DATA_BYTES", 1000)
    path = write(reference, Layout.PACKED, tmp_path / "split")
    assert path.with_name("graph.onnx_data").stat().st_size > path.stat().st_size
    np.testing.assert_array_equal(run(path, rows()), run(whole, rows()))


def test_a_graph_that_lost_an_input_is_refused(reference, tmp_path):
    path = write(reference, Layout.PADDED, tmp_path)
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.input[:] = ["input_ids" if name == "token_type_ids" else name for name in node.input]
    onnx.save_model(proto, path)
    with pytest.raises(EngineError, match="token_type_ids"):
        check_graph(path, signature(Layout.PADDED, reference.spec, 32))


def test_other_outputs_and_a_foreign_operator_are_refused(reference, tmp_path, monkeypatch):
    path = write(reference, Layout.PACKED, tmp_path)
    with pytest.raises(EngineError, match="but the contract is"):
        check_graph(path, signature(Layout.PACKED, dataclasses.replace(reference.spec, dim=31), 32))
    proto = onnx.load(path)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save_model(proto, path)
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)
    with pytest.raises(EngineError, match=r"com\.microsoft"):
        check_graph(path, signature(Layout.PACKED, reference.spec, 32))
