"""Both clients on a transport that needs no server: requests, order, retries, and rejected texts."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mirror_runtime.client import AsyncClient, Client
from mirror_runtime.client.exchange import FIRST_PAUSE_S, LONGEST_PAUSE_S, pause_before
from mirror_runtime.client.protocol import NotServed, Rejected, read_reply, server_error
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    MissingExtra,
    OverloadedError,
    ServerError,
    TextError,
    UnavailableError,
)
from tests.support.echo import AsyncEcho, Echo


class Blocking:
    """An `AsyncClient` that runs each call in an event loop of its own, so that both clients share the tests."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: asyncio.run(getattr(self._client, name)(*arguments, **options))


@pytest.fixture(params=["client", "asyncio"])
def make_client(monkeypatch, request):
    def make(echo: Echo, **options: Any) -> Any:
        monkeypatch.setattr("mirror_runtime.client.client.GrpcTransport", lambda *_: echo)
        monkeypatch.setattr("mirror_runtime.client.async_client.AsyncGrpcTransport", lambda *_: AsyncEcho(echo))
        return Client(**options) if request.param == "client" else Blocking(AsyncClient(**options))

    return make


@pytest.fixture
def no_pauses(monkeypatch):
    """Record pauses instead of waiting."""
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.extend([seconds] if seconds != 0.001 else [])
        await real(0)

    monkeypatch.setattr("mirror_runtime.client.client.time.sleep", pauses.append)
    monkeypatch.setattr("mirror_runtime.client.async_client.asyncio.sleep", sleep)
    return pauses


def test_order_is_kept_over_requests_in_flight(make_client):
    echo = Echo()
    texts = ["x" * (i % 9) for i in range(100)]
    encoded = make_client(echo, in_flight=3).encode_detailed(iter(texts), batch_size=8)
    assert encoded.vectors[:, 0].tolist() == [float(len(text)) for text in texts]
    assert encoded.tokens.tolist() == [len(text) for text in texts]
    assert encoded.truncated.tolist() == [len(text) > 5 for text in texts]
    assert [len(chunk) for chunk in echo.sent] == [8] * 12 + [4]
    assert echo.most_in_flight == 3


def test_requests_stay_below_the_byte_limit_of_the_transport_and_the_token_limit(make_client):
    echo = Echo(body_bytes=100)
    encoded = make_client(echo).encode_detailed(["a" * 40, "ü" * 20, "c" * 40, "d" * 101, "e"])
    assert all(sum(len(text) + 4 for text in chunk) <= 100 for chunk in echo.sent)
    assert [len(chunk) for chunk in echo.sent] == [2, 2]
    assert list(encoded.errors) == [3]
    assert "is 101 bytes" in str(encoded.errors[3])
    assert encoded.vectors[:, 0].tolist() == [40, 40, 40, 0, 1]
    echo = Echo(body_bytes=10**6)
    texts = ["x" * length for length in (40, 40, 40, 4000, 40, 4, 4, 4, 4)]
    encoded = make_client(echo, batch_tokens=36, in_flight=1).encode_detailed(texts)
    assert [[len(text) for text in chunk] for chunk in echo.sent] == [[40, 40, 40], [4000], [40, 4, 4, 4, 4]]
    assert encoded.vectors[:, 0].tolist() == [float(len(text)) for text in texts]


def test_rejected_texts_are_found_and_the_others_kept(make_client):
    texts = [f"text number {i}" for i in range(40)]
    for position in (0, 7, 8, 39):
        texts[position] = "bad"
    client = make_client(Echo())
    encoded = client.encode_detailed(texts, batch_size=16)
    assert {i: str(e) for i, e in encoded.errors.items()} == {i: f"text {i}: not acceptable" for i in (0, 7, 8, 39)}
    assert encoded.vectors[:, 0].tolist() == [0.0 if t == "bad" else float(len(t)) for t in texts]
    with pytest.raises(TextError, match="text 0: not acceptable"):
        client.encode(texts)
    with pytest.raises(ServerError, match="the server is down"):  # not a text's fault
        client.encode_detailed(["a", "down", "b"])


