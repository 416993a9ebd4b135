"""The exported graphs: standard operators, the contract's names, and vectors equal to PyTorch's."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.build import Request, build
from export.graph import trace
from export.graph.trace import check_graph, export_graph, signature
from mirror_runtime.bundle import Layout, Pooling
from mirror_runtime.errors import EngineError

pytestmark = pytest.mark.trace

TEXTS = ["", "the cat sat on the mat.", "a man is playing a guitar", "dog", "river on a mat, the dog sat 3 times!"]


def load(folder: Path, pooling: Pooling = Pooling.MEAN) -> Reference:
    return Reference.load(resolve(str(folder), pooling=pooling))


def write(reference: Reference, layout: Layout, folder: Path, **options) -> Path:
    return export_graph(reference, layout, folder / "graph.onnx", **options).path


def run_packed(path: Path, reference: Reference, texts: list[str]) -> np.ndarray:
    """Run one row with all texts in order."""
    pieces = [reference.tokenizer(text)["input_ids"] for text in texts]
    length = -(-max(sum(map(len, pieces)), 4 * len(pieces)) // 16) * 16
    ids, positions, segments = (np.zeros((1, length), np.int64) for _ in range(3))
    at = 0
    for slot, piece in enumerate(pieces):
        end = at + len(piece)
        ids[0, at:end], positions[0, at:end], segments[0, at:end] = piece, range(len(piece)), slot + 1
        at = end
    feed = {"input_ids": ids, "position_ids": positions, "segment_ids": segments}
    return onnxruntime.InferenceSession(str(path)).run(["embedding"], feed)[0][0]


def run_padded(path: Path, reference: Reference, texts: list[str]) -> np.ndarray:
    batch = reference.tokenizer(texts, padding=True, return_tensors="np")
    feed = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    return onnxruntime.InferenceSession(str(path)).run(["sentence_embedding"], feed)[0]


def test_packed_equals_padded_equals_reference(tiny_bert, tmp_path):
    reference = load(tiny_bert)
    expected = reference.encode(TEXTS)
    padded = run_padded(write(reference, Layout.PADDED, tmp_path / "a"), reference, TEXTS)
    packed = run_packed(write(reference, Layout.PACKED, tmp_path / "b"), reference, TEXTS)
    np.testing.assert_allclose(padded, expected, atol=1e-5)
    np.testing.assert_allclose(packed[: len(TEXTS)], expected, atol=1e-5)
    assert not packed[len(TEXTS) :].any()  # empty slots are zeros


def test_a_text_does_not_attend_to_others_in_its_row(tiny_bert, tmp_path):
    reference = load(tiny_bert)
    path = write(reference, Layout.PACKED, tmp_path)
    one = run_packed(path, reference, ["the cat", "dog on mat"])[0]
    other = run_packed(path, reference, ["the cat", "9 9 9 9 9"])[0]
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_graph_holds_standard_operators_and_nothing_of_this_machine(tiny_bert, tmp_path, layout):
    path = write(load(tiny_bert), layout, tmp_path)
    proto = onnx.load(path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert b"/site-packages/" not in path.read_bytes()
    names = [output.name for output in proto.graph.output]
    assert names == (["last_hidden_state", "sentence_embedding"] if layout is Layout.PADDED else ["embedding"])


def test_large_weights_lie_beside_the_graph_and_it_still_runs(tiny_bert, tmp_path):
    reference = load(tiny_bert)
    path = write(reference, Layout.PACKED, tmp_path, external_data_bytes=1000)
    beside = path.with_name("graph.onnx_data")
    assert beside.stat().st_size > path.stat().st_size
    np.testing.assert_allclose(run_packed(path, reference, TEXTS)[:5], reference.encode(TEXTS), atol=1e-5)


def test_a_graph_that_lost_an_input_is_refused(tiny_bert, tmp_path):
    reference = load(tiny_bert)
    path = write(reference, Layout.PADDED, tmp_path)
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.input[:] = ["input_ids" if name == "token_type_ids" else name for name in node.input]
    onnx.save_model(proto, path)
    with pytest.raises(EngineError, match="token_type_ids"):
        check_graph(path, signature(Layout.PADDED, reference.spec, 32))


def test_a_graph_with_other_outputs_is_refused(tiny_bert, tmp_path):
    reference = load(tiny_bert)
    path = write(reference, Layout.PACKED, tmp_path)
    with pytest.raises(EngineError, match="but the contract is"):
        check_graph(path, signature(Layout.PACKED, dataclasses.replace(reference.spec, dim=31), 32))


def test_a_foreign_operator_is_refused(tiny_bert, tmp_path, monkeypatch):
    reference = load(tiny_bert)
    path = write(reference, Layout.PACKED, tmp_path)
    proto = onnx.load(path)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save_model(proto, path)
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)
    with pytest.raises(EngineError, match=r"com\.microsoft"):
        check_graph(path, signature(Layout.PACKED, reference.spec, 32))


def test_the_spec_decides_the_head(tiny_bert, tmp_path):
    reference = load(tiny_bert, Pooling.CLS)
    wrong = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, pooling=Pooling.MEAN))
    path = write(wrong, Layout.PACKED, tmp_path)
    assert np.abs(run_packed(path, reference, TEXTS)[:5] - reference.encode(TEXTS)).max() > 0.01


def test_a_packed_graph_that_cannot_be_translated_leaves_no_bundle(tiny_bert, tmp_path, monkeypatch):
    translate = trace.export_graph

    def fail(reference, layout, path, **options):
        if layout is Layout.PACKED:
            raise EngineError("PyTorch cannot translate the encoder to ONNX: no such operator")
        return translate(reference, layout, path, **options)

    monkeypatch.setattr(trace, "export_graph", fail)
    with pytest.raises(EngineError, match="no such operator"):
        build(Request(encoder=str(tiny_bert), output=tmp_path / "bundle", pooling=Pooling.MEAN))
    assert not list(tmp_path.iterdir())
