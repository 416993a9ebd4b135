"""Heads from the command line to vectors: the bundle's encoder and `mirror verify` agree with the reference."""

import json
from pathlib import Path

import numpy as np
import pytest

from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from export.to_onnx import main
from mirror_runtime import Encoder
from mirror_runtime.bundle import Ditto, Pooling, VectorType, check_files, read_manifest
from mirror_runtime.cli.main import main as mirror
from mirror_runtime.vectors import components

WORDS = ("cat", "dog", "mat", "river", "guitar", "man", "sat", "playing")
TEXTS = [f"the {a} is on a {b} {i}" for i, a in enumerate(WORDS) for b in WORDS] + ["", "cat " * 90, "[MASK] or [PAD]"]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return str(path)


def exported(tiny_bert: Path, output: Path, lines: str, options: list[str]) -> None:
    fixed = ["--precision", "fp32", "--max-tokens", "32", "--parity-texts", lines]
    assert main([str(tiny_bert), "--output", str(output), *fixed, *options]) == 0


@pytest.mark.trace
@pytest.mark.parametrize(
    ("options", "head"),
    [
        (["--pooling", "mean_padded"], HeadSpec(pooling=Pooling.MEAN_PADDED)),
        (["--ditto", "1:0", "--layers", "0,-1"], HeadSpec(ditto=Ditto(layer=1, head=0), layers=(0, -1))),
        (
            ["--head", "mask", "--template", 'a "{text}" is [MASK] .'],
            HeadSpec(pooling=Pooling.MASK, template='a "{text}" is [MASK] .'),
        ),
    ],
    ids=["mean_padded", "ditto", "mask"],
)
def test_the_requested_head_is_served(tiny_bert, tmp_path, lines, options, head, capsys):
    output = tmp_path / "bundle"
    exported(tiny_bert, output, lines, options)
    expected = Reference.load(resolve(str(tiny_bert), max_tokens=32, head=head)).encode(TEXTS)
    for engine in ("onnxruntime", "openvino"):
        with Encoder.load(output, engine=engine, precision="fp32") as encoder:
            np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    assert mirror(["verify", str(output)]) == 0


@pytest.mark.trace
def test_whitening_a_cut_and_int8_in_one_command(tiny_bert, tmp_path, lines, capsys):
    output = tmp_path / "bundle"
    options = ["--pooling", "cls", "--whiten", lines, "--whiten-dim", "16", "--dim", "8", "--vector-type", "int8"]
    exported(tiny_bert, output, lines, options)
    manifest = read_manifest(output)
    check_files(output, manifest)
    spec = manifest.encoder
    assert (spec.dim, spec.vector_type, spec.dense[0].out_features) == (8, VectorType.INT8, 16)
    fitted = json.loads((output / "whitening.json").read_text())
    assert (fitted["texts"], fitted["dim"]) == (sum(bool(text) for text in TEXTS), 16)
    assert "whitening.json" in manifest.files
    assert "2_Dense/model.safetensors" in manifest.files
    # The bundle alone is as good as the encoder it was exported from.
    expected = Reference.load(resolve(str(output))).encode(TEXTS)
    with Encoder.load(output, engine="onnxruntime", precision="fp32") as encoder:
        found = encoder.encode(TEXTS)
    assert found.dtype == np.int8
    np.testing.assert_allclose(components(found, spec), expected, atol=1.01 * (spec.int8_scale or 0))
    assert (components(found, spec) == expected).mean() > 0.99
    assert mirror(["verify", str(output)]) == 0
