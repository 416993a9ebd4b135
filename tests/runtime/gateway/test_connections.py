"""Bounds on connections, over raw sockets: heads, times, numbers, unread answers, and proposals to upgrade."""

import contextlib
import http.client
import json
import socket
import time
from typing import Any

import pytest

from mirror_runtime.gateway.connections import Connection, Connections
from tests.support.fake_bundles import EngineGate
from tests.support.gateways import running, send
from tests.support.mirror_serve import wait_until

HEAD = b"GET /info HTTP/1.1\r\nHost: 127.0.0.1\r\n"
EMBED = HEAD.replace(b"GET /info", b"POST /embed") + b"Content-Type: application/json\r\n"
CHUNKED = EMBED + b"Transfer-Encoding: chunked\r\n\r\n"
TIMES: dict[str, Any] = {"header_s": 0.4, "body_s": 0.4, "answer_s": 0.4, "idle_s": 0.4}


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, max_header_bytes=4096, max_headers=20) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def impatient(gateway_bundle):
    with running(gateway_bundle, **TIMES) as gateway:
        yield gateway


def connect(gateway, *sent: bytes, source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", gateway.port), 10, (source, 0))
    for part in sent:
        connection.sendall(part)
    return connection


def received(connection: socket.socket) -> bytes:
    """Read until the gateway closes the connection."""
    found = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


def dropped(gateway, reason: str) -> float:
    return gateway.metric("mirror_gateway_connections_dropped_total", reason=reason)


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (b"GET /", b"x" * 4096),
        (b"", b"\r\n" * 2048),
        (HEAD + b"X-Long: ", b"x" * 4096),
        (HEAD, b"".join(b"X-%d: y\r\n" % i for i in range(100))),
        (HEAD, b"".join(b"X-%d: %b\r\n" % (i, b"y" * 800) for i in range(10))),
        (CHUNKED, b"1;" + b"extension" * 500),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"".join(b"X-%d: y\r\n" % i for i in range(100))),
        (CHUNKED + b"1\r\n{\r\n0\r\nX-Trailer: ", b"x" * 4096),
    ],
    ids=["address", "blank lines", "one header", "headers", "long headers", "chunk", "trailers", "one trailer"],
)
def test_an_endless_head_is_refused_and_its_connection_closed(gateway, begin, endless):
    before = dropped(gateway, "headers_too_large")
    connection = connect(gateway, begin)
    with contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(endless)
    reply = received(connection)
    head, body = reply.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert dropped(gateway, "headers_too_large") == before + 1
    assert gateway.embed("still healthy").status == 200


def test_what_is_not_a_request_in_http_is_refused_without_a_line_in_the_log(gateway, caplog):
    for line in (b"\x16\x03\x01 hello", b"GET http://host HTTP/1.1", b"GET http://[ HTTP/1.1"):
        assert received(connect(gateway, line + b"\r\nHost: host\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert received(connect(gateway, b"CONNECT evil:80 HTTP/1.1\r\nHost: evil\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
    before = dropped(gateway, "headers_too_large")
    tunnel = connect(gateway, b"CONNECT evil:80 HTTP/1.1\r\nHost: evil\r\n\r\n" + b"x" * 10_000)
    assert received(tunnel).count(b"HTTP/1.1 ") == 1
    assert dropped(gateway, "headers_too_large") == before
    assert received(connect(gateway, (HEAD + b"\r\n") * 1000)).count(b"HTTP/1.1 200") < 20
    assert not caplog.records


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ([], b""),
        ([HEAD], b"HTTP/1.1 408 "),
        ([EMBED + b"Content-Length: 30\r\n\r\n", b'{"inputs'], b"HTTP/1.1 408 "),
        ([HEAD + b"\r\n"], b"HTTP/1.1 200 "),
        ([HEAD + b"\r\n", HEAD], b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "half a head", "half a body", "idle", "another half head"],
)
def test_a_client_that_does_not_go_on_loses_its_connection(impatient, sent, answer):
    began = time.monotonic()
    assert received(connect(impatient, *sent)).startswith(answer)
    assert 0.3 < time.monotonic() - began < 5
    wait_until(lambda: impatient.metric("mirror_gateway_connections") == 0)


def test_a_trickle_does_not_extend_the_time(impatient):
    connection = connect(impatient, HEAD)
    began = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 5:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.05)
    assert b" 408 " in received(connection) or time.monotonic() - began < 5


