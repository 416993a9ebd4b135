"""When a server counts as broken: the watchdog's conclusions from probes, counters and CPU time."""

import threading
from pathlib import Path

import pytest

from mirror_runtime.client import Statistics
from mirror_runtime.errors import DeadlineExceededError, OverloadedError, ServerError
from mirror_runtime.triton.server.deploy_lock import DeployLock, deploying
from mirror_runtime.triton.server.health import HealthPolicy, Watchdog

POLICY = HealthPolicy(check_s=0.25, probe_s=1.0, silent_s=8.0, computing_s=24.0)


class Served:
    """A server that behaves as set, its clients, and its clock."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.now = 100.0
        self.error: Exception | None = None
        self.hangs = False
        self.answered = 0
        self.answers_others = False
        self.cores = 0.0
        self.dead = ""
        self.adopted = 0

    def client(self, *, timeout_s: float) -> "Served":
        return self

    def probe(self) -> None:
        if self.error is not None:
            raise self.error

    def statistics(self) -> Statistics:
        self.answered += self.answers_others
        return Statistics(inferences=self.answered, executions=self.answered)

    def close(self) -> None: ...

    def check(self, *, workers: bool = True) -> None:
        if self.dead and (workers or self.dead == "server"):
            raise ServerError(f"{self.dead} died")

    def adopt_workers(self) -> None:
        self.adopted += 1
        self.dead = ""

    def workers_cpu_seconds(self) -> float:
        return self.now * self.cores

    def log_tail(self) -> str:
        return "the log"


def watch(served: Served, seconds: float) -> tuple[str, float]:
    """Return the watchdog's problem and when it saw it, or an empty string after `seconds`."""
    watchdog = Watchdog(served, POLICY, lambda: served.now)  # type: ignore[arg-type]
    began, problem = served.now, ""
    while not problem and served.now - began < seconds:
        served.now += POLICY.check_s
        if (served.now - began) % POLICY.probe_s == 0 and not served.hangs:
            watchdog.prober.probe()
        problem = watchdog.check()
    return problem, served.now - began


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.mark.parametrize(
    "error",
    [None, OverloadedError("too much to do", 0.1), DeadlineExceededError("too late")],
    ids=["answered", "overloaded", "too late"],
)
def test_an_unanswered_probe_is_no_alarm_while_other_requests_are_answered(served, error):
    served.error = error
    served.answers_others = error is not None
    assert watch(served, 60)[0] == ""


def test_a_waiting_probe_is_no_alarm_while_other_requests_are_answered(served):
    served.hangs = served.answers_others = True
    assert watch(served, 60)[0] == ""


def test_an_overloaded_server_that_answers_no_request_is_broken(served):
    served.error = OverloadedError("too much to do", 0.1)
    problem, seconds = watch(served, 60)
    assert "too much to do" in problem
    assert 8 <= seconds < 10


@pytest.mark.parametrize("others_fail_too", [False, True])
def test_an_engine_that_always_fails_is_broken_although_triton_counts_its_replies(served, others_fail_too):
    served.error = ServerError("encoding failed")
    served.answers_others = others_fail_too
    served.cores = 0.9 * others_fail_too
    problem, seconds = watch(served, 60)
    assert "no inference has succeeded for" in problem
    assert "encoding failed" in problem
    assert "the log" in problem
    assert 8 <= seconds < 10


def test_a_process_that_triton_reports_dead_is_not_waited_for(served):
    served.error = ServerError("Stub process 'embed_0_0' is not healthy.")
    served.cores = 0.9
    assert 2 <= watch(served, 60)[1] < 4


@pytest.mark.parametrize(("cores", "silent_s"), [(0.0, 8), (0.9, 24)])
def test_a_silent_server_is_given_longer_while_it_computes(served, cores, silent_s):
    served.hangs = True
    served.cores = cores
    problem, seconds = watch(served, 60)
    assert "requests wait without an answer" in problem
    assert silent_s <= seconds < silent_s + 2


@pytest.mark.parametrize("process", ["server", "worker"])
def test_a_dead_process_is_noticed_immediately(served, process):
    served.dead = process
    assert watch(served, 60) == (f"{process} died", POLICY.check_s)


def test_a_worker_that_ends_during_a_deployment_was_replaced(served):
    with deploying(served.repository):
        served.dead = "worker"
        assert watch(served, 2)[0] == ""
        served.dead = "server"
        assert watch(served, 2)[0] == "server died"
    assert served.adopted


def test_the_threads_probe_and_watch_until_they_are_stopped(served):
    policy = HealthPolicy(check_s=0.01, probe_s=0.01)
    stopping = threading.Event()
    timer = threading.Timer(0.2, stopping.set)
    timer.start()
    with Watchdog(served, policy) as watchdog:
        assert watchdog.watch(stopping) == ""
        assert watchdog.prober.answered_at
        served.dead = "worker"
        assert watchdog.watch(threading.Event()) == "worker died"
    timer.join()


def test_a_deployment_between_two_checks_is_seen_once(tmp_path):
    assert not DeployLock(tmp_path).changed()
    with deploying(tmp_path):
        pass
    lock = DeployLock(tmp_path)
    for _ in range(2):
        assert not lock.changed()
        with deploying(tmp_path):
            pass
        assert lock.changed()