def test_another_projects_model_is_an_error(make_client):
    echo = Echo()
    echo.config = lambda: {"name": "resnet", "max_batch_size": 1, "output": []}  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="model 'resnet' has no output EMBEDDING"):
        make_client(echo).encode(["a"])

    outputs = {"EMBEDDING": np.zeros((1, 1)), "TOKENS": np.zeros((1, 1))}
    with pytest.raises(ServerError, match="the reply has no TRUNCATED, FINGERPRINT: serve the model with"):
        read_reply(Mock(as_numpy=outputs.get))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://127.0.0.1:8000"}, "without a scheme"),
        ({"protocol": "smtp"}, "protocol is 'smtp'"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_options_are_checked(options, message, kind):
    with pytest.raises(InputError, match=message):
        kind(**options)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_missing_tritonclient_names_the_extra(monkeypatch, protocol):
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)
    with pytest.raises(MissingExtra, match=r"\[client\]"):
        Client(protocol=protocol)
    with pytest.raises(MissingExtra, match=r"\[client\]"):
        asyncio.run(AsyncClient(protocol=protocol).encode(["a"]))


def test_the_fingerprint_comes_from_the_configuration_and_missing_counters_are_zero(make_client):
    echo = Echo()
    client = make_client(echo)
    statistics = Client().statistics()
    assert (statistics.inferences, statistics.executions) == (12, 0)
    with pytest.raises(ServerError, match="names no fingerprint"):
        client.fingerprint()
    echo.parameters = {"fingerprint": "0123456789abcdef"}
    assert client.fingerprint() == "0123456789abcdef"


def test_an_option_that_the_server_rejects_is_no_texts_fault(make_client):
    echo = Echo()
    echo.refusals = [Rejected("parameter 'dimensions' is 3: this encoder's vectors may have 8")]
    with pytest.raises(InputError, match="this encoder's vectors may have 8"):
        make_client(echo, in_flight=1).encode_detailed(["a", "b", "c", "d"], dimensions=3)
    assert len(echo.sent) == 1


def test_a_model_that_was_never_served_fails_the_first_call(make_client, no_pauses):
    echo = Echo()
    echo.config = Mock(side_effect=NotServed("embed is not found"))  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="is not found"):
        make_client(echo).encode(["a"])
    assert no_pauses == []


def test_every_request_carries_the_options_of_the_call(make_client):
    echo = Echo()
    client = make_client(echo)
    client.encode(["a", "b"], 1, truncate=False, dimensions=1, prompt="query: ")
    sent = {"truncate": False, "dimensions": 1, "prompt": "query: "}
    assert [parameters for parameters, _ in echo.options] == [sent] * 2
    client.encode(["a"])
    assert echo.options[-1][0] == {}


def test_refused_requests_are_repeated_and_failed_ones_are_not(make_client, no_pauses):
    echo = Echo()
    # A model that was served a moment ago is being unloaded.
    echo.refusals = [OverloadedError("full", 0.25), UnavailableError("starting"), NotServed("embed is not found")]
    client = make_client(echo, in_flight=1)
    assert client.encode(["a", "bc"], 1)[:, 0].tolist() == [1, 2]
    assert [chunk[0] for chunk in echo.sent] == [b"a", b"a", b"a", b"a", b"bc"]
    assert len(no_pauses) == 3
    assert 0.25 <= no_pauses[0] <= 0.25 + FIRST_PAUSE_S, "the server's hint, then the jitter"
    for error in (ServerError("a failure"), DeadlineExceededError("slow")):
        echo.refusals = [error]
        with pytest.raises(type(error), match=str(error)):
            client.encode(["a"])
    assert len(no_pauses) == 3


def test_the_refusal_is_raised_when_time_runs_out(make_client, no_pauses):
    echo = Echo()
    echo.refusals = [OverloadedError("full", 5.0)]
    with pytest.raises(OverloadedError, match="full"):
        make_client(echo).encode(["a"], deadline_s=4.0)
    assert no_pauses == [], "no pause may end after the deadline"
    assert echo.options[0][1] <= 4.0, "a request gets the rest of the deadline"
    echo.refusals = [UnavailableError("down")] * 1000
    with pytest.raises(UnavailableError, match="down"):
        make_client(echo, timeout_s=0.05).encode(["a"])


