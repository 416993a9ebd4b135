"""Both exported layouts of every family against Hugging Face's own forward pass, on each fp32 engine."""

import os
from pathlib import Path
from typing import Any

import pytest

from encoders.families import FAMILIES
from export.bundle.build import Request, build
from mirror_runtime.bundle import Pooling, Precision
from mirror_runtime.host import has_bf16
from tests.support.graphs import check_exact
from tests.support.tiny_encoders import MODELS, ragged_texts, write_tiny_encoder

SUITE = [("mpnet", "mean"), ("qwen3", "last")]
"""BERT is the encoder of all other tests, and `test_whole_way` has ModernBERT: pre-norm, rotary positions, a window,
fused projections and gates. These have the rest: RoBERTa's positions with an offset and no token types, relative
positions; causal attention with grouped keys, RMSNorm. The forward pass that is traced equals Hugging Face's for every
family (tests/encoders/test_families.py), and the tests of half precision take the same traces."""

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


@pytest.mark.parity
@pytest.mark.trace
@pytest.mark.usefixtures("traces_from_cache")
@pytest.mark.parametrize(("family", "pooling"), TESTED)
def test_both_layouts_are_exact(family: str, pooling: str, tmp_path: Path) -> None:
    # How layers follow each other is tested without graphs, but only the second has a window in ModernBERT.
    write_tiny_encoder(family, tmp_path / family, layers=2 if FAMILIES[family].rotary else 1)
    chosen: dict[str, Any] = {"pooling": Pooling(pooling), "texts": ragged_texts(), "precisions": PRECISIONS}
    exported = build(Request(encoder=str(tmp_path / family), output=tmp_path / "bundle", **chosen))
    assert {refused.name for refused in exported.refused} <= BEYOND_BF16.get((family, pooling), set())
    check_exact(tmp_path / "bundle")
