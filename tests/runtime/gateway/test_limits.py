"""Overload, timeouts, failures, disconnects and draining: refusals are immediate and no accepted request is lost."""

import asyncio
import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirror_runtime.client.protocol import NotServed
from mirror_runtime.errors import DeadlineExceededError, EngineError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.gateway import scheduler, server, service
from mirror_runtime.gateway.backends import ModelCard
from mirror_runtime.gateway.errors import refusal_of
from mirror_runtime.gateway.settings import GatewaySettings
from mirror_runtime.repeats import RepeatFilter
from mirror_runtime.retry_after import RetryEstimator
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.batching import EmbedRequest
from tests.support.fake_bundles import FINGERPRINT, EngineGate
from tests.support.fake_triton import tensor
from tests.support.gateways import MODEL, running, send, vectors
from tests.support.mirror_serve import wait_until


@pytest.fixture(scope="module")
def shared_gateway(gateway_bundle):
    with running(gateway_bundle, max_batch=8, max_in_flight=8, timeout_s=5.0) as gateway:
        yield gateway, EngineGate(gateway.encoder.engine)


@pytest.fixture
def gated(shared_gateway):
    """A gateway for 8 texts at a time, the gate of its engine, and a pool of clients."""
    gateway, gate = shared_gateway
    with ThreadPoolExecutor(16) as pool:
        yield gateway, gate, pool
        gate.failure = None
        gate.open()
    gateway.service._outcome_at = -service.FRESH_S
    gateway.service.draining = False


@pytest.fixture
def clock(monkeypatch):
    """The time that the service sees, in seconds."""
    seen: Any = SimpleNamespace(now=100.0, monotonic=lambda: seen.now)
    monkeypatch.setattr(service, "time", seen)
    monkeypatch.setattr(scheduler, "time", seen)
    return seen


def in_flight(gateway) -> float:
    return gateway.metric("mirror_gateway_texts_in_flight")


def fill(gateway, gate, pool):
    """Close the gate, and send as many texts as the gateway takes."""
    gate.close()
    accepted = pool.submit(gateway.embed, ["text"] * 8)
    wait_until(lambda: in_flight(gateway) == 8)
    return accepted


def refusals(gateway) -> float:
    return gateway.metric("mirror_gateway_refusals_total", code="overloaded")


def test_requests_over_the_limit_are_refused_immediately_with_a_measured_retry_after(gated, monkeypatch):
    gateway, gate, pool = gated
    clock = SimpleNamespace(now=0.0)
    estimator = RetryEstimator(lambda: clock.now)
    monkeypatch.setattr(gateway.service.scheduler, "load", estimator)
    estimator.enter(100)
    clock.now = 40.0
    assert estimator.rate == 0
    estimator.finish(100)  # 0.4 s a token
    assert estimator.rate == 2.5
    before = refusals(gateway)
    gate.close()
    accepted = [pool.submit(gateway.embed, [f"{i} a", f"{i} b"]) for i in range(4)]
    wait_until(lambda: in_flight(gateway) == 8)
    began = time.perf_counter()
    refused = gateway.embed("one more")
    seconds = time.perf_counter() - began
    assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "overloaded", "rate_limit_error")
    assert refused.headers["retry-after"] == "4"  # 8 texts of 2 tokens, half of them in 3.2 s
    assert "8 texts are being encoded and 1 more would exceed 8" in refused.error["message"]
    assert seconds < 0.5  # nothing waits; the bound of 20 ms is measured on a quiet machine
    gate.open()
    for i, reply in enumerate(answer.result() for answer in accepted):
        found = vectors([item["embedding"] for item in reply.json["data"]])
        np.testing.assert_array_equal(found, gateway.encoder.encode([f"{i} a", f"{i} b"]))
    assert estimator.in_flight == 0
    assert gateway.embed("one more").status == 200
    assert refusals(gateway) == before + 1


