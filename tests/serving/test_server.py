"""The real tritonserver on loopback: what goes in, what comes out, what is left behind."""

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray

from mirror_runtime import Encoder, TextError
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton import Client, Server, ServingOptions, Statistics
from mirror_runtime.triton.repository.render import write_repository
from mirror_runtime.triton.server.server import SHARED_MEMORY
from tests.support.fake_bundles import busy_texts

pytestmark = pytest.mark.serving

TEXTS = [
    "",
    " ",
    "a",
    "Zwei Häuser am See 🏠🏠",
    "one\x00two",
    *(" ".join(f"word{i}" for i in range(n)) for n in range(1, 40)),
]


@pytest.fixture
def raw(server: Server) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """Triton's own client: what others will use, and able to send what ours refuses to."""
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    yield client
    client.close()


def grpc_input(*texts: bytes) -> list[tritonclient.grpc.InferInput]:
    tensor = tritonclient.grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return [tensor]


def send_together(client: tritonclient.grpc.InferenceServerClient, requests: list[list[bytes]]) -> list[object]:
    """Send all requests before reading any answer; give results and exceptions in the requests' order."""
    answers: queue.Queue[tuple[int, object]] = queue.Queue()
    for number, texts in enumerate(requests):
        client.async_infer(
            "embed",
            grpc_input(*texts),
            lambda result, error, number=number: answers.put((number, error or result)),
            client_timeout=30,
        )
    return [answer for _, answer in sorted((answers.get(timeout=60) for _ in requests), key=lambda pair: pair[0])]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_served_vectors_equal_the_encoders(server: Server, fake_bundle: Path, protocol: str, batch_size: int) -> None:
    with Encoder.load(fake_bundle, engine="fake") as encoder, server.client(protocol) as client:
        expected = encoder.encode_detailed(TEXTS)
        served = client.encode_detailed(iter(TEXTS), batch_size=batch_size)
    assert served.vectors.dtype == np.float32
    np.testing.assert_array_equal(served.vectors, expected.vectors)
    np.testing.assert_array_equal(served.tokens, expected.tokens)
    np.testing.assert_array_equal(served.truncated, expected.truncated)
    assert expected.truncated.any()
    assert not expected.truncated.all()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_bad_texts_fail_alone_and_as_in_process(server: Server, fake_bundle: Path, protocol: str) -> None:
    texts: list[object] = ["good", 7, "bad \ud800", "fine", None, "last"]
    with Encoder.load(fake_bundle, engine="fake") as encoder, server.client(protocol) as client:
        expected = encoder.encode_detailed(texts)
        served = client.encode_detailed(texts)
        with pytest.raises(TextError, match="text 1: is int, not str"):
            client.encode(texts)  # type: ignore[arg-type]
    assert {i: str(e) for i, e in served.errors.items()} == {i: str(e) for i, e in expected.errors.items()}
    np.testing.assert_array_equal(served.vectors, expected.vectors)


def test_no_texts_give_an_empty_array(server: Server) -> None:
    with server.client() as client:
        assert client.encode([]).shape == (0, 16)


