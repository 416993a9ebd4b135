"""Overload, timeouts and cancellation on the real server, with bursts of requests."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from mirror_runtime.triton import Server, ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support.fake_bundles import busy_texts
from tests.support.mirror_serve import wait_until
from tests.support.triton_requests import Burst, metric, running, text_input

pytestmark = pytest.mark.serving

HEAVY = busy_texts()[:128]
"""An estimated 8,500 tokens: 29 such requests are within the limit below, and keep two cores busy for a while."""

LIMIT = 250_000
REJECTED = rf"overloaded: \d+ tokens are in flight and \d+ more would exceed {LIMIT}; retry after \d+ ms"


@pytest.fixture(scope="module")
def bounded(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("bounded")
    write_temporary_repository(fake_bundle, repository, ServingOptions(engine="fake", max_tokens_in_flight=LIMIT))
    with running(repository) as server:
        yield server


@pytest.fixture
def burst(bounded: Server) -> Iterator[Burst]:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{bounded.grpc_port}")
    client.infer("embed", text_input(b"warm"))
    yield Burst(client)
    client.close()


def requests(server: Server, outcome: str) -> float:
    return metric(server, "mirror_requests_total", outcome)


def test_requests_over_the_limit_are_rejected_immediately_and_the_others_served(bounded: Server, burst: Burst) -> None:
    for _ in range(60):
        burst.send(HEAVY)
    answers = burst.answers()
    served = [answer for answer in answers if answer.error is None]
    errors = [answer.error for answer in answers if answer.error is not None]
    assert len(served) >= 29, "requests that fit must be accepted"
    assert len(errors) >= 10, "else this test proves nothing"
    for error in errors:
        assert error.status() == "StatusCode.UNAVAILABLE"
        assert re.search(REJECTED, error.message())
    last = max(answer.seconds for answer in served)
    rejected_after = np.median([answer.seconds for answer in answers if answer.error is not None])
    assert rejected_after < 0.75 * last, "a rejection does not wait for other requests"
    wait_until(lambda: requests(bounded, "refused") == len(errors))
    wait_until(lambda: metric(bounded, "mirror_tokens_in_flight") == 0)
    assert 0.9 < metric(bounded, "mirror_row_fill") <= 1
    burst.send(HEAVY)
    assert burst.answers()[-1].error is None


def test_expired_and_cancelled_requests_are_not_computed(bounded: Server, burst: Burst) -> None:
    for _ in range(24):
        burst.send(HEAVY)
    burst.send(HEAVY, timeout_us=5_000)  # a small one would overtake
    burst.send([b"patient"], timeout_us=60_000_000)
    context = burst.send(HEAVY)
    time.sleep(0.2)  # it has to arrive first
    context.cancel()
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{bounded.http_port}")
    with pytest.raises(tritonclient.http.InferenceServerException, match="timeout of 5000 µs") as caught:
        client.infer("embed", text_input(*HEAVY, library=tritonclient.http), timeout=5_000)
    client.close()
    assert caught.value.status() == "503"
    *heavy, late, patient, cancelled = burst.answers()
    assert not [answer for answer in heavy if answer.error is not None]
    assert late.error is not None
    assert late.error.status() == "StatusCode.UNAVAILABLE"
    assert "the request's timeout of 5000 µs was over before work on it began" in late.error.message()
    assert patient.error is None
    assert cancelled.error is not None
    assert cancelled.error.status() == "StatusCode.CANCELLED"
    wait_until(lambda: requests(bounded, "expired") == 2)
    wait_until(lambda: requests(bounded, "cancelled") == 1)
    wait_until(lambda: metric(bounded, "mirror_tokens_in_flight") == 0)
