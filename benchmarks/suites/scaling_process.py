"""The measurements of suite `scaling`, each in a fresh process that prints one JSON object.

python benchmarks/suites/scaling_process.py '{"what": "cores", "bundle": …, "texts": …, "rounds": 3, …}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from benchmarks.peers.protocol import peak_bytes
from mirror_runtime import AsyncEncoder, Encoder
from mirror_runtime.errors import OverloadedError
from mirror_runtime.vectors import components, cosines

NUMBERS = 10_000_000
_STRIDE = 6_180_339
"""Coprime to `NUMBERS`, so that its multiples take every number once, and its golden section, so that the first few
are spread as evenly as all."""

WARM_TEXTS = 512

WAVES = 20
WAVE_PAUSE_S = 0.002
TURNS_WAITING = 5
"""Waves of callers that fill the queue."""


def distinct(texts: Sequence[str], count: int) -> Iterator[str]:
    """Repeat the texts, each time with another number of seven digits at the end, so that no text comes twice.

    In the numbers' order the first thousand cost as many tokens each as all of them.
    """
    return (f"{texts[i % len(texts)]} {i * _STRIDE % NUMBERS:07d}" for i in range(count))


def stream(encoder: Encoder, texts: Sequence[str], count: int) -> dict[str, Any]:
    """Encode so many different texts from a generator, after some of them untimed."""
    for _ in encoder.encode_stream(distinct(texts, min(count, WARM_TEXTS))):
        pass  # shapes are compiled meanwhile
    tokens, first = 0, 0
    began = time.perf_counter()
    for encoded in encoder.encode_stream(distinct(texts, count)):
        tokens += int(encoded.tokens.sum())
        first = first or peak_bytes()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "first_bytes": first, "peak_bytes": peak_bytes()}


def passes(encoder: Encoder, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Encode all texts a few times, after one untimed pass."""
    encoder.encode(texts)
    wall, processor = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        encoder.encode(texts)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return {"samples_s": wall, "cpu_s": processor, "streams": encoder.engine.streams}


def callers(encoder: Encoder, texts: Sequence[str], count: int, rounds: int) -> dict[str, Any]:
    """Interleave callers of single texts with one `encode` of the same texts, then let callers meet a full queue."""
    return asyncio.run(_callers(encoder, texts, count, rounds))


async def _callers(encoder: Encoder, texts: Sequence[str], count: int, rounds: int) -> dict[str, Any]:
    offline, online = [], []
    texts = list(distinct(texts, len(texts)))
    async with AsyncEncoder(encoder) as shared:
        for round_ in range(rounds + 1):
            began = time.perf_counter()
            encoder.encode(texts)
            offline.append(time.perf_counter() - began)
            began = time.perf_counter()
            await _encode_all(shared, texts, count)
            online.append(time.perf_counter() - began)
            if round_ == 0:
                offline.clear()
                online.clear()
    return {"offline_s": offline, "callers_s": online, "queue": await _full_queue(encoder, texts, count)}


async def _encode_all(shared: AsyncEncoder, texts: Iterable[str], count: int) -> None:
    waiting = iter(texts)

    async def caller() -> None:
        for text in waiting:
            await shared.encode([text])

    await asyncio.gather(*(caller() for _ in range(count)))


async def _full_queue(encoder: Encoder, texts: Sequence[str], count: int) -> dict[str, Any]:
    """Fill a queue with a first wave of callers, then send waves that arrive while it is full."""
    room = TURNS_WAITING * count
    answers: dict[str, Any] = {}
    refused_ms: list[float] = []

    async with AsyncEncoder(encoder, max_waiting=room) as shared:

        async def call(text: str, due: float) -> None:
            try:
                answers[text] = (await shared.encode([text]))[0]
            except OverloadedError:
                refused_ms.append(1e3 * (time.perf_counter() - due))

        coming, calls = distinct(texts, NUMBERS), []
        for wave in (room, *[count] * WAVES):
            due = time.perf_counter()
            calls += [asyncio.create_task(call(text, due)) for text in islice(coming, wave)]
            await asyncio.sleep(WAVE_PAUSE_S)
        await asyncio.gather(*calls)
    expected = components(encoder.encode(list(answers)), encoder.spec)
    found = components(np.stack(list(answers.values())), encoder.spec)
    return {
        "max_waiting": room,
        "sent": len(calls),
        "answered": len(answers),
        "min_cosine": float(cosines(found, expected).min()),
        "refused_ms": refused_ms,
    }


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task and return its figures."""
    texts = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
    with Encoder.load(task["bundle"], engine=task["engine"], precision=task["precision"]) as encoder:
        if task["what"] == "size":
            return stream(encoder, texts, task["count"])
        if task["what"] == "cores":
            return passes(encoder, texts, task["rounds"])
        return callers(encoder, texts, task["count"], task["rounds"])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
