"""Every engine on real weights and ragged real text."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import Encoder
from mirror_runtime.bundle import Layout, read_manifest
from mirror_runtime.cli.main import main
from mirror_runtime.host import has_bf16
from mirror_runtime.packing import PackedRows
from mirror_runtime.stdlib_texts import standard_library
from mirror_runtime.vectors import cosines

pytestmark = pytest.mark.parity

FLOORS = {"fp32": 0.99999, "bf16": 0.9995}
PAIRS = [("onnxruntime", "fp32"), ("openvino", "fp32")] + ([("openvino", "bf16")] if has_bf16() else [])


@pytest.fixture(scope="session")
def texts() -> list[str]:
    documented = standard_library()
    short = [item.summary for item in documented[::67]]
    long = sorted((item.text for item in documented), key=len)[-400::80]
    return [*short, *long, "", " ", "emoji 🤖 漢字", "nul \x00", "word " * 3000]


@pytest.fixture(scope="session")
def reference(minilm_bundle: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_bundle), device="cpu")
    return model.encode(texts, batch_size=16, normalize_embeddings=False)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def encoder(request: pytest.FixtureRequest, minilm_bundle: Path):
    engine, precision = request.param
    with Encoder.load(minilm_bundle, engine=engine, precision=precision, streams=2) as encoder:
        yield encoder


def test_the_manifest_states_proofs_above_their_floors_and_the_canaries_agree(minilm_bundle):
    artifacts = read_manifest(minilm_bundle).artifacts
    assert {artifact.layout for artifact in artifacts} == set(Layout)
    for artifact in artifacts:
        assert 120 < artifact.parity.texts < 500
        assert artifact.parity.min_cosine >= artifact.parity.floor
    assert main(["verify", str(minilm_bundle)]) == 0


def test_vectors_are_those_of_sentence_transformers_in_any_batch_and_thread(encoder, texts, reference):
    vectors, floor = encoder.encode(texts), FLOORS[encoder.engine.precision.value]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(reference, axis=1), 1.0, atol=1e-3)
    assert cosines(vectors, reference).min() >= floor
    assert encoder.encode(texts).tobytes() == vectors.tobytes(), "the same window gives the same bits"
    assert cosines(vectors, encoder.encode(texts[::-1])[::-1]).min() >= floor
    one_by_one = np.concatenate([encoder.encode([text]) for text in texts[::5]])
    assert cosines(vectors[::5], one_by_one).min() >= floor
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(encoder.encode, [texts[i:120:4] for i in range(4)])):
            assert cosines(found, vectors[i:120:4]).min() >= floor


def test_every_shape_runs_empty_slots_are_zeros_and_an_empty_batch_is_harmless(encoder):
    before = encoder.stats
    encoder.warm_up()
    assert encoder.stats == before, "warming up does not count as the caller's work"
    empty = np.zeros((3, 4, 64), np.int64)
    out = encoder.engine.run(PackedRows(input_ids=empty[0], position_ids=empty[1], segment_ids=empty[2]))
    assert out.shape == (4, 16, 384)
    assert not out.any()
