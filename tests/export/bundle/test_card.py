"""The model card states what the manifest states, and nothing else."""

import dataclasses

from export.bundle.card import certificate_card
from mirror_runtime.bundle import Activation, Dense, EngineName, Layout, Precision, StsScore
from tests.support.fake_bundles import PARITY, artifact, encoder_spec

SPEC = encoder_spec()


ARTIFACTS = [
    artifact(EngineName.ONNXRUNTIME, Precision.FP32, Layout.PADDED, path="onnx/model.onnx"),
    artifact(
        EngineName.OPENVINO, Precision.BF16, parity=dataclasses.replace(PARITY, min_cosine=0.9999997, floor=0.9995)
    ),
]


def test_every_artifact_has_its_row_and_nothing_is_rounded_up():
    card = certificate_card(SPEC, ARTIFACTS, "0123456789abcdef")
    assert "`0123456789abcdef`" in card
    assert "| `onnx/model.onnx` | onnxruntime | fp32 |" in card
    row = next(line for line in card.splitlines() if "bf16" in line)
    assert "| 0.9995 | 0.999999 |" in row
    assert "points" not in card


def test_quality_has_a_column_for_each_artifact():
    score = StsScore(name="stsb-test", pairs=1379, sha256="0" * 64, reference=82.034, artifact=81.9)
    measured = [dataclasses.replace(a, parity=dataclasses.replace(a.parity, sts=(score,))) for a in ARTIFACTS]
    card = certificate_card(SPEC, measured, "0123456789abcdef")
    assert "| set | pairs | PyTorch | onnxruntime fp32 padded | openvino bf16 packed |" in card
    assert "| stsb-test | 1,379 | 82.03 | 81.90 | 81.90 |" in card


def test_only_heads_that_sentence_transformers_has_are_offered_to_it():
    assert "SentenceTransformer(" in certificate_card(SPEC, ARTIFACTS, "f")
    dense = Dense(in_features=8, out_features=8, bias=True, activation=Activation.IDENTITY)
    averaged = dataclasses.replace(SPEC, layers=(1, -1), dense=(dense,), template="query: {text}")
    card = certificate_card(averaged, ARTIFACTS, "f")
    assert "SentenceTransformer(" not in card
    assert "layers 1, -1 averaged, dense to 8, unit length, every text set into `query: {text}`" in card
