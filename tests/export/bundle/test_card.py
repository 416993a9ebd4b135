"""The model card states what the manifest states, and nothing else."""

import dataclasses

import pytest

from export.bundle.card import certificate_card
from mirror_runtime.bundle import Activation, Dense, EngineName, Layout, Precision, StsScore
from tests.support.fake_bundles import encoder_spec

SPEC = encoder_spec()


@pytest.fixture
def artifacts(make_artifact):
    padded = dataclasses.replace(
        make_artifact(EngineName.ONNXRUNTIME, Precision.FP32, Layout.PADDED), path="onnx/model.onnx"
    )
    packed = make_artifact(EngineName.OPENVINO, Precision.BF16)
    packed = dataclasses.replace(packed, parity=dataclasses.replace(packed.parity, min_cosine=0.9999997, floor=0.9995))
    return [padded, packed]


def test_every_artifact_has_its_row_and_nothing_is_rounded_up(artifacts):
    card = certificate_card(SPEC, artifacts, "0123456789abcdef")
    assert "`0123456789abcdef`" in card
    assert "| `onnx/model.onnx` | onnxruntime | fp32 |" in card
    row = next(line for line in card.splitlines() if "bf16" in line)
    assert "| 0.9995 | 0.999999 |" in row
    assert "points" not in card


def test_quality_has_a_column_for_each_artifact(artifacts):
    score = StsScore(name="stsb-test", pairs=1379, sha256="0" * 64, reference=82.034, artifact=81.9)
    measured = [dataclasses.replace(a, parity=dataclasses.replace(a.parity, sts=(score,))) for a in artifacts]
    card = certificate_card(SPEC, measured, "0123456789abcdef")
    assert "| set | pairs | PyTorch | onnxruntime fp32 padded | openvino bf16 packed |" in card
    assert "| stsb-test | 1,379 | 82.03 | 81.90 | 81.90 |" in card


def test_only_heads_that_sentence_transformers_has_are_offered_to_it(artifacts):
    assert "SentenceTransformer(" in certificate_card(SPEC, artifacts, "f")
    dense = Dense(in_features=8, out_features=8, bias=True, activation=Activation.IDENTITY)
    averaged = dataclasses.replace(SPEC, layers=(1, -1), dense=(dense,), template="query: {text}")
    card = certificate_card(averaged, artifacts, "f")
    assert "SentenceTransformer(" not in card
    assert "layers 1, -1 averaged, dense to 8, unit length, every text set into `query: {text}`" in card
