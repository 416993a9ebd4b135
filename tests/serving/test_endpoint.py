"""The shared tritonserver on loopback: both protocols and both clients, right vectors, deadlines, cancelled calls."""

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
from mirror_runtime.encoder import Encoded
from mirror_runtime.errors import DeadlineExceededError, InputError, UnavailableError
from mirror_runtime.triton import AsyncClient, Client, Server
from mirror_runtime.triton.server.processes import runners
from tests.support.fake_bundles import busy_texts
from tests.support.mirror_serve import wait_until
from tests.support.triton_requests import Burst, metric, settled

pytestmark = pytest.mark.serving

PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "http"])

TEXTS = ["", " ", "a", "Zwei Häuser am See 🏠🏠", "one\x00two"]
TEXTS += [" ".join(f"word{i}" for i in range(n)) for n in range(1, 90)]


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> Encoded:
    """The encoder's own result for `TEXTS`."""
    with Encoder.load(fake_bundle, engine="fake") as encoder:
        result = encoder.encode_detailed(TEXTS)
    assert result.truncated.any()
    assert not result.truncated.all()
    return result


def assert_equal(served: Encoded, expected: Encoded) -> None:
    assert served.vectors.dtype == np.float32
    np.testing.assert_array_equal(served.vectors, expected.vectors)
    np.testing.assert_array_equal(served.tokens, expected.tokens)
    np.testing.assert_array_equal(served.truncated, expected.truncated)
    assert {i: str(e) for i, e in served.errors.items()} == {i: str(e) for i, e in expected.errors.items()}


def async_client(server: Server, protocol: str, **options: object) -> AsyncClient:
    port = server.grpc_port if protocol == "grpc" else server.http_port
    return AsyncClient(f"127.0.0.1:{port}", protocol=protocol, **options)  # type: ignore[arg-type]


@PROTOCOLS
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_served_vectors_equal_the_encoders(server: Server, expected: Encoded, protocol: str, batch_size: int) -> None:
    with server.client(protocol) as client:
        served = client.encode_detailed(iter(TEXTS), batch_size=batch_size)
    assert_equal(served, expected)
    assert served.fingerprint == "0123456789abcdef"


@PROTOCOLS
def test_the_async_client_returns_the_encoders_vectors(server: Server, expected: Encoded, protocol: str) -> None:
    async def run() -> None:
        async with async_client(server, protocol, batch_tokens=100) as client:
            assert await client.ready()
            served = await client.encode_detailed(iter(TEXTS), batch_size=7)
            assert_equal(served, expected)
            assert served.fingerprint == await client.fingerprint() == "0123456789abcdef"
            parallel = await asyncio.gather(*(client.encode([text]) for text in TEXTS[:20]))
            np.testing.assert_array_equal(np.concatenate(parallel), expected.vectors[:20])
            assert (await client.encode([])).shape == (0, 16)
            with pytest.raises(TextError, match="text 1: is int, not str"):
                await client.encode(["good", 7, "fine"])  # type: ignore[list-item]

    asyncio.run(run())


@PROTOCOLS
def test_invalid_texts_fail_alone_and_as_in_process_and_invalid_calls_are_rejected(server, fake_bundle, protocol):
    texts: list[object] = ["good", 7, "bad \ud800", "fine", None, "last"]
    with Encoder.load(fake_bundle, engine="fake") as encoder, server.client(protocol) as client:
        assert_equal(client.encode_detailed(texts), encoder.encode_detailed(texts))
        with pytest.raises(TextError, match="text 1: is int, not str"):
            client.encode(texts)
        assert client.encode([]).shape == (0, 16)
        with pytest.raises(InputError, match="texts is one str"):
            client.encode("hello")
        with pytest.raises(InputError, match=r"batch_size is 257: this server takes 1 to 256"):
            client.encode(["hello"], batch_size=257)


def test_http_requests_stay_small_and_a_text_over_the_limit_is_rejected(server: Server) -> None:
    large = "x" * 600_000  # two of them are more than one HTTP request may carry
    # The token limit would separate them too.
    with Client(f"127.0.0.1:{server.http_port}", protocol="http", batch_tokens=10**6, in_flight=1) as client:
        before = settled(client.statistics)
        admitted = settled(lambda: metric(server, "mirror_requests_total", "admitted"))
        encoded = client.encode_detailed([large, large, "y" * 1_000_001, "small"])
        wait_until(lambda: client.statistics().inferences == before.inferences + 3)
    assert list(encoded.errors) == [2]
    assert "1000001 bytes" in str(encoded.errors[2])
    np.testing.assert_array_equal(encoded.vectors[0], encoded.vectors[1])
    assert encoded.vectors[3].any()
    # Two requests: one large text, then the other with the small one.
    wait_until(lambda: metric(server, "mirror_requests_total", "admitted") == admitted + 2)


def test_requests_of_sixteen_lengths_share_executions(server, raw):
    batches = settled(lambda: metric(server, "mirror_batches_total"))
    burst = Burst(raw)
    burst.send(busy_texts())  # keeps the model busy while the sixteen arrive, as traffic would
    for words in range(1, 17):
        burst.send([b" ".join([b"word"] * words)])
    assert not [answer for answer in burst.answers() if answer.error]
    full = 256 * 64 // 1024
    alone = 256  # the rows of a slice of three texts are run one by one
    assert full < settled(lambda: metric(server, "mirror_batches_total")) - batches <= alone + 8


@contextlib.contextmanager
def hung(server: Server) -> Iterator[None]:
    """Stop the model's process meanwhile."""
    (runner,) = runners(server.pid, "embed")
    os.kill(runner, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(runner, signal.SIGCONT)


@PROTOCOLS
def test_deadlines_are_kept(server: Server, protocol: str) -> None:
    async def run() -> None:
        async with async_client(server, protocol) as client:
            await client.encode(["hello"])
            with hung(server), pytest.raises(DeadlineExceededError):
                await client.encode(["hello"], deadline_s=0.3)

    began = time.monotonic()
    with server.client(protocol) as client:
        client.encode(["hello"])
        with hung(server), pytest.raises(DeadlineExceededError):
            client.encode(["hello"] * 200, deadline_s=0.3)
    asyncio.run(run())
    assert time.monotonic() - began < 5


class Listener(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A gRPC server that answers no inference and counts cancelled ones."""

    received = cancelled = 0

    async def ModelConfig(self, request: object, context: object) -> service_pb2.ModelConfigResponse:
        output = model_config_pb2.ModelOutput(name="EMBEDDING", data_type="TYPE_FP32", dims=[16])
        config = model_config_pb2.ModelConfig(name="embed", max_batch_size=32, output=[output])
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: object, context: object) -> None:
        self.received += 1
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
            while listener.received < 3:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            while listener.cancelled < 3:
                await asyncio.sleep(0.01)
        await server.stop(0)
        assert listener.received == 3, "no further request is sent"

    asyncio.run(asyncio.wait_for(run(), 20))


@PROTOCOLS
def test_a_missing_server_is_reported_immediately(protocol: str) -> None:
    async def run() -> None:
        async with AsyncClient("127.0.0.1:9", protocol=protocol) as client:
            with pytest.raises(UnavailableError, match="Is the server running there"):
                await client.encode(["hello"])

    began = time.monotonic()
    with Client("127.0.0.1:9", protocol=protocol) as client:
        assert not client.ready()
        with pytest.raises(UnavailableError, match="right port"):
            client.encode(["hello"])
    asyncio.run(run())
    assert time.monotonic() - began < 5
