"""A Triton server behind the gateway, replaced by a stand-in: its card, refusals, absences and new models."""

import asyncio
import time
from typing import Any

import pytest

from mirror_runtime.client import async_client, client
from mirror_runtime.client.protocol import ClientOptions
from mirror_runtime.errors import InputError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.gateway import backends
from mirror_runtime.gateway.backends import TritonBackend, fetch_card
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.service import GatewayService
from mirror_runtime.gateway.settings import GatewaySettings
from tests.support.echo import AsyncEcho, Echo

PARAMETERS = {
    **{"base_model": "some/encoder", "fingerprint": "first", "max_tokens": "64", "normalize": "true"},
    **{"long_texts": "truncate", "engine": "openvino", "precision": "bf16"},
}
OPTIONS = ClientOptions(url="127.0.0.1:8001", timeout_s=10)


class Server(Echo):
    """A server whose configuration can be refused too."""

    def __init__(self) -> None:
        super().__init__(1_000_000, dim=4)
        self.parameters = dict(PARAMETERS)
        self.fingerprints = ["first"]
        self.calls = 0

    def config(self) -> dict[str, Any]:
        self.calls += 1
        if self.refusals:
            raise self.refusals.pop()
        return super().config()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(client, "GrpcTransport", lambda url, model, timeout_s: server)
    monkeypatch.setattr(async_client, "AsyncGrpcTransport", lambda url, model: AsyncEcho(server))
    return server


def test_the_card_is_read_from_the_configuration_once_the_server_is_up(server, monkeypatch):
    card = fetch_card(OPTIONS)
    assert (card.model, card.fingerprint, card.dim, card.max_tokens) == ("some/encoder", "first", 4, 64)
    assert (card.normalized, card.engine, card.precision, card.prompts) == (True, "openvino", "bf16", None)
    assert card.dimensions == ()
    server.parameters["dimensions"] = "1,2"
    assert fetch_card(OPTIONS).dimensions == (1, 2)
    monkeypatch.setattr(backends, "_POLL_S", 0.01)
    server.calls = 0
    server.refusals = [UnavailableError("away")] * 3
    assert fetch_card(OPTIONS, wait_s=5).dim == 4
    assert server.calls == 4
    server.refusals = [UnavailableError("away")]
    with pytest.raises(UnavailableError):
        fetch_card(OPTIONS)


def test_an_old_repository_and_vectors_that_are_not_floats_are_refused(server):
    for missing in ("base_model", "max_tokens", "normalize", "fingerprint"):
        server.parameters = {name: value for name, value in PARAMETERS.items() if name != missing}
        with pytest.raises(ServerError, match=rf"has no {missing}: write its repository again"):
            fetch_card(OPTIONS)
    server.parameters = PARAMETERS
    for server.data_type in ("TYPE_INT8", "TYPE_UINT8"):
        with pytest.raises(InputError, match="responses cannot hold"):
            fetch_card(OPTIONS)


def test_an_overloaded_server_is_an_immediate_error_and_a_short_absence_is_retried(server):
    async def main():
        backend = TritonBackend(OPTIONS, fetch_card(OPTIONS))
        await backend.encode(["a"])
        server.refusals = [OverloadedError("full", retry_after_s=5)]
        began = time.monotonic()
        with pytest.raises(OverloadedError):
            await backend.encode(["a"])
        assert time.monotonic() - began < 1
        server.refusals = [UnavailableError("being replaced")]
        return await backend.encode(["a"])

    assert asyncio.run(main()).vectors.shape == (1, 4)


def test_a_replaced_model_gets_its_own_fingerprint_and_card(server):
    async def main():
        backend = TritonBackend(OPTIONS, fetch_card(OPTIONS))
        service = GatewayService(backend, GatewaySettings(model="m"), GatewayMetrics())
        before = await service.encode(["a"])
        server.parameters |= {"fingerprint": "second", "max_tokens": "128"}
        server.fingerprints = ["second"]
        after = await service.encode(["a"])
        return before.fingerprint, after.fingerprint, backend.card, service.metrics.page(backend.card).decode()

    before, after, card, page = asyncio.run(main())
    assert (before, after) == ("first", "second")
    assert (card.fingerprint, card.max_tokens) == ("second", 128)
    assert 'fingerprint="second"' in page
    assert 'fingerprint="first"' not in page
