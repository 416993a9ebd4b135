"""The load generator in a process of its own: callers that share a Python process with anything else send too late.

    python -m benchmarks.load.process

speaks line JSON with its parent (see `benchmarks.workers`); `Load` is the parent's end.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.load.generator import OpenLoop, Sender, closed_loop, recovery_time
from benchmarks.load.requests import ExpectedVectors, InTurn, Mix, RequestSource
from benchmarks.load.targets import open_targets
from benchmarks.load.window import Window
from benchmarks.workers import WorkerProcess
from mirror_runtime.errors import MirrorError
from mirror_runtime.triton.server.server import launcher

ROOT = Path(__file__).resolve().parents[2]

Turn = tuple[str, int]
"""A target and the texts per request: one size in turn instead of a mix."""

End = Literal["", "wait", "stop"]


class Load:
    """The parent's end of a running generator. Every method raises `PeerError` if the generator failed."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    def closed(self, *, callers: int, seconds: float, turn: Turn | None = None, seed: int = 0) -> Window:
        """Run a closed loop: see `closed_loop`. Without `turn` it sends the mix's good requests."""
        answer = self._worker.ask("closed", callers=callers, seconds=seconds, turn=turn, seed=seed)
        return Window.from_json(answer["window"])

    def open(
        self, *, rate: float, seconds: float, turn: Turn, seed: int, recover_within_ms: float | None = None
    ) -> tuple[Window, float | None]:
        """Run an open loop to its end.

        Args:
            rate: requests per second.
            seconds: for how long requests are due.
            turn: what is sent.
            seed: of the arrivals.
            recover_within_ms: measure how long after the last request the server answers in this time again.

        Returns:
            What ended, and the seconds until the server had recovered; None if it did not, or was not measured.
        """
        self.begin(rate=rate, seconds=seconds, seed=seed, turn=turn, recover_within_ms=recover_within_ms)
        return self.take("wait"), self._worker.ask("recovery")["recovery_s"]

    def begin(
        self,
        *,
        rate: float,
        seconds: float,
        seed: int,
        turn: Turn | None = None,
        recover_within_ms: float | None = None,
    ) -> None:
        """Begin an open loop, of the mix without `turn`, and return while it runs; see `open`."""
        self._worker.ask("begin", rate=rate, seconds=seconds, seed=seed, turn=turn, recover_within_ms=recover_within_ms)

    def take(self, end: End = "") -> Window:
        """Return what ended since the last call; wait for the loop's end first ("wait"), or cancel it ("stop")."""
        return Window.from_json(self._worker.ask("take", end=end)["window"])


@contextmanager
def load_process(
    addresses: Mapping[str, str],
    texts: Sequence[str],
    *,
    timeout_s: float,
    expected: ExpectedVectors | None = None,
    fingerprint: str | None = None,
) -> Iterator[Load]:
    """Start a generator that has opened its targets; its connections are closed and it has ended on exit.

    Args:
        addresses: host and port of each target by name.
        texts: that are sent.
        timeout_s: limit of one request, in seconds.
        expected: right vectors of the texts, which then are `expected.texts`; needed by a mix.
        fingerprint: vector space that answers must name.

    Raises:
        PeerError: it did not start.
    """
    with TemporaryDirectory(prefix="mirror-load-") as folder:
        data = Path(folder) / "data"
        data.write_bytes(pickle.dumps((tuple(texts), expected)))
        command = [*launcher(), sys.executable, "-m", "benchmarks.load.process"]
        with WorkerProcess(command, Path(folder) / "log", folder=ROOT) as worker:
            worker.ask(
                "connect",
                addresses=dict(addresses), data=str(data), request_timeout_s=timeout_s, fingerprint=fingerprint,
            )  # fmt: skip
            yield Load(worker)
            worker.ask("disconnect")


class Generator:
    """The generator's operations, named as in the protocol."""

    async def connect(
        self, addresses: Mapping[str, str], data: str, request_timeout_s: float, fingerprint: str | None
    ) -> dict[str, Any]:
        """Open the targets, and read the texts and their expected vectors, which the parent has pickled."""
        self._texts: tuple[str, ...]
        self._expected: ExpectedVectors | None
        self._texts, self._expected = pickle.loads(Path(data).read_bytes())
        self._targets = open_targets(addresses, request_timeout_s, fingerprint)
        self._send = Sender(self._targets, self._texts, self._expected).send
        return {}

    async def disconnect(self) -> dict[str, Any]:
        """Close the targets."""
        for target in self._targets.values():
            await target.close()
        return {}

    async def closed(self, callers: int, seconds: float, turn: Turn | None, seed: int) -> dict[str, Any]:
        """Run a closed loop."""
        window = await closed_loop(self._send, self._source(turn, seed), callers=callers, seconds=seconds)
        return {"window": vars(window)}

    async def begin(
        self, rate: float, seconds: float, seed: int, turn: Turn | None, recover_within_ms: float | None
    ) -> dict[str, Any]:
        """Begin an open loop, which measures the recovery at its end."""
        self._recovery_s: float | None = None

        async def recovery() -> None:
            if recover_within_ms is not None:
                self._recovery_s = await recovery_time(self._send, self._source(turn, seed), recover_within_ms)

        self._loop = OpenLoop(self._send, self._source(turn, seed), rate=rate, seconds=seconds, seed=seed)
        self._task = asyncio.ensure_future(self._loop.run(recovery))
        await asyncio.sleep(0)
        return {}

    async def take(self, end: End) -> dict[str, Any]:
        """Return the window since the last call, after the loop's end where `end` states it."""
        if end == "wait":
            await self._task
        elif end == "stop":
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        return {"window": vars(self._loop.take())}

    async def recovery(self) -> dict[str, Any]:
        """Return the recovery time of the last open loop."""
        return {"recovery_s": self._recovery_s}

    def _source(self, turn: Turn | None, seed: int) -> RequestSource:
        if turn is not None:
            target, size = turn
            return InTurn(target, len(self._texts), size)
        assert self._expected is not None
        return Mix(self._expected, seed)


async def serve() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to standard error
    generator = Generator()
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        try:
            answer = await getattr(generator, request.pop("op"))(**request)
        except MirrorError as error:
            answer = {"error": str(error)}
        except Exception as error:  # the process's edge: the parent decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    asyncio.run(serve())
