"""Too much, too slow, broken, given up, about to stop: refusals are quick and nothing is lost."""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from mirror_runtime.errors import DeadlineExceededError, EngineError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.gateway.errors import refusal_of
from tests.support.gateways import FINGERPRINT, MODEL, running, vectors, wait_until


class Gate:
    """The engine waits here while it is closed, or fails when it is told to."""

    def __init__(self, engine) -> None:
        self.open = threading.Event()
        self.open.set()
        self.failure: Exception | None = None
        self.runs = 0
        self._run = engine.run

    def run(self, rows):
        self.runs += 1
        assert self.open.wait(20)
        if self.failure is not None:
            raise self.failure
        return self._run(rows)


@pytest.fixture
def gated(gateway_bundle, monkeypatch):
    with (
        running(gateway_bundle, max_batch=8, max_in_flight=8, timeout_s=5.0) as gateway,
        ThreadPoolExecutor(16) as pool,
    ):
        gate = Gate(gateway.encoder.engine)
        monkeypatch.setattr(gateway.encoder.engine, "run", gate.run)
        yield gateway, gate, pool
        gate.open.set()


def in_flight(gateway) -> float:
    return gateway.metric("mirror_gateway_texts_in_flight")


def test_what_is_too_much_is_refused_at_once_and_the_rest_is_answered(gated):
    gateway, gate, pool = gated
    gate.open.clear()
    taken = [pool.submit(gateway.embed, [f"{i} a", f"{i} b"]) for i in range(4)]
    wait_until(lambda: in_flight(gateway) == 8)
    began = time.perf_counter()
    refused = gateway.embed("one more")
    seconds = time.perf_counter() - began
    assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "overloaded", "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1
    assert "8 texts are being encoded and 1 more would exceed 8" in refused.error["message"]
    assert seconds < 0.5  # it waits for nothing; the bound of 20 ms is measured on a quiet machine
    gate.open.set()
    for i, reply in enumerate(answer.result() for answer in taken):
        found = vectors([item["embedding"] for item in reply.json["data"]])
        np.testing.assert_array_equal(found, gateway.encoder.encode([f"{i} a", f"{i} b"]))
    assert gateway.embed("one more").status == 200
    assert gateway.metric("mirror_gateway_refusals_total", code="overloaded") == 1


def test_the_openai_client_waits_as_it_is_told_and_succeeds(gated):
    gateway, gate, pool = gated
    gate.open.clear()
    taken = pool.submit(gateway.embed, ["text"] * 8)
    wait_until(lambda: in_flight(gateway) == 8)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as hasty:
        with pytest.raises(openai.RateLimitError):
            hasty.embeddings.create(model=MODEL, input="a")
        patient = pool.submit(hasty.with_options(max_retries=3).embeddings.create, model=MODEL, input="a")
        wait_until(lambda: gateway.metric("mirror_gateway_refusals_total", code="overloaded") == 2)
        gate.open.set()
        assert patient.result().data
    assert taken.result().status == 200


def test_overload_is_not_illness(gated):
    gateway, gate, pool = gated
    assert gateway.send("GET", "/health").json == {"status": "ok", "fingerprint": FINGERPRINT}
    gate.open.clear()
    taken = pool.submit(gateway.embed, ["text"] * 8)
    wait_until(lambda: in_flight(gateway) == 8)
    time.sleep(1.05)  # until the last success is no longer believed
    probe = pool.submit(gateway.send, "GET", "/health")
    time.sleep(0.1)
    assert not probe.done()
    gate.open.set()
    assert probe.result().status == taken.result().status == 200


def test_health_is_a_real_inference_that_is_believed_for_a_second(gated):
    gateway, gate, pool = gated
    assert gateway.send("GET", "/health").status == 200
    runs = gate.runs
    assert [reply.status for reply in pool.map(lambda _: gateway.send("GET", "/health"), range(10))] == [200] * 10
    assert gate.runs == runs
    gate.failure = EngineError("/secret/path: out of cheese")
    time.sleep(1.05)
    sick = list(pool.map(lambda _: gateway.send("GET", "/health"), range(5)))
    assert [reply.status for reply in sick] == [503] * 5
    assert gate.runs == runs + 1
    assert sick[0].error["code"] == "unhealthy"
    assert "retry-after" in sick[0].headers
    assert b"cheese" not in sick[0].body
    gate.failure = None
    time.sleep(1.05)
    assert gateway.send("GET", "/health").status == 200