def test_the_openai_client_waits_as_told_and_succeeds(gated):
    from openai import RateLimitError

    gateway, gate, pool = gated
    before = refusals(gateway)
    accepted = fill(gateway, gate, pool)
    with gateway.client() as impatient:
        with pytest.raises(RateLimitError):
            impatient.embeddings.create(model=MODEL, input="a")
        patient = pool.submit(impatient.with_options(max_retries=3).embeddings.create, model=MODEL, input="a")
        wait_until(lambda: refusals(gateway) == before + 2)
        gate.open()
        assert patient.result().data
    assert accepted.result().status == 200


def test_a_busy_gateway_is_healthy_at_once_until_no_inference_ends(gated, clock):
    gateway, gate, pool = gated
    assert gateway.send("GET", "/health").json == {"status": "ok", "fingerprint": FINGERPRINT}
    accepted = fill(gateway, gate, pool)
    clock.now += service.FRESH_S  # the last success no longer counts, and a probe would wait
    assert gateway.send("GET", "/health").status == 200
    clock.now += service.PROBE_S
    stuck = gateway.send("GET", "/health")
    assert (stuck.status, stuck.error["code"]) == (503, "unhealthy")
    assert gateway.send("GET", "/health/live").json == {"status": "ok"}
    gate.open()
    assert accepted.result().status == 200
    assert gateway.send("GET", "/health").status == 200


def test_health_is_an_inference_whose_outcome_counts_for_a_second(gated, clock):
    gateway, gate, pool = gated
    assert gateway.send("GET", "/health").status == 200
    runs = gate.runs
    assert [reply.status for reply in pool.map(lambda _: gateway.send("GET", "/health"), range(10))] == [200] * 10
    assert gate.runs == runs
    gate.failure = EngineError("/secret/path: out of cheese")
    clock.now += service.FRESH_S
    unhealthy = list(pool.map(lambda _: gateway.send("GET", "/health"), range(5)))
    assert [reply.status for reply in unhealthy] == [503] * 5
    assert gate.runs == runs + 1
    assert unhealthy[0].error["code"] == "unhealthy"
    assert "retry-after" in unhealthy[0].headers
    assert b"cheese" not in unhealthy[0].body
    gate.failure = None
    clock.now += service.FRESH_S
    assert gateway.send("GET", "/health").status == 200


def test_triton_knows_the_probe_for_one(gated, clock, monkeypatch):
    gateway, _, _ = gated
    asked: list[list[str]] = []
    encode = gateway.service.backend.encode
    monkeypatch.setattr(gateway.service.backend, "encode", lambda texts: (asked.append(texts), encode(texts))[1])
    assert gateway.send("GET", "/health").status == 200
    assert [EmbedRequest(texts=tensor(*(text.encode() for text in texts))).is_probe for texts in asked] == [True]


def test_an_engine_failure_is_logged_under_the_request_id_and_not_sent(gated, caplog):
    gateway, gate, _ = gated
    gate.failure = RuntimeError("/secret/path: out of cheese")
    reply = gateway.send("POST", "/v1/embeddings", {"model": MODEL, "input": "a"}, {"X-Request-ID": "mine-7"})
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert b"secret" not in reply.body
    assert "request mine-7: RuntimeError: /secret/path: out of cheese" in caplog.text
    gate.failure = None
    assert gateway.embed("a").status == 200


def test_vectors_that_are_not_finite_are_not_sent(gated, monkeypatch):
    gateway, gate, _ = gated
    run = gate.run_engine
    monkeypatch.setattr(gate, "run_engine", lambda rows: run(rows) * np.float32("nan"))
    assert gateway.embed("a").status == 500
    assert gateway.send("GET", "/health").status == 503


def test_a_request_that_takes_too_long_is_refused_and_dropped(gated, monkeypatch):
    gateway, gate, _ = gated
    monkeypatch.setattr(gateway.service, "settings", SimpleNamespace(**vars(gateway.service.settings)))
    monkeypatch.setattr(gateway.service.settings, "timeout_s", 0.1)
    gate.close()
    reply = gateway.embed("slow")
    assert (reply.status, reply.error["code"]) == (503, "deadline_exceeded")
    assert "retry-after" in reply.headers
    wait_until(lambda: in_flight(gateway) == 0)
    gate.open()
    wait_until(lambda: gateway.embed("quick again").status == 200)


