"""More than the model can do, too late, or not wanted any more: on the real server, with requests in hundreds."""

import queue
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from mirror_runtime.triton import Server, ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support.fake_bundles import busy_texts

pytestmark = pytest.mark.serving

HEAVY = busy_texts()
"""Some 17,000 tokens, as guessed: 29 such requests are within the limit below, and keep two cores busy for a while."""

LIMIT = 500_000
REFUSED = re.compile(r"overloaded: \d+ tokens are in flight and \d+ more would exceed 500000; retry after \d+ ms")


@dataclass(frozen=True)
class Answered:
    number: int
    at: float
    error: tritonclient.grpc.InferenceServerException | None


class Burst:
    """Requests sent without waiting, and their answers with the time they took."""

    def __init__(self, client: tritonclient.grpc.InferenceServerClient) -> None:
        self._client = client
        self._answers: queue.Queue[Answered] = queue.Queue()
        self._sent = 0

    def send(self, texts: list[bytes], timeout_us: int | None = None) -> object:
        number, began = self._sent, time.perf_counter()
        self._sent += 1
        tensor = tritonclient.grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
        return self._client.async_infer(
            "embed",
            [tensor],
            lambda result, error: self._answers.put(Answered(number, time.perf_counter() - began, error)),
            timeout=timeout_us,
        )

    def answers(self) -> list[Answered]:
        """Wait for an answer to everything that was sent."""
        found = [self._answers.get(timeout=60) for _ in range(self._sent)]
        return sorted(found, key=lambda answered: answered.number)


@pytest.fixture(scope="module")
def bounded(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("bounded")
    write_temporary_repository(fake_bundle, repository, ServingOptions(engine="fake", max_tokens_in_flight=LIMIT))
    with Server(repository) as running:
        yield running


@pytest.fixture
def burst(bounded: Server) -> Iterator[Burst]:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{bounded.grpc_port}")
    client.infer("embed", [one_text(b"warm")])
    yield Burst(client)
    client.close()


def one_text(text: bytes) -> tritonclient.grpc.InferInput:
    tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text]], dtype=np.object_))
    return tensor


def metric(server: Server, name: str, outcome: str | None = None) -> float:
    """Read one of our series once it has been brought up to date, which happens every second."""
    time.sleep(1.2)
    with urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    (line,) = [
        line for line in lines if line.startswith(f"{name}{{") and (outcome is None or f'outcome="{outcome}"' in line)
    ]
    assert 'model="embed"' in line
    return float(line.rpartition(" ")[2])


def test_what_is_too_much_is_refused_at_once_and_the_rest_is_served(bounded: Server, burst: Burst) -> None:
    before = metric(bounded, "mirror_requests_total", "refused")
    for _ in range(60):
        burst.send(HEAVY)
    answers = burst.answers()
    refused = [answered for answered in answers if answered.error is not None]
    served = [answered for answered in answers if answered.error is None]
    assert len(served) >= 29, "what fits must be taken"
    assert len(refused) >= 10, "else this test shows nothing"
    for answered in refused:
        assert answered.error is not None
        assert answered.error.status() == "StatusCode.UNAVAILABLE"
        assert REFUSED.search(answered.error.message())
    last = max(answered.at for answered in served)
    assert np.median([answered.at for answered in refused]) < 0.75 * last, "a refusal waits for no other request"
    assert metric(bounded, "mirror_requests_total", "refused") - before == len(refused)
    assert metric(bounded, "mirror_tokens_in_flight") == 0
    assert 0.9 < metric(bounded, "mirror_row_fill") <= 1
    recovered = Burst(burst._client)
    recovered.send(HEAVY)
    assert recovered.answers()[0].error is None


def test_a_request_whose_time_is_over_is_not_computed(bounded: Server, burst: Burst) -> None:
    before = metric(bounded, "mirror_requests_total", "expired")
    for _ in range(20):
        burst.send(HEAVY)
    burst.send([b"late"], timeout_us=5_000)
    burst.send([b"patient"], timeout_us=60_000_000)
    *heavy, late, patient = burst.answers()
    assert not [answered for answered in heavy if answered.error is not None]
    assert late.error is not None
    assert late.error.status() == "StatusCode.UNAVAILABLE"
    assert "the request's timeout of 5000 µs was over before work on it began" in late.error.message()
    assert patient.error is None
    assert metric(bounded, "mirror_requests_total", "expired") - before == 1


def test_http_carries_the_same_timeout(bounded: Server, burst: Burst) -> None:
    for _ in range(20):
        burst.send(HEAVY)
    tensor = tritonclient.http.InferInput("TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"late"]], dtype=np.object_))
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{bounded.http_port}")
    with pytest.raises(tritonclient.http.InferenceServerException, match="timeout of 5000 µs") as caught:
        client.infer("embed", [tensor], timeout=5_000)
    client.close()
    assert caught.value.status() == "503"
    burst.answers()


def test_a_cancelled_request_is_not_computed(bounded: Server, burst: Burst) -> None:
    before = metric(bounded, "mirror_requests_total", "cancelled")
    for _ in range(28):
        burst.send(HEAVY)
    context = burst.send([b"given up"])
    time.sleep(0.2)  # it has to get there first
    context.cancel()  # type: ignore[attr-defined]
    *heavy, cancelled = burst.answers()
    assert not [answered for answered in heavy if answered.error is not None]
    assert cancelled.error is not None
    assert cancelled.error.status() == "StatusCode.CANCELLED"
    assert metric(bounded, "mirror_requests_total", "cancelled") - before == 1
    assert metric(bounded, "mirror_tokens_in_flight") == 0