def test_client_refuses_a_single_string_and_too_large_a_batch(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(InputError, match="texts is one str"):
            client.encode("hello")
        with pytest.raises(InputError, match=r"batch_size is 257: this server takes 1 to 256"):
            client.encode(["hello"], batch_size=257)


def test_http_requests_stay_small_and_a_text_that_cannot_is_refused(server: Server) -> None:
    large = "x " * 300_000  # 600,000 bytes: two of them are over what one HTTP request may carry
    # The budget of tokens would part them too.
    with Client(f"127.0.0.1:{server.http_port}", protocol="http", batch_tokens=10**6, in_flight=1) as client:
        before, taken_before = settled_statistics(client), reading(server, "mirror_requests_total", "admitted")
        encoded = client.encode_detailed([large, large, "y" * 1_000_001, "small"])
        wait_until(lambda: client.statistics().inferences - before.inferences >= 3)
        after = client.statistics()
    assert list(encoded.errors) == [2]
    assert "1000001 bytes" in str(encoded.errors[2])
    np.testing.assert_array_equal(encoded.vectors[0], encoded.vectors[1])
    assert encoded.vectors[3].any()
    assert after.inferences - before.inferences == 3
    taken = reading(server, "mirror_requests_total", "admitted") - taken_before
    assert taken == 2, "two requests: one large text, then the other with the small one"


def test_sixteen_lengths_share_executions(server: Server, raw: tritonclient.grpc.InferenceServerClient) -> None:
    requests = [[" ".join(["word"] * n).encode()] for n in range(1, 17)]
    with server.client() as client:
        before, batches_before = settled_statistics(client), reading(server, "mirror_batches_total")
        # The first request keeps the model busy while the sixteen arrive, as traffic would.
        answers = send_together(raw, [busy_texts(), *requests])
        wait_until(lambda: client.statistics().inferences - before.inferences >= 256 + 16)
        after = client.statistics()
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    assert after.inferences - before.inferences == 256 + 16
    full = 256 * 64 // 1024
    assert full < reading(server, "mirror_batches_total") - batches_before <= full + 8


def test_invalid_utf8_fails_its_request_and_spares_the_neighbours(
    raw: tritonclient.grpc.InferenceServerClient, fake_bundle: Path
) -> None:
    good = [f"neighbour number {i}" for i in range(8)]
    requests = [busy_texts(), *([text.encode()] for text in good[:4]), [b"fine", b"bad \xff"]]
    requests += [[text.encode()] for text in good[4:]]
    answers = send_together(raw, requests)
    failed = [i for i, answer in enumerate(answers) if isinstance(answer, Exception)]
    assert failed == [5]
    error = answers[5]
    assert isinstance(error, tritonclient.grpc.InferenceServerException)
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "text 1: not valid UTF-8 (byte 0xff at offset 4)" in error.message()
    with Encoder.load(fake_bundle, engine="fake") as encoder:
        expected = encoder.encode(good)
    served = [a.as_numpy("EMBEDDING")[0] for i, a in enumerate(answers) if i not in (0, 5)]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.stack(served), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "array"),
    [
        ([1, 2], "BYTES", np.array([[b"a", b"b"]], dtype=np.object_)),
        ([1], "BYTES", np.array([b"a"], dtype=np.object_)),
        ([257, 1], "BYTES", np.array([[b"a"]] * 257, dtype=np.object_)),
        ([1, 1], "INT32", np.array([[1]], dtype=np.int32)),
    ],
    ids=["two columns", "no batch dimension", "over max_batch_size", "not text"],
)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_wrong_tensors_are_the_callers_fault(
    server: Server, protocol: str, shape: list[int], dtype: str, array: NDArray[Any]
) -> None:
    library = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    client = library.InferenceServerClient(f"127.0.0.1:{getattr(server, f'{protocol}_port')}")
    tensor = library.InferInput("TEXT", shape, dtype)
    tensor.set_data_from_numpy(array)
    with pytest.raises(library.InferenceServerException) as caught:
        client.infer("embed", [tensor])
    client.close()
    assert caught.value.status() == {"grpc": "StatusCode.INVALID_ARGUMENT", "http": "400"}[protocol]
    server.check()


def test_metrics_are_served(server: Server) -> None:
    assert 'nv_inference_count{model="embed",version="1"}' in metrics(server)


def test_a_port_in_use_is_named_with_its_flag(server: Server) -> None:
    second = Server(server.repository, grpc_port=server.grpc_port)
    with pytest.raises(ServerError, match=rf"port {server.grpc_port} on 127.0.0.1 .* --grpc-port"):
        second.start()
    server.check()


def test_no_server_is_a_clear_error() -> None:
    with socket.socket() as listener:  # bound and not listening: nobody answers there
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        for protocol in ("grpc", "http"):
            with Client(f"127.0.0.1:{port}", protocol=protocol) as client:
                assert not client.ready()
                with pytest.raises(ServerError, match="Is the server running there"):
                    client.encode(["hello"])


def test_a_written_repository_serves_wherever_it_is_moved(fake_bundle: Path, tmp_path: Path) -> None:
    folder = write_repository(fake_bundle, tmp_path / "here", ServingOptions(engine="fake", long_texts=LongTexts.ERROR))
    (tmp_path / "there").mkdir()
    folder.rename(tmp_path / "there" / "embed")
    with Server(tmp_path / "there") as mine, mine.client() as client:
        encoded = client.encode_detailed(["short", "long " * 100, "short"])
    assert list(encoded.errors) == [1]
    assert "has 102 tokens" in str(encoded.errors[1])
    np.testing.assert_array_equal(encoded.vectors[0], encoded.vectors[2])


def test_stop_does_not_wait_for_idle_http_connections_for_ever(server: Server) -> None:
    with Server(server.repository) as mine, socket.create_connection(("127.0.0.1", mine.http_port)) as idle:
        idle.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle.recv(4096)
        began = time.monotonic()
        mine.stop()
        assert time.monotonic() - began < 15
    assert not list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))


