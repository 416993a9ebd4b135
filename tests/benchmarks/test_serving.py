"""Suite `serving` against a fake generator, perf_analyzer as a script, and once the real servers."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.load import generator
from benchmarks.load.generator import MOST_UNDER_WAY, Window
from benchmarks.load.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from benchmarks.plan import Environments
from benchmarks.recorder import Recorder
from benchmarks.suites import serving
from benchmarks.suites.serving import QUICK, Party, measure_overload, measure_rate, measure_round, run_serving
from mirror_runtime.errors import PeerError, ServerError


def window(*times_ms, seconds=1.0, refused=0, recovery_s=None, **outcomes):
    ends = Counter({"answered": len(times_ms), "overloaded": refused, **outcomes})
    return Window(
        at_s=seconds, seconds=seconds, times_ms=list(times_ms),
        refused_ms=[2.0] * refused, lag_ms=[0.5] * len(times_ms), outcomes=ends,
        first={"server error": (1.0, "broken")}, recovery_s=recovery_s,
    )  # fmt: skip


class Load(generator.Load):
    """Returns prepared windows, and remembers what was requested."""

    def __init__(self, *windows):
        self.windows = list(windows)
        self.requested: list[dict] = []

    def closed(self, **options):
        self.requested.append(options)
        return self.windows.pop(0)

    def begin(self, **options):
        self.requested.append(options)

    def take(self, end=""):
        assert end == "wait"
        return self.windows.pop(0)


def make_party(recorder):
    runner = SimpleNamespace(variant=SimpleNamespace(name="fake fp32"), encoder=None)
    return Party(
        runner=runner, texts=["text"] * 100, pace=QUICK, seed=3, recorder=recorder, on_step=print  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def party():
    return make_party(Recorder())


def recorded(party, **conditions):
    """What was recorded under these conditions, by metric."""
    found = party.recorder.measurements
    return {one.metric: one for one in found if all(one.conditions.get(k) == v for k, v in conditions.items())}


def test_closed_loops_take_turns_with_passes_in_process(party, monkeypatch):
    monkeypatch.setattr(serving, "LOOPS", {"grpc": ((8, 1), (4, 32))})
    happened = []
    party.runner.encoder = SimpleNamespace(encode=lambda texts: happened.append(f"{len(texts)} in process"))
    load = Load(*(window(*[wait] * 10, seconds=wait / 10) for wait in (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)))
    waits = iter((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    for _ in range(3):
        measure_round(party, load, "grpc", lambda: [("queue time", "ms", [next(waits)])])
    assert happened == ["64 in process", "100 in process"] * 3
    assert load.requested[:2] == [
        {"callers": 8, "seconds": 0.8, "turn": ("grpc", 1)},
        {"callers": 4, "seconds": 0.8, "turn": ("grpc", 32)},
    ]
    assert len(recorded(party, server="in process")["texts per second"].samples) == 3
    single, several = recorded(party, callers=8), recorded(party, callers=4)
    assert single["texts per second"].samples == pytest.approx((10.0, 10 / 3, 2.0))
    assert single["time per request"].total == 30
    assert several["texts per second"].samples[0] == pytest.approx(160.0)  # ten requests of 32 texts in two seconds
    assert several["queue time"].samples == (2.0, 4.0, 6.0)


@pytest.mark.parametrize(
    ("answered", "more", "kept_up"),
    [(96, {"server error": 4}, True), (94, {"server error": 6}, False), (96, {"not sent": 4}, False)],
)
def test_a_rate_is_kept_up_with_if_nearly_all_is_answered_in_time_and_nothing_is_left_unsent(
    party, answered, more, kept_up
):
    load = Load(window(*[5.0] * answered, seconds=2.0, **more))
    assert measure_rate(party, load, 0.5, 100.0, list) is kept_up
    assert load.requested == [{"rate": 50.0, "seconds": 2.0, "turn": ("grpc", 1), "seed": 3}]
    found = recorded(party, loop="open", share=0.5)
    assert found["offered per second"].samples == (50.0,)
    assert found["kept up"].samples == (float(kept_up),)
    assert found["failed requests"].samples == (more.get("server error", 0),)
    with pytest.raises(ServerError, match="no request was answered: broken"):
        measure_rate(party, Load(window()), 0.5, 100.0, list)


def test_an_overload_offers_twice_the_maximum_and_records_what_became_of_it(party):
    load = Load(
        window(10.0, 12.0),
        window(*[40.0] * 20),
        window(30.0, 50.0, seconds=2.0, refused=37, recovery_s=0.75, **{"server error": 1}),
    )
    memory = iter((100, 110))
    measure_overload(party, load, lambda: next(memory), 99)
    calm, most, flood = load.requested
    assert (calm["callers"], most["callers"], calm["turn"]) == (1, 8, ("grpc", 16))
    assert (flood["rate"], flood["seed"]) == (40.0, 3)
    assert flood["calm_ms"] == pytest.approx(11.98)
    found = recorded(party, loop="overload")
    figures = {metric: one.samples for metric, one in found.items() if len(one.samples) == 1}
    assert figures == {
        "maximum texts per second": (320.0,),
        "offered texts per second": (40 * 16 / QUICK.overload_s,),
        "texts per second": (16.0,),
        "refused requests": (37,),
        "failed requests": (1,),
        "memory before": (100,),
        "memory after": (110,),
        "recovery": (0.75,),
        "duration": (QUICK.overload_s,),
    }
    assert found["time per request"].samples == (30.0, 50.0)
    assert found["time per refusal"].total == 37
    assert found["texts per second"].conditions["tokens"] == 99
    assert not party.recorder.failures
    measure_overload(party, Load(window(10.0), window(40.0), window(30.0)), lambda: 1, 99)
    assert "did not recover" in party.recorder.failures[0].reason


def analyzed(folder, script):
    """What is read of a perf_analyzer that is this script."""
    program = folder / "env" / "bin" / "perf_analyzer"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/usr/bin/env python3\nimport sys\n{script}\n")
    program.chmod(0o755)
    (program.parent / "python").touch()
    found = find_perf_analyzer({"perf_analyzer": folder / "env"}, folder / "unused", print)
    return run_perf_analyzer(found, 8001, ["a", "b"], callers=8, size=1, window_s=0.5, scratch=folder)


WRITE = "open(sys.argv[sys.argv.index('-f') + 1], 'w').write"
TABLE = "Concurrency,Inferences/Second,Server Queue,p50 latency,p95 latency,p99 latency\n8,412.5,20,19000,23000,31000\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "found"),
    [
        (f"{WRITE}({TABLE!r})\nassert '-b' in sys.argv", [412.5, 19.0, 31.0]),
        ("sys.exit('cannot connect')", "status 1: cannot connect"),
        (f"{WRITE}('Concurrency\\n')", "not one row"),
        (f"{WRITE}('Concurrency\\n8\\n')", "'Inferences/Second'"),
    ],
)
def test_perf_analyzers_table_is_read_and_its_absence_is_an_error(tmp_path, script, found):
    if isinstance(found, str):
        with pytest.raises(PeerError, match=found):
            analyzed(tmp_path, script)
    else:
        metrics = ("texts per second", "1/s"), ("p50 of requests", "ms"), ("p99 of requests", "ms")
        assert analyzed(tmp_path, script) == [(*metric, [x]) for metric, x in zip(metrics, found, strict=True)]


@pytest.mark.serving
@pytest.mark.slow  # starts a real Triton and a real gateway, and puts load on both
def test_the_suite_measures_the_real_servers(plan, progress, tmp_path, monkeypatch):
    plan = replace(
        plan, rounds=1, environments=Environments(given={"perf_analyzer": tmp_path / "absent"}, folder=tmp_path)
    )
    pace = serving.Pace(closed_s=0.2, open_s=0.4, shares=(0.2, 0.4), calm_s=0.3, overload_s=0.5)
    monkeypatch.setattr(serving, "QUICK", pace)
    monkeypatch.setattr(serving, "OVERLOAD_FACTOR", 1.0)
    recorder = Recorder()
    run_serving(plan, recorder, progress)
    (failure,) = recorder.failures
    assert (failure.party, "is not a virtual environment" in failure.reason) == ("perf_analyzer", True)
    party = make_party(recorder)
    assert sum(map(len, serving.LOOPS.values())) == 7
    for target, server in (("grpc", "triton"), ("gateway", "gateway")):
        for callers, size in serving.LOOPS[target]:
            found = recorded(party, server=server, callers=callers, **{"texts per request": size})
            assert found["texts per second"].median > 10
            assert found["failed requests"].samples == (0,)
            if server == "triton":
                assert found["texts per execution"].median >= 1
                assert found["compute time"].median > 0
    assert recorded(party, loop="open", share=0.2)["kept up"].samples == (1.0,)
    overload = recorded(party, loop="overload")
    assert overload["failed requests"].samples == (0,)
    assert overload["memory after"].median > 10_000_000
    assert overload["recovery"].median < 10
    assert overload["time per request"].total < MOST_UNDER_WAY