def test_an_answer_that_is_not_read_is_given_up(impatient):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient.port))
        body = json.dumps({"inputs": [f"{i}" for i in range(2048)]}).encode() + b" " * 100_000
        for _ in range(20):  # more answers than sockets buffer
            connection.sendall(EMBED + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            if dropped(impatient, "answer timeout"):
                break
            time.sleep(0.1)
        wait_until(lambda: dropped(impatient, "answer timeout") == 1)
    wait_until(lambda: impatient.metric("mirror_gateway_connections") == 0)


def test_when_there_are_too_many_the_one_that_waits_longest_is_closed(gateway_bundle):
    with running(gateway_bundle, max_connections=4, max_peer_connections=3) as gateway:
        proven = http.client.HTTPConnection("127.0.0.1", gateway.port)
        proven.request("GET", "/info")
        proven.getresponse().read()
        idle = [connect(gateway) for _ in range(2)]
        other = connect(gateway, source="127.0.0.2")
        assert gateway.embed("from the same address").status == 200  # the first of the idle ones makes room
        assert received(idle[0]) == b""
        with contextlib.closing(connect(gateway, HEAD + b"\r\n", source="127.0.0.3")) as third:
            assert third.recv(12) == b"HTTP/1.1 200"
        proven.request("GET", "/info")
        assert proven.getresponse().status == 200
        assert dropped(gateway, "evicted") >= 1
        proven.close()
        for connection in (other, *idle):
            connection.close()


def test_a_connection_is_refused_only_when_all_others_wait_for_the_gateway(gateway_bundle):
    with running(gateway_bundle, max_connections=2) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        gate.close()
        body = b'{"inputs": "a"}'
        request = EMBED + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        working = [connect(gateway, request) for _ in range(2)]
        wait_until(lambda: gateway.metric("mirror_gateway_texts_in_flight") == 2)
        assert b" 503 " in received(connect(gateway))
        gate.open()
        assert all(received(connection).startswith(b"HTTP/1.1 200 ") for connection in working)


@pytest.mark.parametrize("together", [True, False])
def test_the_work_for_a_connection_that_its_client_has_closed_is_dropped(gateway_bundle, together):
    with running(gateway_bundle) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        gate.close()
        bodies = [b'{"inputs": "text %d"}' % number for number in range(4)]
        first, *others = (EMBED + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies)
        connection = connect(gateway, first + b"".join(others) if together else first)
        wait_until(lambda: gate.runs)
        for request in () if together else others:
            connection.sendall(request)
            time.sleep(0.02)  # apart, so that they are read one by one
        connection.close()
        try:
            wait_until(lambda: gateway.metric("mirror_gateway_texts_in_flight") == 0, 5)
        finally:
            gate.open()
        assert gateway.embed("a text").status == 200
        assert gate.runs == 2, "one of the pipeline, which was under way, and the last"


def test_a_head_behind_a_full_pipeline_does_not_resume_reading(gateway_bundle, monkeypatch):
    opened: list[Connection] = []
    add = Connections.add
    monkeypatch.setattr(Connections, "add", lambda all, one: (opened.append(one), add(all, one))[1])
    with running(gateway_bundle) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        gate.close()
        small, full = b'{"inputs": "a"}', b'{"inputs": "a"}'.ljust(65_600)  # more than may wait, by less than its head
        requests = [EMBED + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in (small, full)]
        with connect(gateway, requests[0]) as connection:
            wait_until(lambda: gate.runs)
            connection.sendall(requests[1] + HEAD + b"\r\n")
            wait_until(lambda: len(opened[-1].pipeline) == 2)
            assert opened[-1].flow.read_paused
            gate.open()
            wait_until(lambda: opened[-1].answers == 3)


def test_an_upgrade_is_ignored_and_its_body_kept(gateway):
    h2c = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAA"}
    reply = send(gateway.port, "POST", "/embed", {"inputs": "a text"}, h2c)
    assert reply.status == 200
    assert reply.body == gateway.send("POST", "/embed", {"inputs": "a text"}).body
    head, body = EMBED + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 15\r\n\r\n", b'{"inputs": "a"}'
    with connect(gateway, head) as connection:
        connection.sendall(body[:5])
        connection.sendall(body[5:])
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
    ],
)
def test_only_allowed_hosts_are_answered(gateway_bundle, host, status):
    with running(gateway_bundle, allowed_hosts=("localhost", "127.0.0.1", "[::1]")) as gateway:
        assert [gateway.send("GET", path, headers={"Host": host}).status for path in ("/health", "/info")] == [
            status
        ] * 2