def test_an_http_client_outlives_a_restart_of_its_server(server: Server) -> None:
    mine = Server(server.repository)
    with mine:
        client = mine.client("http")
        before = client.encode(["hello"])
    with mine, client:  # on the same ports; the client still holds a connection of the first
        np.testing.assert_array_equal(client.encode(["hello"]), before)


@pytest.mark.slow
def test_a_server_that_ignores_the_signal_is_killed(server: Server) -> None:
    with Server(server.repository) as mine:
        pid = mine.pid
        os.kill(pid, signal.SIGSTOP)
        mine.stop()
        assert not members_of(pid)
    assert not list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))


def test_a_dead_model_process_is_noticed_and_stop_leaves_nothing(server: Server) -> None:
    with Server(server.repository) as mine:
        regions = list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))
        assert regions
        pid, members = mine.pid, members_of(mine.pid)
        assert len(members) == 2, "tritonserver and one model process"
        mine.check()
        os.kill(next(member for member in members if member != pid), signal.SIGKILL)
        wait_until(lambda: len(members_of(pid)) == 1)
        with pytest.raises(ServerError, match="the process that runs the model has died"):
            mine.check()
    assert not members_of(pid)
    assert not list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))


def test_what_a_killed_server_leaves_is_removed(server: Server) -> None:
    with Server(server.repository) as mine:
        others = set(SHARED_MEMORY.iterdir()) - set(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))
        pid = mine.pid
        for member in members_of(pid):
            os.kill(member, signal.SIGKILL)
        wait_until(lambda: not members_of(pid))
        assert list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*")), "else this test shows nothing"
        with pytest.raises(ServerError, match="tritonserver ended with signal SIGKILL"):
            mine.check()
    assert not list(SHARED_MEMORY.glob(f"{mine.shared_memory_prefix}*"))
    assert others <= set(SHARED_MEMORY.iterdir())


def test_a_server_that_cannot_load_its_model_says_why(server: Server, tmp_path: Path) -> None:
    (tmp_path / "embed" / "1").mkdir(parents=True)
    config = (server.repository / "embed" / "config.pbtxt").read_text()
    (tmp_path / "embed" / "config.pbtxt").write_text(config.replace('"fake"', '"warp"'))
    for part in ("1/model.py", "warmup"):
        (tmp_path / "embed" / part).symlink_to(server.repository / "embed" / part)
    broken = Server(tmp_path)
    with pytest.raises(ServerError, match="tritonserver ended with status 1") as caught, broken:
        pass
    assert "engine 'warp' is unknown" in str(caught.value)
    assert not list(SHARED_MEMORY.glob(f"{broken.shared_memory_prefix}*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_mirror_serve_ends_cleanly(fake_bundle: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mirror_runtime.cli", "serve", str(fake_bundle), "--engine", "fake"),
            *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("metrics"):
            break
    assert process.poll() is None, "".join(lines)
    address = next(line.split()[1] for line in lines if line.startswith("gRPC"))
    with Client(address) as client:
        assert client.encode(["hello"]).shape == (1, 16)
    assert list(SHARED_MEMORY.glob(f"mirror_{process.pid}_*"))
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == (-number if number is signal.SIGKILL else 0), rest
    assert "stopped" in rest or number is signal.SIGKILL
    # After SIGKILL nobody is left to clean up but Triton itself, which the kernel sends SIGTERM.
    wait_until(lambda: not list(SHARED_MEMORY.glob(f"mirror_{process.pid}_*")))
    with Client(address) as client:
        assert not client.ready()


def members_of(group: int) -> list[int]:
    """Processes of a group that are not zombies, by ps."""
    listing = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def metrics(server: Server) -> str:
    with socket.create_connection(("127.0.0.1", server.metrics_port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def reading(server: Server, name: str, outcome: str | None = None) -> float:
    """Read one of the model's own counters, which it brings up to date every second."""
    time.sleep(1.2)
    (line,) = [
        line
        for line in metrics(server).splitlines()
        if line.startswith(f"{name}{{") and (outcome is None or f'outcome="{outcome}"' in line)
    ]
    return float(line.rpartition(" ")[2])


def settled_statistics(client: Client) -> Statistics:
    """Read the counters when no earlier request is missing from them: Triton counts after it has answered."""
    before = client.statistics()
    while True:
        time.sleep(0.2)
        after = client.statistics()
        if after == before:
            return after
        before = after


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
