"""The command `mirror gateway` as a process, on a bundle or in front of a real tritonserver, until it is stopped."""

import contextlib
import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mirror_runtime import Encoder
from mirror_runtime.serving_process import STOP_SIGNALS
from mirror_runtime.triton import Server
from tests.support.gateways import send, vectors
from tests.support.mirror_serve import wait_until
from tests.support.paths import ROOT

pytestmark = pytest.mark.serving

TEXTS = ["", "a", "Zwei Häuser am See 🏠", *(" ".join(["word"] * n) for n in range(1, 90, 5))]


@contextlib.contextmanager
def gateway(*arguments: str, files: int | None = None) -> Iterator[SimpleNamespace]:
    """Run `mirror gateway` on a free port, with a limit on open files."""

    def prepare() -> None:
        for number in STOP_SIGNALS:  # nohup and a shell's & have some of them ignored
            signal.signal(number, signal.SIG_DFL)
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    process = subprocess.Popen(
        [sys.executable, "-m", "mirror_runtime.cli", "gateway", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=prepare,
    )
    assert process.stdout is not None
    try:
        output = ""
        while (found := re.search(r"^more .*127\.0\.0\.1:(\d+)/docs", output, re.MULTILINE)) is None:
            line = process.stdout.readline()
            assert line, output
            output += line
        port = int(found[1])
        yield SimpleNamespace(process=process, port=port, url=f"http://127.0.0.1:{port}", output=output)
    finally:
        process.kill()
        process.communicate()


def stop(running: SimpleNamespace, number: signal.Signals) -> str:
    """Stop a gateway with a signal, check its exit status, and return its remaining output."""
    running.process.send_signal(number)
    output, _ = running.process.communicate(timeout=30)
    assert running.process.returncode == 0, output
    return str(output)


@pytest.mark.parametrize(("protocol", "number"), [("grpc", signal.SIGTERM), ("http", signal.SIGINT)])
def test_vectors_through_triton_equal_the_encoders(server, fake_bundle, protocol, number):
    port = {"grpc": server.grpc_port, "http": server.http_port}[protocol]
    arguments = ("--triton", f"127.0.0.1:{port}", "--triton-protocol", protocol, "--dimensions", "8")
    from openai import BadRequestError, OpenAI

    with Encoder.load(fake_bundle, engine="fake") as encoder, gateway(*arguments) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.embeddings.with_raw_response.create(model="fake", input=TEXTS)
            short = client.embeddings.create(model="fake", input=TEXTS, dimensions=8)
            with pytest.raises(BadRequestError, match="may have 8, 16"):
                client.embeddings.create(model="fake", input="a", dimensions=4)
        expected = encoder.encode_detailed(TEXTS)
        found = answer.parse()
        np.testing.assert_array_equal(vectors([item.embedding for item in found.data]), expected.vectors)
        assert found.usage.prompt_tokens == expected.tokens.sum()
        assert found.model_extra["truncated"] == np.flatnonzero(expected.truncated).tolist()  # type: ignore[index]
        assert answer.headers["x-vector-space"] == encoder.fingerprint
        cut = expected.vectors[:, :8] / np.linalg.norm(expected.vectors[:, :8], axis=1, keepdims=True)
        np.testing.assert_allclose(vectors([item.embedding for item in short.data]), cut, rtol=1e-6)
        info = send(running.port, "GET", "/info").json
        assert info["fingerprint"] == encoder.fingerprint
        assert (info["dim"], info["max_tokens"], info["normalized"]) == (16, 64, True)
        assert (info["engine"], info["backend"]) == ("fake", f"triton {protocol}://127.0.0.1:{port}")
        assert "stopped; 4 requests answered" in stop(running, number)


@pytest.mark.slow
def test_a_stopped_server_is_reported_and_its_return_noticed(server: Server, fake_bundle: Path, tmp_path: Path) -> None:
    with (
        Server(server.repository) as own,
        gateway("--triton", f"127.0.0.1:{own.grpc_port}", "--timeout", "2") as running,
    ):

        def health() -> int:
            return send(running.port, "GET", "/health").status

        assert health() == 200
        own.stop()
        refused = send(running.port, "POST", "/embed", {"inputs": "a"})
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.error["code"] in ("backend_unavailable", "deadline_exceeded")
        assert health() == 503
        own.start()
        own.wait_ready()
        wait_until(lambda: health() == 200)
        assert send(running.port, "POST", "/embed", {"inputs": "a"}).status == 200


def test_stopping_under_load_loses_nothing(fake_bundle: Path) -> None:
    answered: list[int] = []
    broken: list[BaseException] = []

    def client(port: int) -> None:
        """Send requests over one connection until the gateway closes it."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"inputs": ["word " * 50] * 16})
        while True:
            fresh = connection.sock is None
            try:
                connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                answered.append(response.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not fresh:  # a new connection may find the port closed: nothing was accepted
                    broken.append(error)
                return

    with gateway(str(fake_bundle), "--engine", "fake", "--drain", "0.5") as running:
        clients = [threading.Thread(target=client, args=(running.port,)) for _ in range(16)]
        for thread in clients:
            thread.start()
        wait_until(lambda: len(answered) > 50)
        output = stop(running, signal.SIGTERM)
        for thread in clients:
            thread.join(10)
    assert set(answered) == {200}
    assert f"stopped; {len(answered)} requests answered" in output, "an answer never arrived"
    assert not broken, "a request was accepted and not answered"


def test_a_signal_just_after_the_addresses_stops_it(fake_bundle: Path) -> None:
    with gateway(str(fake_bundle), "--engine", "fake", "--drain", "0") as running:
        assert "Traceback" not in stop(running, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_beside_half_sent_requests_stops_it_soon(fake_bundle: Path, number: signal.Signals) -> None:
    with gateway(str(fake_bundle), "--engine", "fake", "--drain", "0.1") as running, contextlib.ExitStack() as stack:
        head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\n"
        for sent in (b"", head, head + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port))).sendall(sent)
        assert send(running.port, "POST", "/embed", {"inputs": "a"}).status == 200
        began = time.monotonic()
        output = stop(running, number)
        assert time.monotonic() - began < 8
        assert "stopped; 2 requests answered" in output
        assert "Traceback" not in output


def test_with_few_descriptors_it_says_so_serves_and_stops(fake_bundle) -> None:
    with gateway(str(fake_bundle), "--engine", "fake", "--drain", "0", files=64) as running:
        assert "at most 16 connections; raise ulimit -n" in running.output
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            wait_until(lambda: send(running.port, "POST", "/embed", {"inputs": "a"}).status == 200)
            output = stop(running, signal.SIGTERM)
        assert output.count("\n") < 5
    with (
        pytest.raises(AssertionError, match="may open 50 files, and a gateway needs at least 56"),
        gateway(str(fake_bundle), "--engine", "fake", files=50),
    ):
        pass


def test_the_lines_of_the_documentation_work_as_printed(fake_bundle: Path) -> None:
    page = (ROOT / "docs/how-to/gateway.md").read_text()
    options = re.findall(r"^    mirror gateway bundles/mine (.*)$", page, re.MULTILINE)[0].split()
    with gateway(str(fake_bundle), "--engine", "fake", *options) as running:
        for language, program in (("bash", ["bash", "-e", "-c"]), ("python", [sys.executable, "-c"])):
            code = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[0]
            assert "127.0.0.1:8080" in code
            code = code.replace("127.0.0.1:8080", f"127.0.0.1:{running.port}")
            done = subprocess.run([*program, code], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            if language == "bash":
                requests = code.count("\ncurl") + code.startswith("curl")
                answers = [json.loads(line) for line in done.stdout.splitlines()]
                assert len(answers) == requests >= 3
                assert not [answer for answer in answers if "error" in answer]
            else:
                assert "(2, 16)" in done.stdout
