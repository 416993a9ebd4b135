"""The other ways to serve: a second model behind `embed`, several instances, and real weights."""

import dataclasses
import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from mirror_runtime import Encoder
from mirror_runtime.bundle import MANIFEST_FILE, EngineName, Precision, TensorSpec, read_manifest, write_json
from mirror_runtime.errors import ServerError
from mirror_runtime.triton import Server, ServingOptions
from mirror_runtime.triton.repository.options import Backend
from mirror_runtime.triton.repository.render import write_repository, write_temporary_repository
from mirror_runtime.triton.server.processes import group_members, resident_bytes, runners
from mirror_runtime.vectors import cosines
from tests.support.fake_bundles import artifact
from tests.support.mirror_serve import Load
from tests.support.paths import ROOT
from tests.support.triton_requests import metric, running, settled, text_input

pytestmark = pytest.mark.serving

TEXTS = ["", "one", "zwei Häuser", *(" ".join(["word"] * n) for n in range(1, 80))]


@pytest.fixture(scope="module")
def two_models(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`embed` and an `encoder` with the configuration for ONNX Runtime, except for the backend."""
    folder = tmp_path_factory.mktemp("two")
    bundle = shutil.copytree(fake_bundle, folder / "bundle")
    (bundle / "onnx").mkdir()
    (bundle / "onnx" / "model_packed.onnx").write_bytes(b"no graph")
    manifest = read_manifest(bundle)
    output = TensorSpec(name="embedding", dtype="float32", shape=("rows", "length // 4", manifest.encoder.dim))
    packed = artifact(EngineName.ONNXRUNTIME, Precision.FP32, outputs=(output,))
    write_json(dataclasses.replace(manifest, artifacts=(packed,)), bundle / MANIFEST_FILE)
    write_repository(bundle, folder / "models", ServingOptions(backend=Backend.ONNXRUNTIME, streams=2))
    encoder = folder / "models" / "encoder"
    config = (encoder / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    config = config.replace('backend: "onnxruntime"', 'backend: "python"').replace('"model.onnx"', '"model.py"')
    (encoder / "config.pbtxt").write_text(config)
    shutil.copy(ROOT / "tests/support/backend_stand_in.py", encoder / "1" / "model.py")
    with running(folder / "models") as server:
        yield server


def test_a_second_model_returns_the_encoders_vectors(two_models: Server, fake_bundle: Path) -> None:
    with Encoder.load(fake_bundle, engine="fake") as encoder, two_models.client() as client:
        expected = encoder.encode_detailed(TEXTS)
        for batch_size in (1, 64):
            served = client.encode_detailed(TEXTS, batch_size=batch_size)
            np.testing.assert_array_equal(served.vectors, expected.vectors)
            np.testing.assert_array_equal(served.truncated, expected.truncated)


def test_a_failing_second_model_fails_the_request_without_its_paths(two_models: Server) -> None:
    with two_models.client() as client:
        with pytest.raises(ServerError, match="encoding failed; the server's log says why") as caught:
            client.encode(["explode"])
        assert "secret" not in str(caught.value)
        assert client.encode(["fine"]).any()
    assert "graph.onnx broke" in two_models.log_tail(60)


def test_callers_who_cancel_and_expire_leave_two_models_whole(two_models: Server, fake_bundle: Path, request) -> None:
    """Few give up: one of some 30,000 gRPC requests that do crashes server 2.51, and with one model too."""
    with Encoder.load(fake_bundle, engine="fake") as encoder:
        expected = dict(zip(TEXTS, encoder.encode(TEXTS), strict=True))

    def answered(seed: int) -> Callable[[], int]:
        numbers, client = random.Random(seed), two_models.client()

        def call() -> int:
            texts = numbers.choices(TEXTS, k=numbers.choice((1, 4, 64)))
            np.testing.assert_array_equal(client.encode(texts), [expected[text] for text in texts])
            return len(texts)

        return call

    def given_up(seed: int) -> Callable[[], None]:
        numbers, client = (
            random.Random(seed),
            tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{two_models.grpc_port}"),
        )
        ways: Iterator[dict[str, Any]] = cycle([{}, {"client_timeout": 0.01}, {"timeout": 2000}])

        def call() -> None:
            done = threading.Event()
            texts = [text.encode() for text in numbers.choices(TEXTS, k=200)]
            sent = client.async_infer("embed", text_input(*texts), lambda result, error: done.set(), **next(ways))
            if not done.wait(numbers.uniform(0, 0.2)):
                sent.cancel()
            assert done.wait(30)

        return call

    def held() -> tuple[list[int], float]:
        return sorted(group_members(two_models.pid)), resident_bytes(group_members(two_models.pid)) / 1e6

    two_models.client().encode(TEXTS)
    processes, before = held()
    callers = [*map(answered, range(8)), given_up(100)]
    with Load(callers) as load:
        time.sleep(request.config.getoption("--two-models-seconds"))
    assert not load.failures(), load.failures()[0]
    ends = [partial(metric, two_models, "mirror_requests_total", end) for end in ("cancelled", "expired")]
    gone = sum(map(settled, ends))
    after, memory = held()
    texts = sum(outcome.result for outcome in load.outcomes if isinstance(outcome.result, int))
    logging.info(
        "%d calls, %d texts, %d given up in the queue, %.0f to %.0f MB", len(load.outcomes), texts, gone, before, memory
    )
    assert after == processes, "a process has died"
    assert memory < before + 200


def test_two_instances_share_the_work(fake_bundle: Path, tmp_path: Path) -> None:
    write_temporary_repository(fake_bundle, tmp_path, ServingOptions(engine="fake", instances=2))
    with running(tmp_path) as server, Encoder.load(fake_bundle, engine="fake") as encoder:
        assert len(runners(server.pid, "embed")) == 2
        with server.client() as client:
            np.testing.assert_array_equal(client.encode(TEXTS, batch_size=2), encoder.encode(TEXTS))


SOME = ["", "Delete a folder and everything in it.", "Remove a directory tree.", "The weather is fine today 🌞"]
SOME += ["one two three " * 60, *(" ".join(["word"] * n) for n in range(1, 40))]


@pytest.fixture(scope="module")
def real_server(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("real")
    write_repository(minilm_bundle, repository, ServingOptions(engine="onnxruntime", precision="fp32"), link=True)
    with running(repository) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_served_vectors_are_the_encoders(real_server: Server, minilm_bundle: Path, protocol: str) -> None:
    with Encoder.load(minilm_bundle, engine="onnxruntime", precision="fp32") as encoder:
        expected = encoder.encode(SOME)
    with real_server.client(protocol) as client:
        served = client.encode(SOME, batch_size=8)
        alone = np.concatenate([client.encode([text]) for text in SOME[:8]])
    assert served.shape == expected.shape == (len(SOME), 384)
    # The server packs the rows differently, so the last bits may differ.
    assert cosines(served, expected).min() >= 0.999999
    assert cosines(served[:8], alone).min() >= 0.999999, "a text's vector does not depend on its batch"
    assert float(served[1] @ served[2]) > float(served[1] @ served[3]) + 0.2, "similar texts have similar vectors"
