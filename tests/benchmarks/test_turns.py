"""Closed loops in turns with passes in process. Runner and server here are fakes."""

from types import SimpleNamespace

import pytest

from benchmarks.load import Load
from benchmarks.serving_results import GATEWAY, ServerTimes, ServingResult
from benchmarks.turns import Turns
from mirror_runtime.bundle import EngineName, Precision

EMPTY = ServingResult(
    engine=EngineName.FAKE, precision=Precision.FP32, server="a server", protocol=GATEWAY, in_process_texts_per_s=0.0,
    closed=(), open=(), perf_analyzer=(), overload=None,
)  # fmt: skip


def test_rounds_take_turns_and_become_medians():
    happened = []
    encoder = SimpleNamespace(encode=lambda texts: happened.append(f"{len(texts)} in process"))
    runner = SimpleNamespace(point=SimpleNamespace(name="fake fp32"), encoder=encoder)
    turns = Turns(runner, ["text"] * 100, ((8, 1), (4, 32)))  # type: ignore[arg-type]
    waits = iter((10.0, 20.0, 30.0, 40.0, 50.0, 60.0))

    def ask(callers, size):
        happened.append(f"{callers} x {size}")
        wait = next(waits)
        times = ServerTimes(queue_ms=wait, compute_ms=1.0, texts_per_execution=2.0) if size > 1 else None
        return Load(samples_ms=[wait] * 10, errors=1, wall_s=wait / 10), times

    said: list[str] = []
    for _ in range(3):
        turns.round(ask, said.append)
    assert happened == ["64 in process", "100 in process", "8 x 1", "4 x 32"] * 3
    assert said == ["fake fp32: in process", "fake fp32: 8 x 1", "fake fp32: 4 x 32"] * 3
    result = turns.added_to(EMPTY)
    assert result.server == "a server"
    assert result.in_process_texts_per_s > 0
    single, several = result.closed
    assert single.rounds_texts_per_s == pytest.approx((10.0, 10 / 3, 2.0))
    assert single.texts_per_s == pytest.approx(10 / 3)
    assert (single.requests, single.errors, single.server) == (30, 3, None)
    assert several.rounds_texts_per_s[0] == pytest.approx(160.0)  # ten requests of 32 texts in two seconds
    assert several.server is not None
    assert several.server.queue_ms == 40.0
    assert (several.p50_ms, several.p999_ms) == (40.0, 60.0)
