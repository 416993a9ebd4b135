"""When a server counts as broken: what the watchdog concludes from probes, counters and processor time."""

import threading
import time
from pathlib import Path

import pytest

from mirror_runtime.client.client import Statistics
from mirror_runtime.errors import DeadlineExceededError, OverloadedError, ServerError
from mirror_runtime.triton.server.deploy_lock import DeployLock, deploying
from mirror_runtime.triton.server.health import HealthPolicy, Watchdog

PATIENCE = HealthPolicy(look_s=0.01, probe_s=0.05, silent_s=0.4, computing_s=1.2)


class Served:
    """A server that behaves as it is told, and its own clients."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.answer: Exception | float | None = None
        self.answered = 0
        self.growing = False
        self.cores = 0.0
        self.dead = ""
        self.adopted = 0
        self.closed = threading.Event()
        self._began = time.monotonic()

    def client(self, *, timeout_s: float) -> "Served":
        return self

    def probe(self) -> None:
        if isinstance(self.answer, float):
            self.closed.wait(self.answer)
        if isinstance(self.answer, Exception):
            raise self.answer

    def statistics(self) -> Statistics:
        self.answered += self.growing
        return Statistics(inferences=self.answered, executions=self.answered)

    def close(self) -> None:
        self.closed.set()

    def check(self, *, workers: bool = True) -> None:
        if self.dead and (workers or self.dead == "server"):
            raise ServerError(f"{self.dead} died")

    def adopt_workers(self) -> None:
        self.adopted += 1
        self.dead = ""

    def workers_cpu_seconds(self) -> float:
        return (time.monotonic() - self._began) * self.cores

    def log_tail(self) -> str:
        return "the log"


def watched(served: Served, seconds: float) -> tuple[str, float]:
    """What the watchdog says, and after how many seconds; it is stopped after `seconds`."""
    stopping = threading.Event()
    timer = threading.Timer(seconds, stopping.set)
    timer.start()
    began = time.monotonic()
    with Watchdog(served, PATIENCE) as watchdog:  # type: ignore[arg-type]
        problem = watchdog.watch(stopping)
    timer.cancel()
    timer.join()
    return problem, time.monotonic() - began


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


def test_a_server_that_answers_is_left_alone(served):
    assert watched(served, 0.8)[0] == ""


def test_a_refusal_for_load_is_no_alarm_while_others_are_answered(served):
    served.answer = OverloadedError("too much to do", 0.1)
    served.growing = True
    assert watched(served, 0.8)[0] == ""


def test_a_probe_that_comes_too_late_is_no_alarm_while_others_are_answered(served):
    served.answer = DeadlineExceededError("too late")
    served.growing = True
    assert watched(served, 0.8)[0] == ""


def test_a_server_that_is_full_and_answers_nobody_is_broken(served):
    served.answer = OverloadedError("too much to do", 0.1)
    problem, seconds = watched(served, 5)
    assert "too much to do" in problem
    assert 0.4 <= seconds < 1.0


@pytest.mark.parametrize("others_fail_too", [False, True])
def test_an_engine_that_fails_each_time_is_broken_though_triton_counts_its_answers(served, others_fail_too):
    served.answer = ServerError("encoding failed")
    served.growing = others_fail_too
    served.cores = 0.9 * others_fail_too
    problem, seconds = watched(served, 5)
    assert "no inference has succeeded for" in problem
    assert "encoding failed" in problem
    assert "the log" in problem
    assert 0.4 <= seconds < 1.0


def test_a_process_that_triton_calls_dead_is_not_waited_for(served):
    served.answer = ServerError("Stub process 'embed_0_0' is not healthy.")
    served.cores = 0.9
    assert 0.1 <= watched(served, 5)[1] < 0.35


def test_a_silent_server_is_broken_soon_when_it_computes_nothing(served):
    served.answer = 60.0
    problem, seconds = watched(served, 5)
    assert "requests wait without an answer" in problem
    assert 0.4 <= seconds < 1.0


def test_a_silent_server_that_computes_is_given_longer(served):
    served.answer = 60.0
    served.cores = 0.9
    problem, seconds = watched(served, 5)
    assert "requests wait without an answer" in problem
    assert 1.2 <= seconds < 2.0


def test_a_probe_that_waits_behind_others_is_no_alarm(served):
    served.answer = 60.0
    served.growing = True
    assert watched(served, 1.0)[0] == ""


@pytest.mark.parametrize("who", ["server", "worker"])
def test_a_dead_process_is_noticed_at_once(served, who):
    served.dead = who
    problem, seconds = watched(served, 5)
    assert problem == f"{who} died"
    assert seconds < 0.3


def test_a_worker_that_ends_during_a_deployment_was_replaced(served):
    with deploying(served.repository):
        served.dead = "worker"
        assert watched(served, 0.3)[0] == ""
        served.dead = "server"
        assert watched(served, 0.3)[0] == "server died"
    assert served.adopted


def test_a_deployment_that_nobody_looked_at_is_still_seen_once(tmp_path):
    assert not DeployLock(tmp_path).new()
    with deploying(tmp_path):
        pass
    swaps = DeployLock(tmp_path)
    for _ in range(2):
        assert not swaps.new()
        with deploying(tmp_path):
            pass
        assert swaps.new()
