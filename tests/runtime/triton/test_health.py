"""When a server counts as broken: the watchdog's conclusions from probes, counters and CPU time."""

import threading

import pytest

from mirror_runtime.client import Statistics
from mirror_runtime.client.protocol import NotServed
from mirror_runtime.errors import DeadlineExceededError, OverloadedError, ServerError
from mirror_runtime.triton.server.health import HealthPolicy, Watchdog
from tests.support.mirror_serve import wait_until

POLICY = HealthPolicy(check_s=0.25, probe_s=1.0, silent_s=8.0, computing_s=24.0)


class Served:
    """A server that behaves as set, its clients, and its clock."""

    now = 100.0
    error: Exception | None = None
    hangs = answers_others = is_stopped = False
    answered = 0
    cores = 0.0
    dead = ""

    def client(self, *, timeout_s: float) -> "Served":
        return self

    def probe(self) -> None:
        if self.error is not None:
            raise self.error

    def statistics(self) -> Statistics:
        self.answered += self.answers_others
        return Statistics(inferences=self.answered, executions=self.answered)

    def close(self) -> None: ...

    def check(self) -> None:
        if self.dead:
            raise ServerError(f"{self.dead} died")

    def stopped(self) -> bool:
        return self.is_stopped

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
def served() -> Served:
    return Served()


FULL, FAILED = OverloadedError("too much to do", 0.1), ServerError("encoding failed")
DEAD = ServerError("Stub process 'embed_0_0' is not healthy.")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"error": FULL, "answers_others": True},
        {"error": DeadlineExceededError("too late"), "answers_others": True},
        {"hangs": True, "answers_others": True},
    ],
    ids=["answered", "overloaded", "too late", "waiting"],
)
def test_an_unanswered_probe_is_no_alarm_while_other_requests_are_answered(served, state):
    vars(served).update(state)
    assert watch(served, 60)[0] == ""


@pytest.mark.parametrize(
    ("state", "parts", "earliest_s"),
    [
        ({"error": FULL}, ["too much to do"], 8),
        ({"error": FAILED}, ["no inference has succeeded for", "encoding failed", "the log"], 8),
        # Triton counts the failed replies of other requests as answered.
        ({"error": FAILED, "answers_others": True, "cores": 0.9}, ["no inference has succeeded for"], 8),
        ({"error": DEAD, "cores": 0.9}, [], 2),
        ({"error": NotServed("answered NOT_FOUND"), "cores": 0.9}, ["answered NOT_FOUND"], 2),
        ({"hangs": True, "is_stopped": True, "answers_others": True}, ["a signal has stopped one of its"], 0.5),
        ({"hangs": True}, ["requests wait without an answer"], 8),
        ({"hangs": True, "cores": 0.9}, ["requests wait without an answer"], 24),
    ],
    ids=[
        "overloaded",
        "fails",
        "fails for all",
        "reported dead",
        "unloaded",
        "stopped",
        "silent",
        "silent and computing",
    ],
)
def test_a_server_that_answers_nothing_is_broken_after_a_while(served, state, parts, earliest_s):
    vars(served).update(state)
    problem, seconds = watch(served, 60)
    assert all(part in problem for part in parts)
    assert earliest_s <= seconds < earliest_s + min(earliest_s, 2)


def test_a_process_that_stops_only_for_moments_is_not_broken(served, monkeypatch):
    monkeypatch.setattr(served, "stopped", lambda: served.now % 1 >= 0.5, raising=False)
    assert watch(served, 20)[0] == ""


def test_a_process_seen_stopped_once_after_a_check_that_came_late_is_not_broken(served):
    watchdog = Watchdog(served, POLICY, lambda: served.now)
    served.answers_others = True
    assert watchdog.check() == ""
    served.now, served.is_stopped = served.now + 60, True
    assert watchdog.check() == ""
    served.now += POLICY.check_s
    assert watchdog.check() == ""
    served.now += POLICY.probe_s
    assert "a signal has stopped" in watchdog.check()


def test_a_dead_process_is_noticed_immediately(served):
    served.dead = "worker"
    assert watch(served, 60) == ("worker died", POLICY.check_s)


def test_the_threads_probe_and_watch_until_they_are_stopped(served):
    stopping = threading.Event()
    with Watchdog(served, HealthPolicy(check_s=0.01, probe_s=0.01)) as watchdog:
        wait_until(lambda: watchdog.prober.answered_at)
        stopping.set()
        assert watchdog.watch(stopping) == ""
        served.dead = "worker"
        assert watchdog.watch(threading.Event()) == "worker died"
