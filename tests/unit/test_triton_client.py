"""The client's own work, with a transport that needs no server: chunks, order, and finding the texts at fault."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror_runtime.errors import InputError, MissingExtra, ServerError, TextError
from mirror_runtime.triton import Client
from mirror_runtime.triton.transport import Rejected, Reply


class Echo:
    """Answers with each text's length as its vector, and refuses requests that hold "bad"."""

    def __init__(self, body_bytes: int = 1000) -> None:
        self.body_bytes = body_bytes
        self.sent: list[list[bytes]] = []
        self.waiting = 0
        self.most_waiting = 0
        self.parameters: dict[str, Any] = {}

    def submit(self, texts: NDArray[Any]) -> Callable[[], Reply]:
        assert texts.ndim == 2
        assert texts.shape[1] == 1
        raw = list(texts[:, 0])
        self.sent.append(raw)
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)

        def wait() -> Reply:
            self.waiting -= 1
            if b"down" in raw:
                raise ServerError("the server is down")
            if b"bad" in raw:
                raise Rejected(f"[request id: 7] text {raw.index(b'bad')}: not to my taste")
            sizes = np.array([[len(text)] for text in raw])
            return Reply(vectors=sizes.astype(np.float32), tokens=sizes.astype(np.int32), truncated=sizes > 5)

        return wait

    def config(self) -> dict[str, Any]:
        return {
            "name": "embed",
            "max_batch_size": 64,
            "output": [{"name": "EMBEDDING", "data_type": "TYPE_FP32", "dims": ["1"]}],
            "parameters": self.parameters,
        }

    def statistics(self) -> dict[str, Any]:
        return {"inference_count": "12"}

    def close(self) -> None: ...


@pytest.fixture
def make_client(monkeypatch):
    def make(echo: Echo, in_flight: int = 4) -> Client:
        monkeypatch.setattr("mirror_runtime.triton.client.GrpcTransport", lambda *_: echo)
        return Client(in_flight=in_flight)

    return make


def test_order_is_kept_over_requests_in_flight(make_client):
    echo = Echo()
    texts = ["x" * (i % 9) for i in range(100)]
    encoded = make_client(echo, in_flight=3).encode_detailed(iter(texts), batch_size=8)
    assert encoded.vectors[:, 0].tolist() == [float(len(text)) for text in texts]
    assert encoded.tokens.tolist() == [len(text) for text in texts]
    assert encoded.truncated.tolist() == [len(text) > 5 for text in texts]
    assert [len(chunk) for chunk in echo.sent] == [8] * 12 + [4]
    assert echo.most_waiting == 3


def test_requests_stay_under_the_transports_bytes(make_client):
    echo = Echo(body_bytes=100)
    encoded = make_client(echo).encode_detailed(["a" * 40, "ü" * 20, "c" * 40, "d" * 101, "e"])
    assert all(sum(len(text) + 4 for text in chunk) <= 100 for chunk in echo.sent)
    assert [len(chunk) for chunk in echo.sent] == [2, 2]
    assert list(encoded.errors) == [3]
    assert "is 101 bytes" in str(encoded.errors[3])
    assert encoded.vectors[:, 0].tolist() == [40, 40, 40, 0, 1]


def test_the_texts_at_fault_are_found_and_the_others_kept(make_client):
    texts = [f"text number {i}" for i in range(40)]
    for position in (0, 7, 8, 39):
        texts[position] = "bad"
    encoded = make_client(Echo()).encode_detailed(texts, batch_size=16)
    assert {i: str(e) for i, e in encoded.errors.items()} == {i: f"text {i}: not to my taste" for i in (0, 7, 8, 39)}
    assert encoded.vectors[:, 0].tolist() == [0.0 if t == "bad" else float(len(t)) for t in texts]


def test_encode_raises_for_the_first_text_at_fault(make_client):
    with pytest.raises(TextError, match="text 3: not to my taste"):
        make_client(Echo()).encode(["a", "b", "c", "bad", "d", "bad"], batch_size=2)


def test_a_failing_server_is_not_mistaken_for_a_bad_text(make_client):
    with pytest.raises(ServerError, match="the server is down"):
        make_client(Echo()).encode_detailed(["a", "down", "b"])


def test_counters_that_are_left_out_are_zero(make_client):
    statistics = make_client(Echo()).statistics()
    assert (statistics.inferences, statistics.executions) == (12, 0)


def test_another_servers_model_is_named(make_client):
    echo = Echo()
    echo.config = lambda: {"name": "resnet", "max_batch_size": 1, "output": []}  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="model 'resnet' has no output EMBEDDING"):
        make_client(echo).encode(["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://127.0.0.1:8000"}, "without a scheme"),
        ({"protocol": "smtp"}, "protocol is 'smtp'"),
        ({"in_flight": 0}, "in_flight is 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Client(**options)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_missing_tritonclient_names_the_extra(monkeypatch, protocol):
    monkeypatch.setitem(__import__("sys").modules, f"tritonclient.{protocol}", None)
    with pytest.raises(MissingExtra, match=r"mirror-runtime\[client\]"):
        Client(protocol=protocol)


def test_the_server_names_its_vector_space(make_client):
    echo = Echo()
    client = make_client(echo)
    with pytest.raises(ServerError, match="names no fingerprint"):
        client.fingerprint()
    echo.parameters = {"fingerprint": {"string_value": "0123456789abcdef"}}
    assert client.fingerprint() == "0123456789abcdef"
