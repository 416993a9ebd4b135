"""Detect a server that no longer encodes, whatever its health endpoints report."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mirror_runtime.client.client import Client
from mirror_runtime.client.protocol import DEAD_RUNNER, NotServed
from mirror_runtime.errors import OverloadedError, ServerError
from mirror_runtime.triton.server.server import Server

_COUNTERS_S = 1.0
_COMPUTING = 0.1


@dataclass(frozen=True, kw_only=True)
class HealthPolicy:
    """How long a server may be silent. Silent means that neither a probe nor any other request is answered.

    Attributes:
        check_s: how often the processes are checked, in seconds.
        probe_s: pause between two probes, each a real inference of one short text.
        silent_s: how long while nothing is computed (a deadlock, an engine that fails each time). If Triton reports
            that the model's process is dead or unloaded, two probes are enough. A process that a signal has stopped may
            take half the pause between two to go on.
        computing_s: how long while the model's process uses the CPU, as in one batch of 256 long texts.
    """

    check_s: float = 0.2
    probe_s: float = 1.0
    silent_s: float = 5.0
    computing_s: float = 120.0


class Watchdog:
    """Watches one running server from one thread, with probes from another. A context manager."""

    def __init__(self, server: Server, policy: HealthPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.prober = Prober(server.client(timeout_s=policy.computing_s), policy.probe_s, clock)
        self._server = server
        self._policy = policy
        self._clock = clock
        self._counters = server.client(timeout_s=_COUNTERS_S)
        self._answered = 0
        self._alive_at = self._checked_at = clock()
        self._computed_s = server.workers_cpu_seconds()
        self._stopped_since: float | None = None  # the first sighting of a stopped process, if the last was one too

    def watch(self, stopping: threading.Event) -> str:
        """Wait until the server is broken and return the problem; empty if another thread has set `stopping`."""
        while not stopping.wait(self._policy.check_s):
            if problem := self.check():
                return problem
        return ""

    def check(self) -> str:
        """Check the processes, and how long the server has been silent; return the problem or an empty string."""
        try:
            self._server.check()
        except ServerError as error:
            return str(error)
        problem = self._silence()
        return f"{problem}; the log ends:\n{self._server.log_tail()}" if problem else ""

    def __enter__(self) -> Watchdog:
        self.prober.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.prober.close()
        self._counters.close()

    def _silence(self) -> str:
        """Return the problem if there has been no sign of life for too long; otherwise an empty string."""
        now = self._clock()
        if self.prober.answered_at > self._alive_at:
            self._note_life(self.prober.answered_at)
        if not self._server.stopped():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since >= self._policy.probe_s / 2:
            return "a signal has stopped one of its processes"
        silent_s = now - self._alive_at
        if silent_s < 2 * self._policy.probe_s or now - self._checked_at < self._policy.probe_s:
            return ""
        self._checked_at = now
        # Triton counts a reply "encoding failed" as an inference, so a failed probe outweighs its counters.
        failing = self.prober.failing
        if not failing and self._others_are_answered():
            self._note_life(now)
            return ""
        reason = self.prober.failure or "requests wait without an answer"
        computing = not failing and self._server.workers_cpu_seconds() - self._computed_s > _COMPUTING * silent_s
        patience_s = self._policy.computing_s if computing else self._policy.silent_s
        if silent_s < patience_s and not self.prober.dead:
            return ""
        return f"no inference has succeeded for {silent_s:.0f} s: {reason}"

    def _others_are_answered(self) -> bool:
        """Return whether Triton's counters moved: a probe may wait in a long queue while others are answered."""
        with contextlib.suppress(ServerError):
            answered = self._counters.statistics().inferences
            if answered != self._answered:
                self._answered = answered
                return True
        return False

    def _note_life(self, when: float) -> None:
        self._alive_at = when
        self._computed_s = self._server.workers_cpu_seconds()


class Prober:
    """Runs one real inference after the other, in a thread of its own, and keeps the outcome of the last one."""

    def __init__(self, client: Client, pause_s: float, clock: Callable[[], float]) -> None:
        self.answered_at = 0.0
        self.failure = ""
        self.failing = self.dead = False  # dead: the server reports that nothing runs the model
        self._client = client
        self._pause_s = pause_s
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror-prober", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._client.close()  # cancels the waiting probe
        self._thread.join()

    def probe(self) -> None:
        """Run one inference. gRPC raises a ValueError if the client is closed."""
        try:
            self._client.probe()
        except (OverloadedError, ServerError) as error:  # an overloaded model answers others, or else it hangs
            self.failure = str(error)
            self.failing = type(error) is ServerError  # not a subclass, such as "unavailable" or "too late"
            self.dead = isinstance(error, NotServed) or DEAD_RUNNER in self.failure
        else:
            self.failure, self.failing, self.dead = "", False, False
            self.answered_at = self._clock()

    def _run(self) -> None:
        with contextlib.suppress(ValueError):
            while not self._ended.wait(self._pause_s):
                self.probe()
