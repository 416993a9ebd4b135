"""The clients against a real server: the same vectors, deadlines, cancelled calls, and a server that comes back."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from mirror_runtime import Encoder, TextError
from mirror_runtime.errors import DeadlineExceededError, ServerError, UnavailableError
from mirror_runtime.triton import AsyncClient, Client, Server
from mirror_runtime.triton.server.processes import runners

pytestmark = pytest.mark.serving

TEXTS = ["", "a", "Zwei Häuser am See 🏠🏠", *(" ".join(f"word{i}" for i in range(n)) for n in range(1, 90))]


def async_client(server: Server, protocol: str, **options: object) -> AsyncClient:
    port = server.grpc_port if protocol == "grpc" else server.http_port
    return AsyncClient(f"127.0.0.1:{port}", protocol=protocol, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def hung(server: Server) -> Iterator[None]:
    """The model's process stands still."""
    (runner,) = runners(server.pid, "embed")
    os.kill(runner, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(runner, signal.SIGCONT)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_asyncio_gives_the_encoders_vectors(server: Server, fake_bundle: Path, protocol: str) -> None:
    async def run() -> None:
        async with async_client(server, protocol, batch_tokens=100) as client:
            assert await client.ready()
            served = await client.encode_detailed(iter(TEXTS), batch_size=7)
            np.testing.assert_array_equal(served.vectors, expected.vectors)
            np.testing.assert_array_equal(served.tokens, expected.tokens)
            np.testing.assert_array_equal(served.truncated, expected.truncated)
            assert served.fingerprint == await client.fingerprint() == "0123456789abcdef"
            both = await asyncio.gather(*(client.encode([text]) for text in TEXTS[:20]))
            np.testing.assert_array_equal(np.concatenate(both), expected.vectors[:20])
            assert (await client.encode([])).shape == (0, 16)
            with pytest.raises(TextError, match="text 1: is int, not str"):
                await client.encode(["good", 7, "fine"])  # type: ignore[list-item]

    with Encoder.load(fake_bundle, engine="fake") as encoder:
        expected = encoder.encode_detailed(TEXTS)
    asyncio.run(run())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_reply_names_the_vector_space_and_another_one_is_refused(server: Server, protocol: str) -> None:
    url = f"127.0.0.1:{getattr(server, f'{protocol}_port')}"
    with Client(url, protocol=protocol, fingerprint="0123456789abcdef") as client:
        assert client.encode_detailed(["hello"]).fingerprint == "0123456789abcdef"
    with (
        Client(url, protocol=protocol, fingerprint="another") as client,
        pytest.raises(ServerError, match="returns vectors of 0123456789abcdef where another is expected"),
    ):
        client.encode(["hello"])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_deadlines_are_kept(server: Server, protocol: str) -> None:
    async def run() -> None:
        async with async_client(server, protocol) as client:
            await client.encode(["hello"])
            with hung(server), pytest.raises(DeadlineExceededError):
                await client.encode(["hello"], deadline_s=0.5)

    began = time.monotonic()
    with server.client(protocol) as client:
        client.encode(["hello"])
        with hung(server), pytest.raises(DeadlineExceededError):
            client.encode(["hello"] * 200, deadline_s=0.5)
    asyncio.run(run())
    assert time.monotonic() - began < 5


class Listener(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A gRPC server that answers no inference, and notes which ones are given up."""

    def __init__(self) -> None:
        self.taken = 0
        self.cancelled = 0

    async def ModelConfig(self, request: object, context: object) -> service_pb2.ModelConfigResponse:
        output = model_config_pb2.ModelOutput(name="EMBEDDING", data_type="TYPE_FP32", dims=[16])
        return service_pb2.ModelConfigResponse(
            config=model_config_pb2.ModelConfig(name="embed", max_batch_size=32, output=[output])
        )

    async def ModelInfer(self, request: object, context: object) -> None:
        self.taken += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def test_cancelling_a_call_cancels_its_requests() -> None:
    async def run() -> None:
        listener, server = Listener(), grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(listener, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with AsyncClient(f"127.0.0.1:{port}", in_flight=3) as client:
            call = asyncio.ensure_future(client.encode(["a"] * 10, 1))
            while listener.taken < 3:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            while listener.cancelled < 3:
                await asyncio.sleep(0.01)
        await server.stop(0)
        assert listener.taken == 3, "what was not sent yet is not sent"

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_server_that_nobody_started_is_named_at_once() -> None:
    async def run() -> None:
        async with AsyncClient("127.0.0.1:9", protocol=protocol) as client:
            with pytest.raises(UnavailableError, match="Is the server running there"):
                await client.encode(["hello"])

    for protocol in ("grpc", "http"):
        began = time.monotonic()
        with Client("127.0.0.1:9", protocol=protocol) as client, pytest.raises(UnavailableError, match="right port"):
            client.encode(["hello"])
        asyncio.run(run())
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_starts_again_is_waited_for(server: Server, protocol: str) -> None:
    mine = Server(server.repository)

    async def run() -> None:
        url = f"127.0.0.1:{getattr(mine, f'{protocol}_port')}"
        async with AsyncClient(url, protocol=protocol) as client:
            before = await client.encode(["hello"])
            mine.stop(grace_s=0)
            waiting = asyncio.ensure_future(client.encode(["hello"]))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            mine.start()
            np.testing.assert_array_equal(await waiting, before)

    with mine:
        asyncio.run(run())