def test_a_deadline_limits_the_whole_call(make_client, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("mirror_runtime.client.exchange.time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Echo):
        def submit(self, texts, parameters, timeout_s):
            clock[0] += 0.25
            return super().submit(texts, parameters, timeout_s)

    echo = Slow()
    with pytest.raises(DeadlineExceededError, match="deadline_s has passed before all texts were answered"):
        make_client(echo, in_flight=1).encode([str(i) for i in range(100)], 1, deadline_s=1.0)
    assert len(echo.sent) == 4


def test_all_vectors_of_a_call_come_from_one_model_and_from_the_expected_one(make_client):
    echo = Echo()
    echo.fingerprints = ["old", "old", "new"]
    encoded = make_client(echo, in_flight=1).encode_detailed(["a", "bc", "def", "ghij"], 1)
    assert encoded.fingerprint == "new"
    assert [chunk[0] for chunk in echo.sent] == [b"a", b"bc", b"def", b"ghij", b"a", b"bc"]
    assert encoded.vectors[:, 0].tolist() == [1, 2, 3, 4]
    echo.fingerprints = [str(i) for i in range(100)]
    with pytest.raises(ServerError, match="replaced again and again"):
        make_client(echo).encode(["a", "b"], 1)
    with pytest.raises(ServerError, match="returns vectors of old where new is expected"):
        make_client(Echo(), fingerprint="new").encode(["a"])
    assert make_client(Echo(), fingerprint="old").encode(["a"]).shape == (1, 1)


def test_pauses_double_up_to_a_bound_with_full_jitter():
    jitter = Mock(side_effect=lambda low, high: high)
    pauses = [pause_before(tries, None, jitter) for tries in range(8)]
    assert pauses == [FIRST_PAUSE_S * 2**i for i in range(6)] + [LONGEST_PAUSE_S] * 2
    assert {call.args[0] for call in jitter.call_args_list} == {0}
    assert pause_before(10_000, 3.0, jitter) == 3.0 + LONGEST_PAUSE_S


@pytest.mark.parametrize(("patient", "pauses"), [(True, 2), (False, 1)])
def test_an_impatient_client_raises_an_overload_immediately(monkeypatch, no_pauses, patient, pauses):
    echo = Echo()
    echo.refusals = [UnavailableError("starting"), OverloadedError("full", 0.1)]
    monkeypatch.setattr("mirror_runtime.client.async_client.AsyncGrpcTransport", lambda *_: AsyncEcho(echo))
    with contextlib.nullcontext() if patient else pytest.raises(OverloadedError, match="full"):
        asyncio.run(AsyncClient(patient=patient).encode(["a"]))
    assert len(no_pauses) == pauses


@pytest.mark.parametrize(
    ("code", "message", "kind", "hint"),
    [
        ("UNAVAILABLE", "too many tokens wait: retry after 40 ms", OverloadedError, 0.04),
        ("HTTP 503", "too many tokens wait: retry in 1.5 s", OverloadedError, 1.5),
        ("UNAVAILABLE", "failed to connect to all addresses", UnavailableError, None),
        ("HTTP 503", "the server is stopping: try again", UnavailableError, None),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceededError, None),
        ("UNAVAILABLE", "the timeout of 9 µs was over before work on it began", DeadlineExceededError, None),
        ("INVALID_ARGUMENT", "text 0: no", Rejected, None),
        ("HTTP 400", "text 0: no", Rejected, None),
        ("INTERNAL", "Stub process 'embed_0_0' is not healthy.", UnavailableError, None),
        ("HTTP 500", "Stub process 'embed_0_0' is not healthy.", UnavailableError, None),
        ("INTERNAL", "encoding failed", ServerError, None),
        ("NOT_FOUND", "unknown model", NotServed, None),
        ("HTTP 404", "unknown model", NotServed, None),
    ],
)
def test_a_servers_error_becomes_our_exception(code, message, kind, hint):
    error = server_error("127.0.0.1:8001", code, message)
    assert type(error) is kind
    assert message in str(error)
    assert getattr(error, "retry_after_s", None) == hint
