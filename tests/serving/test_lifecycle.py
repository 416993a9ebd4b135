"""Servers that start, stop, crash or come back: what callers see, and that nothing is left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime.errors import ServerError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton import AsyncClient, Client, Server, ServingOptions
from mirror_runtime.triton.repository.render import write_repository
from mirror_runtime.triton.server.processes import group_members
from mirror_runtime.triton.server.workspace import SHARED_MEMORY, Workspace
from tests.support.mirror_serve import MirrorServe, wait_until
from tests.support.paths import ROOT

pytestmark = pytest.mark.serving


def regions(server: Server) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))


def test_a_port_in_use_is_reported_with_its_flag(server: Server) -> None:
    second = Server(server.repository, grpc_port=server.grpc_port)
    with pytest.raises(ServerError, match=rf"port {server.grpc_port} on 127.0.0.1 .* --grpc-port"):
        second.start()
    server.check()


def test_a_moved_repository_serves_and_an_idle_connection_delays_the_stop_only_briefly(fake_bundle, tmp_path):
    folder = write_repository(fake_bundle, tmp_path / "here", ServingOptions(engine="fake", long_texts=LongTexts.ERROR))
    (tmp_path / "there").mkdir()
    folder.rename(tmp_path / "there" / "embed")
    with Server(tmp_path / "there") as own, socket.create_connection(("127.0.0.1", own.http_port)) as idle:
        with own.client() as client:
            encoded = client.encode_detailed(["short", "long " * 100, "short"])
        assert list(encoded.errors) == [1]
        assert "has 102 tokens" in str(encoded.errors[1])
        np.testing.assert_array_equal(encoded.vectors[0], encoded.vectors[2])
        idle.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle.recv(4096)
        began = time.monotonic()
        own.stop()
        assert time.monotonic() - began < 15
    assert not regions(own)


def test_clients_wait_for_a_server_that_restarts(server: Server) -> None:
    own = Server(server.repository)

    async def run() -> None:
        # All four hold a connection to the first server, which the second one closes.
        with own.client("grpc") as one, own.client("http") as two:
            urls = {"grpc": f"127.0.0.1:{own.grpc_port}", "http": f"127.0.0.1:{own.http_port}"}
            clients = [AsyncClient(url, protocol=protocol) for protocol, url in urls.items()]
            expected = one.encode(["hello"])
            found = [two.encode(["hello"]), *[await client.encode(["hello"]) for client in clients]]
            own.stop(grace_s=0)
            waiting = [asyncio.ensure_future(client.encode(["hello"])) for client in clients]
            await asyncio.sleep(0.3)
            assert not any(call.done() for call in waiting)
            own.start()
            found += [*await asyncio.gather(*waiting), one.encode(["hello"]), two.encode(["hello"])]
            for client in clients:
                await client.close()
            np.testing.assert_array_equal(np.concatenate(found), np.repeat(expected, 7, axis=0))

    try:
        own.start()
        own.wait_ready()
        asyncio.run(run())
    finally:
        own.stop(grace_s=0)


def test_a_server_that_ignores_sigterm_is_killed(server: Server) -> None:
    with Server(server.repository) as own:
        pid = own.pid
        os.kill(pid, signal.SIGSTOP)
        own.stop(grace_s=1.0)
        assert not group_members(pid)
    assert not regions(own)


def test_dead_processes_are_reported_and_nothing_remains(server: Server) -> None:
    others = regions(server)
    with Server(server.repository) as own:
        assert regions(own)
        pid, members = own.pid, group_members(own.pid)
        assert len(members) == 2, "tritonserver and one model process"
        own.check()
        os.kill(next(member for member in members if member != pid), signal.SIGKILL)
        wait_until(lambda: group_members(pid) == [pid])
        with pytest.raises(ServerError, match="the process that runs the model has died"):
            own.check()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not group_members(pid))
        assert regions(own), "else this test proves nothing"
        with pytest.raises(ServerError, match="tritonserver ended with signal SIGKILL"):
            own.check()
    assert not regions(own)
    assert regions(server) == others


def test_a_server_that_cannot_load_its_model_reports_why(server: Server, tmp_path: Path) -> None:
    (tmp_path / "embed" / "1").mkdir(parents=True)
    config = (server.repository / "embed" / "config.pbtxt").read_text()
    (tmp_path / "embed" / "config.pbtxt").write_text(config.replace('"fake"', '"warp"'))
    for part in ("1/model.py", "warmup"):
        (tmp_path / "embed" / part).symlink_to(server.repository / "embed" / part)
    broken = Server(tmp_path)
    with pytest.raises(ServerError, match="tritonserver ended with status 1") as caught, broken:
        pass
    assert "'warp'" in str(caught.value)
    assert not regions(broken)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_mirror_serve_leaves_nothing_behind(fake_bundle, tmp_path, monkeypatch, number):
    with MirrorServe(fake_bundle, "--engine", "fake", temporary=tmp_path) as served:
        with Client(served.grpc) as client:
            assert client.encode(["hello"]).shape == (1, 16)
        assert served.shared_memory()
        server = served.tritonserver
        served.process.send_signal(number)
        assert served.process.wait(30) == (-number if number is signal.SIGKILL else 0), served.output
        if number is signal.SIGKILL:
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
            assert len(list(tmp_path.iterdir())) == 2, "the repository and the server's files"
            Workspace().close()  # the next process, which also ends the server
        assert not group_members(server)
        assert not served.shared_memory()
        assert not list(tmp_path.iterdir())
    assert served.output.endswith("stopped\n") or number is signal.SIGKILL


def test_a_signal_during_the_start_leaves_nothing_behind(fake_bundle: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "mirror_runtime.cli", "serve", str(fake_bundle), "--engine", "fake"]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    with subprocess.Popen([*command, *ports], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as starting:
        wait_until(lambda: list(tmp_path.glob("mirror-serve-*/log")))
        starting.send_signal(signal.SIGTERM)
        output, _ = starting.communicate(timeout=30)
    assert (starting.returncode, output) == (0, b"stopped\n")
    assert not list(tmp_path.iterdir())
    assert not list(SHARED_MEMORY.glob(f"mirror_{starting.pid}_*"))
