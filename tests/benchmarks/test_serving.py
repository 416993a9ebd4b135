"""Callers of a server: what they count as time, and when they stop. The server here is a fake that sleeps."""

import stat
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks.load import closed_loop, open_loop
from benchmarks.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from benchmarks.serving_results import PerfAnalyzerRun
from mirror_runtime.errors import PeerError, ServerError


class Backend:
    """One worker that answers requests in turn, `seconds` each; stalls once if told to."""

    def __init__(self, seconds=0.002, stall=(-1, 0.0), broken=False):
        self.seconds, self.stall, self.broken = seconds, stall, broken
        self.calls: list[tuple[str, ...]] = []
        self.moments: list[float] = []
        self._lock = threading.Lock()

    @contextmanager
    def connect(self):
        yield self

    def encode(self, texts, batch_size):
        assert batch_size == len(texts)
        with self._lock:
            if self.broken:
                raise ServerError("nobody is at home")
            self.calls.append(tuple(texts))
            self.moments.append(time.perf_counter())
            time.sleep(self.stall[1] if len(self.calls) == self.stall[0] else self.seconds)


def test_a_closed_loop_goes_round_all_requests_and_counts_each():
    backend = Backend()
    requests = [["a", "b"], ["c", "d"], ["e", "f"]]
    load = closed_loop(backend.connect, requests, concurrency=3, seconds=0.2)
    assert {tuple(request) for request in requests} == set(backend.calls)
    assert len(load.samples_ms) == len(backend.calls) - 3  # each caller warmed up with one
    assert 0.2 <= load.wall_s < 0.5
    assert min(load.samples_ms) >= 2
    # One worker, three callers: each waits for the others, in whatever order the lock lets them in.
    assert np.mean(load.samples_ms) > 5


def test_time_counts_from_the_moment_a_request_was_due():
    # One caller, and the server stalls for 0.3 s: the requests due meanwhile are late by what they waited.
    backend = Backend(seconds=0.0005, stall=(20, 0.3))
    load, count = open_loop(backend.connect, ["a"], rate=100, seconds=1.0, callers=1, seed=0)
    assert len(load.samples_ms) == count == 100
    late = [sample for sample in load.samples_ms if sample > 50]
    assert len(late) > 15  # a closed loop would have seen one slow request
    assert max(load.samples_ms) >= 300


def test_arrivals_are_random_at_the_rate_and_the_same_for_a_seed():
    def arrivals(seed):
        backend = Backend(seconds=0.0)
        load, count = open_loop(backend.connect, ["a"], rate=200, seconds=0.6, callers=8, seed=seed)
        assert count == len(load.samples_ms) == 120
        moments = np.array(backend.moments[8:])  # each caller warmed up with one
        return moments - moments[0]

    one, same, other = arrivals(7), arrivals(7), arrivals(8)
    assert np.median(np.abs(one - same)) < 0.01 < np.median(np.abs(one - other))
    gaps = np.diff(one)
    assert 0.6 < gaps.std() / gaps.mean() < 1.4  # of an exponential distribution it is 1; of a metronome 0


def test_a_server_that_is_too_slow_ends_the_open_loop_with_requests_given_up():
    backend = Backend(seconds=0.05)  # 20 a second
    began = time.perf_counter()
    load, count = open_loop(backend.connect, ["a"], rate=200, seconds=0.5, callers=4, seed=0)
    assert time.perf_counter() - began < 3
    assert load.unsent > 0
    assert load.unsent + len(load.samples_ms) == count


def test_a_server_that_answers_nobody_is_an_error():
    before = set(threading.enumerate())
    with pytest.raises(ServerError, match="no request was answered: nobody is at home"):
        closed_loop(Backend(broken=True).connect, [["a"]], concurrency=4, seconds=5)
    assert set(threading.enumerate()) <= before


def test_failures_are_counted_and_are_in_no_percentile():
    class Shaky(Backend):
        def encode(self, texts, batch_size):
            super().encode(texts, batch_size)
            if len(self.calls) % 3 == 0:
                raise ServerError("every third")

    backend = Shaky()
    load = closed_loop(backend.connect, [["a"]], concurrency=1, seconds=0.2)
    assert load.errors > 0
    assert load.errors + len(load.samples_ms) == len(backend.calls) - 1
    assert load.reason == "every third"


TABLE = """Concurrency,Inferences/Second,Client Send,Server Queue,p50 latency,p90 latency,p95 latency,p99 latency
8,412.5,10,20,19000,22000,23000,31000
"""


def analyzer(folder, script):
    program = folder / "bin" / "perf_analyzer"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/usr/bin/env python3\nimport sys\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def measured(program, tmp_path):
    return run_perf_analyzer(
        program, model="embed", grpc_port=8001, texts=["a", "b"], concurrency=8, texts_a_request=1, seconds=0.5,
        scratch=tmp_path,
    )  # fmt: skip


def test_perf_analyzers_table_is_read(tmp_path):
    script = f"open(sys.argv[sys.argv.index('-f') + 1], 'w').write({TABLE!r})\nassert '-b' in sys.argv"
    folder = analyzer(tmp_path / "env", script)
    program = find_perf_analyzer(folder, tmp_path / "unused", lambda line: None)
    assert measured(program, tmp_path) == PerfAnalyzerRun(
        concurrency=8, texts_a_request=1, texts_per_s=412.5, p50_ms=19.0, p99_ms=31.0
    )


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit('cannot connect')", "status 1: cannot connect"),
        ("open(sys.argv[sys.argv.index('-f') + 1], 'w').write('Concurrency\\n')", "0 rows"),
        ("open(sys.argv[sys.argv.index('-f') + 1], 'w').write('Concurrency\\n8\\n')", "no number in the column"),
    ],
)
def test_perf_analyzer_without_figures_is_named(tmp_path, script, message):
    program = find_perf_analyzer(analyzer(tmp_path / "env", script), tmp_path, lambda line: None)
    with pytest.raises(PeerError, match=message):
        measured(program, tmp_path)


def test_an_environment_without_perf_analyzer_is_named(tmp_path):
    with pytest.raises(PeerError, match="holds no perf_analyzer"):
        find_perf_analyzer(tmp_path, tmp_path, lambda line: None)
