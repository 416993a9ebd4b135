"""Both exported layouts of every family against Hugging Face's own forward pass, on each fp32 engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from encoders.families import FAMILIES
from export.bundle.build import Request, build
from mirror_runtime.bundle import EngineName, Layout, Pooling, Precision
from tests.support.tiny_encoders import ragged_texts, write_tiny_encoder
from tests.support.trace_cache import cached_traces

PROVEN = {
    (EngineName.ONNXRUNTIME, Layout.PADDED),
    (EngineName.ONNXRUNTIME, Layout.PACKED),
    (EngineName.OPENVINO, Layout.PACKED),
}

TESTED = [family for family in FAMILIES if family not in ("bert", "xlm-roberta", "camembert")]
"""BERT is the encoder of all other tests, XLM-R and CamemBERT have RoBERTa's description."""


@pytest.fixture(scope="module", autouse=True)
def traces_from_cache() -> Iterator[None]:
    with cached_traces():
        yield


@pytest.mark.parity
@pytest.mark.trace
@pytest.mark.parametrize("family", TESTED)
def test_both_layouts_are_exact(family: str, tmp_path: Path) -> None:
    write_tiny_encoder(family, tmp_path / family, layers=1)  # how layers follow each other: tests of the families
    chosen: dict[str, Any] = {"pooling": Pooling.MEAN, "texts": ragged_texts(), "precisions": (Precision.FP32,)}
    exported = build(Request(encoder=str(tmp_path / family), output=tmp_path / "bundle", **chosen))
    assert not exported.refused
    proven = {(artifact.engine, artifact.layout): artifact for artifact in exported.manifest.artifacts}
    assert set(proven) >= PROVEN
    for artifact in proven.values():
        assert artifact.parity.min_cosine >= 0.99999
        assert artifact.parity.max_abs_diff < 1e-5
        names = [tensor.name for tensor in artifact.inputs]
        assert ("token_type_ids" in names) == (artifact.layout is Layout.PADDED and FAMILIES[family].token_types)
        proto = onnx.load(tmp_path / "bundle" / artifact.path)
        assert {entry.domain for entry in proto.opset_import} == {""}