def test_the_waiting_texts_of_a_client_that_disconnects_are_dropped(gated):
    gateway, gate, pool = gated
    stats = gateway.service.backend._async.stats
    gate.close()
    encoding = []
    for i in range(2):  # one after the other, so that they form two batches and no third can start
        encoding.append(pool.submit(gateway.embed, f"encoding {i}"))
        wait_until(lambda: gateway.service.backend._async.stats.batches == stats.batches + len(encoding))
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    body = json.dumps({"model": MODEL, "input": ["never", "encoded"]})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    wait_until(lambda: in_flight(gateway) == 4)
    connection.close()
    wait_until(lambda: in_flight(gateway) == 2)
    gate.open()
    assert [answer.result().status for answer in encoding] == [200, 200]
    assert gateway.service.backend._async.stats.dropped == stats.dropped + 2
    assert gateway.service.scheduler.load.in_flight == 0, "dropped texts count as work in flight"
    wait_until(lambda: gateway.metric("mirror_gateway_requests_total", route="/v1/embeddings", status="499") == 1)


def test_a_draining_gateway_answers_and_closes_its_connections(gated):
    gateway, _, _ = gated
    gateway.service.draining = True
    health = gateway.send("GET", "/health")
    assert (health.status, health.error["code"]) == (503, "draining")
    answer = gateway.embed("still answered")
    assert answer.status == 200
    assert answer.headers["connection"] == "close"


class Hung:
    """A backend that never answers."""

    cached = None
    tokens_at_once = slice_tokens = 1024
    card = ModelCard(
        model=MODEL,
        fingerprint="f",
        dim=8,
        max_tokens=64,
        normalized=True,
        long_texts=LongTexts.TRUNCATE,
        engine="fake",
        precision="fp32",
        backend="in-process",
    )

    async def encode(self, texts):
        await asyncio.Event().wait()

    async def aclose(self):
        pass


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_ends_the_requests_under_way(monkeypatch, second):
    monkeypatch.setattr(server, "limit_repeats", RepeatFilter)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # also where a shell's & has it ignored
    listener = server.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]

    def interrupt():
        try:
            wait_until(lambda: b"in_flight 1.0" in send(port, "GET", "/metrics").body)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: send(port, "GET", "/health").error["code"] == "draining")
        finally:
            os.kill(os.getpid(), second)

    with listener, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(send, port, "POST", "/embed", {"inputs": "a"})
        interrupting = pool.submit(interrupt)
        began = time.monotonic()
        server.run(Hung(), GatewaySettings(model=MODEL, drain_s=5, timeout_s=9), listener, on_progress=lambda _: None)
        assert time.monotonic() - began < 5
        interrupting.result()
        assert isinstance(waiting.exception(), OSError)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (OverloadedError("x"), 429, "overloaded", "1"),
        (OverloadedError("x", retry_after_s=2.3), 429, "overloaded", "3"),
        (UnavailableError("10.0.0.7:8001 is away"), 503, "backend_unavailable", "1"),
        (NotServed("10.0.0.7:8001 answered NOT_FOUND"), 503, "backend_unavailable", "1"),
        (DeadlineExceededError("10.0.0.7:8001 is slow"), 503, "deadline_exceeded", "1"),
        (ServerError("10.0.0.7:8001 answered INTERNAL"), 500, "internal_error", None),
        (ZeroDivisionError("x"), 500, "internal_error", None),
    ],
)
def test_failures_become_statuses_that_clients_understand(error, status, code, retry_after):
    refusal = refusal_of(error)
    assert (refusal.status, refusal.code, refusal.headers.get("retry-after")) == (status, code, retry_after)
    assert "10.0.0.7" not in refusal.message
