"""Notice that a server no longer encodes, whatever its health endpoints say."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from mirror_runtime.client.client import Client
from mirror_runtime.client.protocol import DEAD_RUNNER
from mirror_runtime.errors import OverloadedError, ServerError
from mirror_runtime.triton.server.deploy_lock import DeployLock
from mirror_runtime.triton.server.server import Server

_COUNTERS_S = 1.0
_COMPUTING = 0.1


@dataclass(frozen=True, kw_only=True)
class HealthPolicy:
    """How long a server may be silent. Silent means: no probe answered, and no other request either.

    Attributes:
        look_s: how often the processes are looked at, in seconds.
        probe_s: pause between two probes, each a real inference of one short text.
        silent_s: how long while nothing is computed (a deadlock, an engine that fails each time). Where Triton itself
            says that the model's process is dead or stands still, two probes are enough.
        computing_s: how long while the model's process uses the processor, as in one batch of 256 long texts.
    """

    look_s: float = 0.2
    probe_s: float = 1.0
    silent_s: float = 5.0
    computing_s: float = 120.0


class Watchdog:
    """Watches one running server from one thread, with probes from another. A context manager.

    Args:
        server: ready.
        patience: how long it may be silent.
    """

    def __init__(self, server: Server, patience: HealthPolicy) -> None:
        self._server = server
        self._patience = patience
        self._swaps = DeployLock(server.repository)
        self._prober = _Prober(server.client(timeout_s=patience.computing_s), patience.probe_s)
        self._counters = server.client(timeout_s=_COUNTERS_S)
        self._answered = 0
        self._alive_at = self._looked_at = time.monotonic()
        self._computed_s = server.workers_cpu_seconds()

    def watch(self, stopping: threading.Event) -> str:
        """Wait until the server is broken.

        Args:
            stopping: set from elsewhere to end the wait.

        Returns:
            What is wrong, in words; empty when `stopping` was set.
        """
        while not stopping.wait(self._patience.look_s):
            # A model that was replaced takes its process along.
            swapped = self._swaps.new()
            try:
                self._server.check(workers=not swapped)
            except ServerError as error:
                return str(error)
            if swapped:
                self._server.adopt_workers()
            problem = self._silence()
            if problem:
                return f"{problem}; the log ends:\n{self._server.log_tail()}"
        return ""

    def __enter__(self) -> Watchdog:
        self._prober.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prober.end()
        self._counters.close()

    def _silence(self) -> str:
        """Say what is wrong when there has been no sign of life for too long; empty before."""
        now = time.monotonic()
        if self._prober.answered_at > self._alive_at:
            self._lives(self._prober.answered_at)
        silent_s = now - self._alive_at
        if silent_s < 2 * self._patience.probe_s or now - self._looked_at < self._patience.probe_s:
            return ""
        self._looked_at = now
        # Triton counts an answer that says "encoding failed" as an inference: a failed probe outweighs its counters.
        failing = self._prober.failing
        if not failing and self._others_are_answered():
            self._lives(now)
            return ""
        why = self._prober.failure or "requests wait without an answer"
        computing = not failing and self._server.workers_cpu_seconds() - self._computed_s > _COMPUTING * silent_s
        if DEAD_RUNNER not in why and silent_s < (self._patience.computing_s if computing else self._patience.silent_s):
            return ""
        return f"no inference has succeeded for {silent_s:.0f} s: {why}"

    def _others_are_answered(self) -> bool:
        """A probe may wait behind a long queue while others are answered: Triton's counters see those."""
        with contextlib.suppress(ServerError):
            answered = self._counters.statistics().inferences
            if answered != self._answered:
                self._answered = answered
                return True
        return False

    def _lives(self, when: float) -> None:
        self._alive_at = when
        self._computed_s = self._server.workers_cpu_seconds()


class _Prober:
    """Asks for one real inference after the other and remembers when one was last answered."""

    def __init__(self, client: Client, pause_s: float) -> None:
        self.answered_at = 0.0
        self.failure = ""
        self.failing = False
        """Whether the model answered the last probe, and the answer was that it failed."""
        self._client = client
        self._pause_s = pause_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror-prober", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._client.close()  # cancels the probe that waits
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._pause_s):
            try:
                self._client.probe()
            except (OverloadedError, ServerError) as error:  # a model that is too busy answers others, or else it hangs
                self.failure = str(error)
                self.failing = type(error) is ServerError  # and no kind of it, such as "unavailable" or "too late"
                continue
            except ValueError:  # how gRPC names a channel that has just been closed
                return
            self.failure, self.failing = "", False
            self.answered_at = time.monotonic()
