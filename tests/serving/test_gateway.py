"""The gateway as its users run it: the command, in front of a real tritonserver or on a bundle, until it is stopped."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest

from mirror_runtime import Encoder
from mirror_runtime.triton import Server
from tests.support.gateways import vectors
from tests.support.paths import ROOT

pytestmark = pytest.mark.serving

TEXTS = ["", "a", "Zwei Häuser am See 🏠", *(" ".join(["word"] * n) for n in range(1, 90, 5))]


@contextlib.contextmanager
def gateway(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[SimpleNamespace]:
    """Run `mirror gateway` on a free port; `output()` after it has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mirror_runtime.cli", "gateway", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("more"):
                break
        else:
            raise AssertionError("".join(lines))
        port = int(re.search(r"127\.0\.0\.1:(\d+)/docs", lines[-1])[1])  # type: ignore[index]
        yield SimpleNamespace(process=process, port=port, url=f"http://127.0.0.1:{port}", lines=lines)
    finally:
        process.kill()
        process.communicate()


def stop(running: SimpleNamespace, number: signal.Signals = signal.SIGTERM) -> str:
    """Stop a gateway with a signal, see that it ends well, and give what it had to say."""
    running.process.send_signal(number)
    output, _ = running.process.communicate(timeout=30)
    assert running.process.returncode == 0, output
    return str(output)


def post(port: int, path: str, body: object) -> tuple[int, dict[str, str], bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_vectors_through_triton_are_the_encoders(server: Server, fake_bundle: Path, protocol: str) -> None:
    port = {"grpc": server.grpc_port, "http": server.http_port}[protocol]
    arguments = ("--triton", f"127.0.0.1:{port}", "--triton-protocol", protocol, "--dimensions", "8")
    with Encoder.load(fake_bundle, engine="fake") as encoder, gateway(*arguments) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.embeddings.with_raw_response.create(model="fake", input=TEXTS)
            short = client.embeddings.create(model="fake", input=TEXTS, dimensions=8)
            with pytest.raises(openai.BadRequestError, match="may have 8, 16"):
                client.embeddings.create(model="fake", input="a", dimensions=4)
        expected = encoder.encode_detailed(TEXTS)
        found = answer.parse()
        np.testing.assert_array_equal(vectors([item.embedding for item in found.data]), expected.vectors)
        assert found.usage.prompt_tokens == expected.tokens.sum()
        assert found.model_extra["truncated"] == np.flatnonzero(expected.truncated).tolist()  # type: ignore[index]
        assert answer.headers["x-vector-space"] == encoder.fingerprint
        cut = expected.vectors[:, :8]
        np.testing.assert_allclose(
            vectors([item.embedding for item in short.data]),
            cut / np.linalg.norm(cut, axis=1, keepdims=True),
            rtol=1e-6,
        )
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
            connection.request("GET", "/info")
            info = json.loads(connection.getresponse().read())
        assert info["fingerprint"] == encoder.fingerprint
        assert (info["dim"], info["max_tokens"], info["normalized"]) == (16, 64, True)
        assert (info["engine"], info["backend"]) == ("fake", f"triton {protocol}://127.0.0.1:{port}")
        assert "stopped; 4 requests answered" in stop(running)


@pytest.mark.slow
def test_a_server_that_goes_away_is_said_and_its_return_noticed(
    server: Server, fake_bundle: Path, tmp_path: Path
) -> None:
    def health(port: int) -> int:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status

    with (
        Server(server.repository) as own,
        gateway("--triton", f"127.0.0.1:{own.grpc_port}", "--timeout", "2") as running,
    ):
        assert health(running.port) == 200
        own.stop()
        status, headers, body = post(running.port, "/embed", {"inputs": "a"})
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] in ("backend_unavailable", "deadline_exceeded")
        assert health(running.port) == 503
        own.start()
        own.wait_ready()
        deadline = time.monotonic() + 20
        while health(running.port) != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert post(running.port, "/embed", {"inputs": "a"})[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_under_load_loses_nothing(fake_bundle: Path, number: signal.Signals) -> None:
    answered: list[int] = []
    broken: list[BaseException] = []

    def client(port: int) -> None:
        """Keep asking on kept connections until nobody listens any more."""
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
                if not fresh:  # a new connection may find the port closed, or closing: nothing was taken
                    broken.append(error)
                return

    with gateway(str(fake_bundle), "--engine", "fake", "--drain", "0.5") as running:
        clients = [threading.Thread(target=client, args=(running.port,)) for _ in range(16)]
        for thread in clients:
            thread.start()
        time.sleep(1.5)
        output = stop(running, number)
        for thread in clients:
            thread.join(10)
    assert set(answered) == {200}
    assert f"stopped; {len(answered)} requests answered" in output, "an answer never arrived"
    assert not broken, "a request was taken and not answered"
    assert len(answered) > 50


def printed(language: str) -> str:
    """The example in that language that docs/how-to/gateway.md shows for the gateway."""
    section = (ROOT / "docs/how-to/gateway.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]


def test_the_lines_of_the_documentation_work_as_printed(fake_bundle: Path) -> None:
    command = re.search(
        r"^    (mirror gateway bundles/mine .*)$", (ROOT / "docs/how-to/gateway.md").read_text(), re.MULTILINE
    )
    assert command is not None
    options = command[1].split()[3:]
    with gateway(str(fake_bundle), "--engine", "fake", *options) as running:
        for language, program in (("bash", ["bash", "-e", "-c"]), ("python", [sys.executable, "-c"])):
            code = printed(language)
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