def test_a_failing_engine_is_logged_under_the_requests_id_and_not_told(gated, caplog):
    gateway, gate, _ = gated
    gate.failure = RuntimeError("/secret/path: out of cheese")
    reply = gateway.send("POST", "/v1/embeddings", {"model": MODEL, "input": "a"}, {"X-Request-ID": "mine-7"})
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert b"secret" not in reply.body
    assert "request mine-7: RuntimeError: /secret/path: out of cheese" in caplog.text
    gate.failure = None
    assert gateway.embed("a").status == 200


def test_vectors_that_are_no_numbers_do_not_leave(gated, monkeypatch):
    gateway, gate, _ = gated
    monkeypatch.setattr(gate, "_run", lambda rows: np.full((rows.shape[0], rows.shape[1] // 4, 8), np.nan, np.float32))
    assert gateway.embed("a").status == 500
    assert gateway.send("GET", "/health").status == 503


def test_what_takes_too_long_is_refused_and_no_longer_wanted(gateway_bundle, monkeypatch):
    with running(gateway_bundle, timeout_s=0.2) as gateway:
        gate = Gate(gateway.encoder.engine)
        monkeypatch.setattr(gateway.encoder.engine, "run", gate.run)
        gate.open.clear()
        try:
            reply = gateway.embed("slow")
            assert (reply.status, reply.error["code"]) == (503, "deadline_exceeded")
            assert "retry-after" in reply.headers
            wait_until(lambda: in_flight(gateway) == 0)
        finally:
            gate.open.set()
        wait_until(lambda: gateway.embed("quick again").status == 200)


def test_a_client_that_leaves_takes_its_waiting_texts_along(gated):
    gateway, gate, pool = gated
    gate.open.clear()
    running_ones = []
    for i in range(2):  # one after the other, so that they are two batches and no more can start
        running_ones.append(pool.submit(gateway.embed, f"running {i}"))
        wait_until(lambda: gateway.service.backend._async.stats.batches == len(running_ones))
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    body = json.dumps({"model": MODEL, "input": ["never", "wanted"]})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    wait_until(lambda: in_flight(gateway) == 4)
    connection.close()
    wait_until(lambda: in_flight(gateway) == 2)
    gate.open.set()
    assert [answer.result().status for answer in running_ones] == [200, 200]
    assert gateway.service.backend._async.stats.dropped == 2
    wait_until(lambda: gateway.metric("mirror_gateway_requests_total", route="/v1/embeddings", status="499") == 1)


def test_a_gateway_about_to_stop_answers_and_asks_its_clients_to_leave(gated):
    gateway, _, _ = gated
    gateway.service.draining = True
    health = gateway.send("GET", "/health")
    assert (health.status, health.error["code"]) == (503, "draining")
    answer = gateway.embed("still answered")
    assert answer.status == 200
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (OverloadedError("x"), 429, "overloaded", "1"),
        (OverloadedError("x", retry_after_s=2.3), 429, "overloaded", "3"),
        (UnavailableError("10.0.0.7:8001 is away"), 503, "backend_unavailable", "1"),
        (DeadlineExceededError("10.0.0.7:8001 is slow"), 503, "deadline_exceeded", "1"),
        (ServerError("10.0.0.7:8001 answered INTERNAL"), 500, "internal_error", None),
        (ZeroDivisionError("x"), 500, "internal_error", None),
    ],
)
def test_failures_become_statuses_that_clients_understand(error, status, code, retry_after):
    refusal = refusal_of(error)
    assert (refusal.status, refusal.code, refusal.headers.get("retry-after")) == (status, code, retry_after)
    assert "10.0.0.7" not in refusal.message
