"""Both exported layouts of every family against Hugging Face's own forward pass, on each fp32 engine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from encoders.families import FAMILIES
from export.bundle.build import Request, build
from mirror_runtime.bundle import EngineName, Layout, Pooling, Precision
from mirror_runtime.host import has_bf16
from tests.support.tiny_encoders import MODELS, ragged_texts, write_tiny_encoder
from tests.support.trace_cache import cached_traces

PROVEN = {
    (EngineName.ONNXRUNTIME, Layout.PADDED),
    (EngineName.ONNXRUNTIME, Layout.PACKED),
    (EngineName.OPENVINO, Layout.PACKED),
}

SUITE = [("roberta", "mean"), ("modernbert", "mean"), ("qwen3", "last")]
"""BERT is the encoder of all other tests. These have all kinds of parts together: positions with an offset and no token
types; pre-norm, rotary positions, a window, fused projections and gates; causal attention with grouped keys, RMSNorm.
The forward pass that is traced equals Hugging Face's for every family (tests/encoders/test_families.py)."""

PRECISIONS: tuple[Precision, ...] = (Precision.FP32,)
TESTED = SUITE
if os.environ.get("MIRROR_ALL_FAMILIES"):  # see docs/reference/families.md
    HEADS = ("mean", "cls", "weighted_mean")
    TESTED = [
        (family, head.replace("cls", "last" if family == "qwen3" else "cls")) for head in HEADS for family in MODELS
    ]
    PRECISIONS += (Precision.FP16, Precision.INT8, *((Precision.BF16,) if has_bf16() else ()))


BEYOND_BF16 = {("eurobert", "cls"): {"openvino bf16 packed"}}
"""Random weights that PyTorch's own bf16 takes below the floor too: 0.9992 there, 0.9991 here (2026-11-30)."""


@pytest.fixture(scope="module", autouse=True)
def traces_from_cache() -> Iterator[None]:
    with cached_traces():
        yield


@pytest.mark.parity
@pytest.mark.trace
@pytest.mark.parametrize(("family", "pooling"), TESTED)
def test_both_layouts_are_exact(family: str, pooling: str, tmp_path: Path) -> None:
    # How layers follow each other is tested without graphs, but only the second has a window in ModernBERT.
    write_tiny_encoder(family, tmp_path / family, layers=2 if FAMILIES[family].rotary else 1)
    chosen: dict[str, Any] = {"pooling": Pooling(pooling), "texts": ragged_texts(), "precisions": PRECISIONS}
    exported = build(Request(encoder=str(tmp_path / family), output=tmp_path / "bundle", **chosen))
    assert {refused.name for refused in exported.refused} <= BEYOND_BF16.get((family, pooling), set())
    exact = [artifact for artifact in exported.manifest.artifacts if artifact.precision is Precision.FP32]
    proven = {(artifact.engine, artifact.layout): artifact for artifact in exact}
    assert set(proven) >= PROVEN
    for artifact in proven.values():
        assert artifact.parity.min_cosine >= 0.99999
        assert artifact.parity.max_abs_diff < 1e-5
        names = [tensor.name for tensor in artifact.inputs]
        assert ("token_type_ids" in names) == (artifact.layout is Layout.PADDED and FAMILIES[family].token_types)
        proto = onnx.load(tmp_path / "bundle" / artifact.path)
        assert {entry.domain for entry in proto.opset_import} == {""}
