"""Every engine on real weights and ragged real text."""

import itertools
import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import Encoder, EngineError
from mirror_runtime.bundle import (
    Canaries,
    Canary,
    EngineName,
    Layout,
    Precision,
    read_canaries,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.cli.main import main
from mirror_runtime.engines import load_engine
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


def test_the_manifest_states_proofs_above_their_floors(minilm_bundle):
    artifacts = read_manifest(minilm_bundle).artifacts
    assert {artifact.layout for artifact in artifacts} == set(Layout)
    for artifact in artifacts:
        assert artifact.parity.texts >= 500
        assert artifact.parity.min_cosine >= artifact.parity.floor


def test_vectors_are_those_of_sentence_transformers(encoder, texts, reference):
    vectors = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(reference, axis=1), 1.0, atol=1e-3)
    assert cosines(vectors, reference).min() >= FLOORS[encoder.engine.precision.value]


def test_a_vector_does_not_depend_on_its_batch(encoder, texts):
    together = encoder.encode(texts)
    backwards = encoder.encode(texts[::-1])[::-1]
    picked = list(range(0, len(texts), 5))
    one_by_one = np.concatenate([encoder.encode([texts[i]]) for i in picked])
    floor = FLOORS[encoder.engine.precision.value]
    assert cosines(together, backwards).min() >= floor
    assert cosines(together[picked], one_by_one).min() >= floor


def test_the_same_window_gives_the_same_bits(encoder, texts):
    assert encoder.encode(texts).tobytes() == encoder.encode(texts).tobytes()


def test_empty_slots_are_zeros_and_an_empty_batch_is_harmless(encoder):
    empty = np.zeros((3, 4, 64), np.int64)
    out = encoder.engine.run(PackedRows(input_ids=empty[0], position_ids=empty[1], segment_ids=empty[2]))
    assert out.shape == (4, 16, 384)
    assert not out.any()


def test_bad_graphs_and_impossible_precisions_are_engine_errors(tmp_path: Path, minilm_bundle: Path):
    spec = read_manifest(minilm_bundle).encoder
    broken = tmp_path / "model_packed.onnx"
    broken.write_bytes((minilm_bundle / "onnx/model_packed.onnx").read_bytes()[:100_000])
    for engine in (EngineName.ONNXRUNTIME, EngineName.OPENVINO):
        with pytest.raises(EngineError, match=r"cannot load model_packed\.onnx"):
            load_engine(engine, Precision.FP32, broken, spec=spec)
        with pytest.raises(EngineError, match=r"not int8|cannot run in int8"):
            load_engine(engine, Precision.INT8, minilm_bundle / "onnx/model_packed.onnx", spec=spec)
    with pytest.raises(EngineError, match="no bf16 kernels"):
        load_engine(EngineName.ONNXRUNTIME, Precision.BF16, minilm_bundle / "onnx/model_packed.onnx", spec=spec)


def use_at_once(bundle: Path) -> None:
    """Encode for the first time in this process, with two encoders from two threads each."""
    encoders = [Encoder.load(bundle, engine="openvino", precision="fp32", streams=2) for _ in range(2)]
    texts = [[f"a b c {i} " * n for i in range(40)] for n in (1, 9)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job[0].encode(job[1]), itertools.product(encoders, texts)))


@pytest.mark.process
@pytest.mark.slow  # a race: it needs several new processes to show
def test_first_use_from_many_threads_at_once_does_not_deadlock(minilm_bundle: Path):
    for _ in range(3):
        process = multiprocessing.get_context("spawn").Process(target=use_at_once, args=(minilm_bundle,))
        process.start()
        process.join(120)
        process.kill()
        assert process.exitcode == 0


def test_every_shape_runs(encoder):
    before = encoder.stats
    encoder.warm_up()
    assert encoder.stats == before, "warming up does not count as the caller's work"


def test_verify_distinguishes_agreement_corruption_and_drift(minilm_bundle: Path, tmp_path: Path, capsys):
    assert main(["verify", str(minilm_bundle)]) == 0
    copy = shutil.copytree(minilm_bundle, tmp_path / "copy")
    data = bytearray((copy / "onnx/model_packed.onnx").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (copy / "onnx/model_packed.onnx").write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    assert "model_packed.onnx differ from the manifest" in capsys.readouterr().err
    # Drift: the files are intact, but the canaries are another encoder's.
    shutil.copytree(minilm_bundle, copy, dirs_exist_ok=True)
    others = tuple(Canary(text=c.text, vector=c.vector[::-1]) for c in read_canaries(copy))
    write_json(Canaries(canaries=others), copy / "canaries.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["canaries.json"] = sha256_file(copy / "canaries.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(copy)]) == 1
    assert '"failed": 0' not in capsys.readouterr().out


def test_threads_share_an_encoder(encoder, texts):
    expected = encoder.encode(texts[:120])
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(encoder.encode, [texts[i:120:4] for i in range(4)])
    for i, vectors in enumerate(results):
        assert cosines(vectors, expected[i::4]).min() >= FLOORS[encoder.engine.precision.value]
