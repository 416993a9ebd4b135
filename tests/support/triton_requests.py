"""Requests with Triton's own client, which can send what ours rejects, and the model's series on the metrics port."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import tritonclient.grpc

from mirror_runtime.triton import Server


@contextmanager
def running(repository: Path) -> Iterator[Server]:
    """Run a server until the block ends, which gives it no time to drain."""
    with Server(repository) as server:
        yield server
        server.stop(grace_s=0)


def text_input(*texts: bytes, library: Any = tritonclient.grpc) -> list[Any]:
    tensor = library.InferInput("TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return [tensor]


@dataclass(frozen=True)
class Answered:
    number: int
    seconds: float
    result: tritonclient.grpc.InferResult | None
    error: tritonclient.grpc.InferenceServerException | None


class Burst:
    """Requests sent without waiting, and their replies with the time that each took."""

    def __init__(self, client: tritonclient.grpc.InferenceServerClient) -> None:
        self._client = client
        self._replies: queue.Queue[Answered] = queue.Queue()
        self._waiting = 0

    def send(self, texts: Sequence[bytes], timeout_us: int | None = None) -> Any:
        number, began = self._waiting, time.perf_counter()
        self._waiting += 1

        def keep(result: Any, error: Any) -> None:
            self._replies.put(Answered(number, time.perf_counter() - began, result, error))

        return self._client.async_infer("embed", text_input(*texts), keep, timeout=timeout_us, client_timeout=60)

    def answers(self) -> list[Answered]:
        """Wait for the replies since the last call; return them in the order of sending."""
        waiting, self._waiting = self._waiting, 0
        return sorted((self._replies.get(timeout=60) for _ in range(waiting)), key=lambda reply: reply.number)


def metric(server: Server, name: str, outcome: str | None = None) -> float:
    """Read one of the model's series, which it updates every second."""
    with urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    label = "" if outcome is None else f'outcome="{outcome}"'
    (line,) = [line for line in lines if line.startswith(f"{name}{{") and label in line]
    assert 'model="embed"' in line
    return float(line.rpartition(" ")[2])


def settled(read: Callable[[], Any]) -> Any:
    """Read a value until it has not changed for longer than an update takes."""
    value, since = read(), time.monotonic()
    while time.monotonic() - since < 1.2:
        time.sleep(0.1)
        if (now := read()) != value:
            value, since = now, time.monotonic()
    return value
