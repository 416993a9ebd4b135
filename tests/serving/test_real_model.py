"""Real weights behind a real server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import Encoder
from mirror_runtime.triton import Server, ServingOptions
from mirror_runtime.triton.repository.render import write_repository
from mirror_runtime.vectors import cosines
from tests.support.triton_requests import running

pytestmark = [pytest.mark.serving, pytest.mark.slow]

TEXTS = ["", "Delete a folder and everything in it.", "Remove a directory tree.", "The weather is fine today 🌞"]
TEXTS += ["one two three " * 60, *(" ".join(["word"] * n) for n in range(1, 40))]


@pytest.fixture(scope="module")
def real_server(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("real")
    write_repository(minilm_bundle, repository, ServingOptions(engine="onnxruntime", precision="fp32"), link=True)
    with running(repository) as server:
        yield server


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_served_vectors_are_the_encoders(real_server: Server, minilm_bundle: Path, protocol: str) -> None:
    with Encoder.load(minilm_bundle, engine="onnxruntime", precision="fp32") as encoder:
        expected = encoder.encode(TEXTS)
    with real_server.client(protocol) as client:
        served = client.encode(TEXTS, batch_size=8)
        alone = np.concatenate([client.encode([text]) for text in TEXTS[:8]])
    assert served.shape == expected.shape == (len(TEXTS), 384)
    # The server packs the rows differently, so the last bits may differ.
    assert cosines(served, expected).min() >= 0.999999
    assert cosines(served[:8], alone).min() >= 0.999999, "a text's vector does not depend on its batch"
    assert float(served[1] @ served[2]) > float(served[1] @ served[3]) + 0.2, "similar texts have similar vectors"
