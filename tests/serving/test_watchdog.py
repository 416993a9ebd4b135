"""`mirror serve` restarts a server or model that dies or hangs, up to a limit."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from mirror_runtime.triton import Client
from tests.support.mirror_serve import Load, MirrorServe, wait_until
from tests.support.triton_requests import text_input

pytestmark = pytest.mark.serving


@pytest.mark.parametrize(
    ("victim", "number", "problem"),
    [
        ("runner", signal.SIGKILL, "the process that runs the model has died"),
        ("tritonserver", signal.SIGTERM, ""),  # Triton unloads its models first, and answers NOT_FOUND meanwhile
    ],
)
def test_a_killed_process_is_replaced_without_an_error_for_patient_clients(fake_bundle, victim, number, problem):
    with MirrorServe(fake_bundle, "--engine", "fake") as served:
        patient = [Client(served.grpc), Client(served.http, protocol="http")]
        plain = tritonclient.grpc.InferenceServerClient(served.grpc)
        expected = patient[0].encode(["hello", "world"])
        np.testing.assert_array_equal(patient[1].encode(["hello", "world"]), expected)

        def impatient() -> object:
            return plain.infer("embed", text_input(b"hello"), client_timeout=10).as_numpy("EMBEDDING")

        waiting = [lambda client=client: client.encode(["hello", "world"]) for client in patient]
        with Load([*waiting, impatient], pause_s=0.005) as load:
            wait_until(lambda: len(load.outcomes) > 30)
            killed_at = time.monotonic()
            os.kill(served.runner() if victim == "runner" else served.tritonserver, number)
            wait_until(lambda: any(o.began > killed_at and o.result is not None for o in load.outcomes))
            wait_until(lambda: "serving again" in served.output)
            time.sleep(0.5)
        back_at = min(o.ended for o in load.outcomes if o.began > killed_at and isinstance(o.result, np.ndarray))
        assert back_at - killed_at < 10
        for outcome in load.outcomes:
            if isinstance(outcome.result, np.ndarray):
                np.testing.assert_array_equal(outcome.result, expected[: len(outcome.result)])
        # Without retries: answered, or rejected immediately. With retries: answered.
        rejected = load.failures()
        assert all(isinstance(o.result, tritonclient.grpc.InferenceServerException) for o in rejected), rejected
        assert max(o.ended - o.began for o in rejected) < 5
        assert not any("DEADLINE" in str(o.result) for o in rejected), "a request was lost"
        for client in [*patient, plain]:
            client.close()
        assert served.terminate() == 0
        assert problem in served.output
        assert "restarting: 1 of 5 restarts" in served.output
        assert not served.shared_memory()


def test_a_stopped_model_process_is_noticed(fake_bundle: Path) -> None:
    with MirrorServe(fake_bundle, impatient=True) as served, Client(served.grpc) as client:
        before = client.encode(["hello"])
        os.kill(served.runner(), signal.SIGSTOP)
        began = time.monotonic()
        np.testing.assert_array_equal(client.encode(["hello"]), before)
        assert time.monotonic() - began < 10
        assert "a signal has stopped one of its processes" in served.output


def test_restarts_have_a_limit(fake_bundle: Path) -> None:
    with MirrorServe(fake_bundle, "--engine", "fake", "--max-restarts", "1") as served:
        os.kill(served.tritonserver, signal.SIGKILL)
        wait_until(lambda: "serving again" in served.output)
        with Client(served.grpc) as client:
            assert client.ready(), "on the same port as before"
        os.kill(served.runner(), signal.SIGKILL)
        assert served.process.wait(20) == 2
        wait_until(lambda: "gave up after 1 restarts within 10 minutes" in served.output)
        assert "tritonserver ended with signal SIGKILL" in served.output
        assert "Traceback" not in served.output
        assert not served.shared_memory()
