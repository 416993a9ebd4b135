"""SIGTERM: accepted requests are answered, later ones rejected, and nothing is left behind."""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tritonclient.grpc

from mirror_runtime.triton import Client
from tests.support.fake_bundles import busy_texts
from tests.support.mirror_serve import Load, MirrorServe, wait_until
from tests.support.triton_requests import text_input

pytestmark = pytest.mark.serving

BUSY = busy_texts()
"""Takes the fake engine some tenths of a second."""


def over_grpc(client: tritonclient.grpc.InferenceServerClient, texts: list[bytes]) -> object:
    return client.infer("embed", text_input(*texts), client_timeout=30).as_numpy("EMBEDDING")


class KeptAlive:
    """One HTTP connection for all requests, like a gateway's."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=30)

    def __call__(self) -> object:
        tensor = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["hello"]}
        self.connection.request("POST", "/v2/models/embed/infer", json.dumps({"inputs": [tensor]}))
        response = self.connection.getresponse()
        content = json.loads(response.read())
        if response.status != 200:
            raise ConnectionRefusedError(f"{response.status} {content['error']}")
        return content["outputs"]


def test_sigterm_under_load_drops_no_accepted_request(fake_bundle: Path) -> None:
    with MirrorServe(fake_bundle, "--engine", "fake") as served:
        client = tritonclient.grpc.InferenceServerClient(served.grpc)
        kept = [KeptAlive(served.http) for _ in range(2)]
        idle = http.client.HTTPConnection(served.http, timeout=30)
        idle.request("GET", "/v2/health/live")
        assert idle.getresponse().read() == b""
        callers: list[Callable[[], object]] = [
            lambda: over_grpc(client, BUSY),
            lambda: over_grpc(client, [b"hello"]),
            *kept,
        ]
        with Load(callers, pause_s=0.002) as load:
            wait_until(lambda: len(load.outcomes) > 30)
            terminated_at = time.monotonic()
            assert served.terminate() == 0
            took = time.monotonic() - terminated_at
        assert not served.shared_memory()
        accepted = [o for o in load.outcomes if o.began < terminated_at]
        assert not [o for o in accepted if isinstance(o.result, Exception)]
        assert sum(o.ended > terminated_at for o in accepted) >= 1, "else this test proves nothing"
        rejected = [str(o.result) for o in load.failures()]
        assert any("UNAVAILABLE" in text and "the server is stopping" in text for text in rejected), rejected[:5]
        assert any("503 the server is stopping" in text for text in rejected), rejected[:5]
        assert took < 4, "neither idle connections nor Triton delay it"
        client.close()
        idle.close()
        for caller in kept:
            caller.connection.close()
    assert served.output.endswith("stopped\n")
    assert "not drained" not in served.output
    assert "Traceback" not in served.output


def test_a_second_signal_ends_it_immediately(fake_bundle: Path) -> None:
    with MirrorServe(fake_bundle, "--engine", "fake") as served, Client(served.grpc, timeout_s=20) as client:
        assert client.ready()
        runner = served.runner()
        os.kill(runner, signal.SIGSTOP)
        ended: list[bool] = []
        caller = threading.Thread(target=lambda: ended.append(client.ready()))
        caller.start()
        time.sleep(0.5)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in served.output)
        time.sleep(1.0)
        assert served.process.poll() is None, "it waits for the accepted request"
        began = time.monotonic()
        assert served.terminate() == 0
        assert time.monotonic() - began < 5
        caller.join(10)
        assert ended == [False]
        assert "stopped before every request was answered" in served.output
        assert not served.shared_memory()
