"""The measurements of suite `scaling`, each in a fresh process that prints one JSON object: samples by metric.

python benchmarks/suites/scaling_process.py '{"what": "cores", "count": 2, "bundle": …, "texts": FILE, …}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from benchmarks.workers import peak_bytes
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
WAVES_THAT_FILL = 5

Samples = dict[str, list[float]]


def distinct(texts: Sequence[str], count: int) -> Iterator[str]:
    """Repeat the texts, each time with another number of seven digits at the end, so that no text comes twice.

    In the numbers' order the first thousand cost as many tokens each as all of them.
    """
    return (f"{texts[i % len(texts)]} {i * _STRIDE % NUMBERS:07d}" for i in range(count))


def stream(encoder: Encoder, texts: Sequence[str], count: int) -> Samples:
    """Encode so many different texts from a generator, after some of them untimed."""
    for _ in encoder.encode_stream(distinct(texts, min(count, WARM_TEXTS))):
        pass  # shapes are compiled meanwhile
    tokens, first = 0, 0
    began = time.perf_counter()
    for encoded in encoder.encode_stream(distinct(texts, count)):
        tokens += int(encoded.tokens.sum())
        first = first or peak_bytes("self")
    seconds = time.perf_counter() - began
    return {
        "time per text": [1e6 * seconds / count],
        "tokens per text": [tokens / count],
        "memory at the first window": [first],
        "peak memory": [peak_bytes("self")],
    }


def passes(encoder: Encoder, texts: Sequence[str], rounds: int) -> Samples:
    """Encode all texts a few times, after one untimed pass."""
    encoder.encode(texts)
    wall, processor = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        encoder.encode(texts)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return {
        "time per text": [1e6 * seconds / len(texts) for seconds in wall],
        "texts per second": [len(texts) / seconds for seconds in wall],
        "streams": [encoder.engine.streams],
        "CPU seconds per second": [used / seconds for used, seconds in zip(processor, wall, strict=True)],
    }


async def callers(encoder: Encoder, texts: Sequence[str], count: int, rounds: int) -> Samples:
    """Interleave concurrent callers of single texts with one `encode` of the same texts; the first round warms."""
    offline, online = [], []
    texts = list(distinct(texts, len(texts)))
    async with AsyncEncoder(encoder) as shared:

        async def caller(waiting: Iterator[str]) -> None:
            for text in waiting:
                await shared.encode([text])

        for _ in range(rounds + 1):
            began = time.perf_counter()
            encoder.encode(texts)
            offline.append(time.perf_counter() - began)
            began, waiting = time.perf_counter(), iter(texts)
            await asyncio.gather(*(caller(waiting) for _ in range(count)))
            online.append(time.perf_counter() - began)
    del offline[0], online[0]
    return {
        "time per text": [1e6 * seconds / len(texts) for seconds in online],
        "texts per second": [len(texts) / seconds for seconds in online],
        "texts per second of one encode": [len(texts) / seconds for seconds in offline],
        "share of one encode": [float(np.median(offline) / np.median(online))],
    }


async def full_queue(encoder: Encoder, texts: Sequence[str], room: int) -> Samples:
    """Fill a queue of so many texts with a first wave of callers, then send waves that arrive while it is full."""
    answers: dict[str, Any] = {}
    refused_ms: list[float] = []

    async with AsyncEncoder(encoder, max_waiting=room) as shared:

        async def call(text: str, due: float) -> None:
            try:
                answers[text] = (await shared.encode([text]))[0]
            except OverloadedError:
                refused_ms.append(1e3 * (time.perf_counter() - due))

        coming, calls = distinct(texts, NUMBERS), []
        for wave in (room, *[room // WAVES_THAT_FILL] * WAVES):
            due = time.perf_counter()
            calls += [asyncio.create_task(call(text, due)) for text in islice(coming, wave)]
            await asyncio.sleep(WAVE_PAUSE_S)
        await asyncio.gather(*calls)
    expected = components(encoder.encode(list(answers)), encoder.spec)
    found = components(np.stack(list(answers.values())), encoder.spec)
    samples: Samples = {
        "calls": [len(calls)],
        "accepted": [len(calls) - len(refused_ms)],
        "answered": [len(answers)],
        "worst cosine to one encode": [float(cosines(found, expected).min())],
    }
    return {**samples, "time until refused": refused_ms} if refused_ms else samples


def main(task: dict[str, Any]) -> Samples:
    """Run one task and return its samples."""
    texts = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
    with Encoder.load(task["bundle"], engine=task["engine"], precision=task["precision"]) as encoder:
        what, count, rounds = task["what"], task["count"], task["rounds"]
        if what == "texts":
            return stream(encoder, texts, count)
        if what == "cores":
            return passes(encoder, texts, rounds)
        return asyncio.run(
            callers(encoder, texts, count, rounds) if what == "callers" else full_queue(encoder, texts, count)
        )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
