"""The load generator in a process of its own: callers that share a Python process with anything else send too late.

    python -m benchmarks.load.process FILE

reads what it sends where, as `load_process` pickled it, and then speaks line JSON with its parent (see
`benchmarks.workers`); `Load` is the parent's end.
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

from benchmarks.load.generator import Loop, Send, Window
from benchmarks.load.requests import GATEWAY, KINDS, ExpectedVectors, Kind, Request, in_turn, mix
from benchmarks.load.targets import GatewayTarget, Sender, TritonTarget
from benchmarks.workers import WorkerProcess
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
        """Run a closed loop: see `Loop.closed`. Without `turn` it sends the mix's good requests."""
        answer = self._worker.ask("closed", callers=callers, seconds=seconds, turn=turn, seed=seed)
        return Window.from_json(answer["window"])

    def begin(
        self, *, rate: float, seconds: float, seed: int, turn: Turn | None = None, calm_ms: float | None = None
    ) -> None:
        """Begin an open loop, of the mix without `turn`, and return while it runs: see `Loop.open`."""
        self._worker.ask("begin", rate=rate, seconds=seconds, seed=seed, turn=turn, calm_ms=calm_ms)

    def take(self, end: End = "") -> Window:
        """Return what ended since the last call; wait for the loop's end first ("wait"), or cancel it ("stop")."""
        return Window.from_json(self._worker.ask("take", end=end)["window"])


@contextmanager
def load_process(
    addresses: Mapping[str, str], texts: Sequence[str], *, timeout_s: float, expected: ExpectedVectors | None = None
) -> Iterator[Load]:
    """Start a generator, whose connections are closed and which has ended on exit.

    Args:
        addresses: host and port of each target by name.
        texts: that are sent.
        timeout_s: limit of one request, in seconds.
        expected: right vectors of the texts, which then are `expected.texts`; needed by a mix.
    """
    with TemporaryDirectory(prefix="mirror-load-") as folder:
        data, log = Path(folder) / "data", Path(folder) / "log"
        data.write_bytes(pickle.dumps((dict(addresses), tuple(texts), timeout_s, expected)))
        command = [*launcher(), sys.executable, "-m", "benchmarks.load.process", str(data)]
        with WorkerProcess(command, log, folder=ROOT) as worker:
            yield Load(worker)


class Generator:
    """The generator's operations, named as in the protocol and in `Load`."""

    def __init__(self, send: Send, texts: Sequence[str], expected: ExpectedVectors | None) -> None:
        self._send, self._texts, self._expected = send, texts, expected

    async def closed(self, callers: int, seconds: float, turn: Turn | None, seed: int) -> dict[str, Any]:
        """Run a closed loop. Callers of the mix draw from one sequence; others start at places of their own."""
        mixed = self._requests(turn, seed, kinds={Kind.GOOD: 1.0})
        streams = [mixed if turn is None else self._requests(turn, seed, at / callers) for at in range(callers)]
        return {"window": vars(await Loop(self._send).closed(streams, seconds))}

    async def begin(self, turn: Turn | None, seed: int, **options: Any) -> dict[str, Any]:
        """Begin an open loop."""
        self._loop = Loop(self._send)
        self._task = asyncio.ensure_future(self._loop.open(self._requests(turn, seed), seed=seed, **options))
        return {}

    async def take(self, end: End) -> dict[str, Any]:
        """Return the window since the last call, after the loop's end where `end` states it."""
        if end == "wait":
            await self._task
        elif end == "stop":
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        return {"window": vars(self._loop.take())}

    def _requests(
        self, turn: Turn | None, seed: int, start: float = 0.0, kinds: Mapping[Kind, float] = KINDS
    ) -> Iterator[Request]:
        if turn is not None:
            return in_turn(*turn, len(self._texts), start)
        assert self._expected is not None
        return mix(self._expected, seed, kinds)


async def serve(data: Path) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to standard error
    addresses, texts, timeout_s, expected = pickle.loads(data.read_bytes())
    targets = {
        name: GatewayTarget(address, timeout_s)
        if name == GATEWAY
        else TritonTarget(name, address, timeout_s, expected and expected.fingerprint)
        for name, address in addresses.items()
    }
    generator = Generator(Sender(targets, texts, expected).send, texts, expected)
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        try:
            answer = await getattr(generator, request.pop("op"))(**request)
        except Exception as error:  # the process's edge: the parent decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for target in targets.values():
        await target.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
