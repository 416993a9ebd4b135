"""Raw text to served vectors, by the commands that a user runs: tune, export, encode, serve."""

from pathlib import Path

import numpy as np
import pytest

from export import to_onnx, to_triton
from mirror_runtime import Encoder
from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli import main as mirror
from mirror_runtime.triton import Server
from tests.support.gateways import running, vectors
from tests.support.graphs import check_exact
from tests.support.tiny_encoders import ragged_texts, write_tiny_encoder, write_tiny_static
from tests.support.trace_cache import cached_traces
from training import tune

LINES = [f"the {noun} sat on a {place}" for noun in ("cat", "dog", "man") for place in ("mat", "river", "guitar")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def check_served(encoder: Path, corpus: Path, texts: list[str], folder: Path) -> None:
    """Export an encoder; the command line, Triton and the gateway answer with the vectors that it has in process."""
    bundle, models, output = folder / "bundle", folder / "models", folder / "vectors.npy"
    (ragged := folder / "ragged.txt").write_text("\n".join(map(" ".join, map(str.split, ragged_texts()))), "utf-8")
    with cached_traces():
        fp32 = ["--precision", "fp32", "--parity-texts", str(ragged)]
        assert to_onnx.main([str(encoder), "--output", str(bundle), *fp32]) == 0
    assert mirror.main(["verify", str(bundle)]) == 0, "also where a canary has a vector of zeros"
    assert mirror.main(["encode", str(bundle), str(corpus), "--output", str(output), "--engine", "onnxruntime"]) == 0
    chosen = ["--engine", "onnxruntime", "--precision", "fp32"]
    assert to_triton.main([str(bundle), "--output", str(models), *chosen]) == 0
    with Server(models) as server, server.client() as client:
        assert client.fingerprint() == read_manifest(bundle).fingerprint
        served = client.encode(texts)
    with running(bundle, engine="onnxruntime") as gateway:
        answered = vectors([one["embedding"] for one in gateway.embed(texts).json["data"]])
        expected = gateway.encoder.encode(texts)
    assert expected.shape == (len(texts), 32)
    for found, wanted in ((np.load(output), expected[: len(LINES)]), (served, expected), (answered, expected)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not np.allclose(expected[0], expected[len(LINES) - 1], atol=1e-2), "different texts have different vectors"
    with Encoder.load(bundle, engine="openvino", precision="fp32") as other:
        np.testing.assert_allclose(other.encode(texts), expected, atol=1e-5)


@pytest.mark.serving
@pytest.mark.slow  # tuning, two traced graphs with their proof, and a tritonserver
def test_raw_text_becomes_a_tuned_encoder_whose_served_vectors_are_its_own(corpus, tmp_path, capsys):
    """A tuned BERT is exported by the example of documents (tests/documents/test_examples.py)."""
    base, run = tmp_path / "base", tmp_path / "run"
    write_tiny_encoder("modernbert", base)
    options = ["--pooling", "mean", "--epochs", "1", "--batch-size", "4", "--max-tokens", "16", "--probe", "none"]
    assert tune.main(["--base", str(base), "--corpus", str(corpus), "--output", str(run), *options]) == 0
    check_served(run, corpus, LINES, tmp_path)
    check_exact(tmp_path / "bundle")


@pytest.mark.serving
@pytest.mark.slow  # two traced graphs with their proof, and a tritonserver
def test_a_static_encoder_is_served_also_for_texts_without_tokens(corpus, tmp_path, capsys):
    """Of model2vec; what differs in sentence-transformers' is in its graphs (tests/encoders/test_static.py)."""
    write_tiny_static("model2vec", tmp_path / "base")
    check_served(tmp_path / "base", corpus, [*LINES, "", "漢語", "the 漢 cat"], tmp_path)


def test_a_static_encoder_is_not_tuned(corpus, tmp_path, capsys):
    write_tiny_static("static", tmp_path / "base")
    options = ["--base", str(tmp_path / "base"), "--output", str(tmp_path / "run"), "--probe", "none"]
    assert tune.main([*options, "--corpus", str(corpus)]) == 2
    assert "has no layers to tune" in capsys.readouterr().err
