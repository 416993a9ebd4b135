"""Raw text to served vectors, by the commands that a user runs: tune, export, encode, serve."""

import numpy as np
import pytest

from export import to_onnx, to_triton
from mirror_runtime import Encoder
from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli import main as mirror
from mirror_runtime.triton import Server
from tests.support.tiny_encoders import write_tiny_bert
from tests.support.trace_cache import cached_traces
from training import tune


@pytest.mark.serving
@pytest.mark.slow  # tuning, two traced graphs with their proof, and a tritonserver
def test_raw_text_becomes_a_tuned_encoder_whose_served_vectors_are_its_own(tmp_path, capsys):
    write_tiny_bert(base := tmp_path / "base", layers=1)
    corpus, run, bundle, models = (tmp_path / name for name in ("corpus.txt", "run", "bundle", "models"))
    lines = [f"the {noun} sat on a {place}" for noun in ("cat", "dog", "man") for place in ("mat", "river", "guitar")]
    corpus.write_text("\n".join(lines), encoding="utf-8")

    options = ["--pooling", "mean", "--epochs", "1", "--batch-size", "4", "--max-tokens", "16", "--probe", "none"]
    assert tune.main(["--base", str(base), "--corpus", str(corpus), "--output", str(run), *options]) == 0
    fp32 = ["--precision", "fp32", "--parity-texts", str(corpus)]
    with cached_traces():
        assert to_onnx.main([str(run), "--output", str(bundle), *fp32]) == 0
    vectors = tmp_path / "vectors.npy"
    assert mirror.main(["encode", str(bundle), str(corpus), "--output", str(vectors), "--engine", "onnxruntime"]) == 0
    encoded = np.load(vectors)
    assert to_triton.main([str(bundle), "--output", str(models), "--engine", "onnxruntime", "--precision", "fp32"]) == 0
    with Server(models) as server, server.client() as client:
        assert client.fingerprint() == read_manifest(bundle).fingerprint
        served = client.encode(lines)

    with Encoder.load(bundle, engine="onnxruntime", precision="fp32") as encoder:
        expected = encoder.encode(lines)
    assert expected.shape == (len(lines), 32)
    for found in (encoded, served):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(expected[0], expected[-1], atol=1e-2), "different texts have different vectors"
