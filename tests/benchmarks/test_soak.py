"""A soak's arithmetic and its report, without a server."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak_figures import ALL, Findings, drift, growth, judge, restarts, slope, times_of
from benchmarks.soak_report import render, write_files
from benchmarks.soak_results import (
    SCHEMA_VERSION,
    Ending,
    MemorySample,
    Process,
    Settings,
    SoakReport,
    Subject,
    Thresholds,
    Times,
    Window,
)
from benchmarks.soak_tally import Outcome, Tally
from mirror_runtime.bundle import from_json

THRESHOLDS = Thresholds(growth_mb_per_hour=30.0, drift=1.5, unexpected=0)
CLEAN_END = Ending(by_itself=False, status=0, seconds=1.0, left=())
FINE = Findings(
    requests=100,
    right=95,
    unexpected=0,
    growth_mb_per_hour=5.0,
    growth_over_s=900.0,
    p99_drift=1.1,
    restarts=0,
    ending=CLEAN_END,
)


def sample(at_s: float, *sizes: float, pid: int = 10) -> MemorySample:
    names = ("tritonserver", "model", "model")
    return MemorySample(
        at_s=at_s,
        processes=tuple(
            Process(name=name, pid=pid + i, resident_mb=size)
            for i, (name, size) in enumerate(zip(names, sizes, strict=False))
        ),
    )


def window(p99_ms: float | None) -> Window:
    times = None if p99_ms is None else Times(requests=1, p50_ms=1.0, p99_ms=p99_ms, p999_ms=p99_ms)
    return Window(at_s=0.0, seconds=10.0, requests=1, outcomes={}, times=times, sent_late_p99_ms=None)


def test_a_slope_is_that_of_the_line_whatever_the_scatter_around_it():
    at = np.linspace(100, 200, 400)
    scatter = np.random.default_rng(0).normal(0, 5, 400)
    assert slope(at.tolist(), (3 + 0.25 * at).tolist()) == pytest.approx(0.25)
    assert slope(at.tolist(), (3 - 0.25 * at + scatter).tolist()) == pytest.approx(-0.25, abs=0.03)
    assert slope([0, 1, 2], [0, 3, 0]) == 0


@pytest.mark.parametrize("moments", [[], [1.0], [2.0, 2.0]])
def test_a_slope_of_one_moment_is_refused(moments):
    with pytest.raises(ValueError, match="two different moments"):
        slope(moments, [1.0] * len(moments))


def test_growth_is_of_the_second_half_and_an_hour():
    # 100 MB while it warms up, then 1 MB every 60 s in the model alone.
    warming = [sample(10.0 * i, 50.0, 100.0 + 10 * i) for i in range(10)]
    steady = [sample(10.0 * i, 50.0, 200.0 + i / 6) for i in range(10, 21)]
    found = growth([*warming, *steady])
    assert found == pytest.approx({"tritonserver": 0.0, "model": 60.0, ALL: 60.0}, abs=1e-6)


def test_processes_of_one_name_are_added_up():
    found = growth([sample(0, 1.0, 1.0, 1.0), sample(1800, 1.0, 2.0, 3.0), sample(3600, 1.0, 3.0, 5.0)])
    assert found == pytest.approx({"tritonserver": 0.0, "model": 6.0, ALL: 6.0})


def test_growth_of_too_few_samples_is_unknown():
    assert growth([]) == growth([sample(0, 1.0)]) == growth([sample(0, 1.0), sample(10, 9.0)]) == {}


def test_drift_compares_the_last_third_with_the_first():
    assert drift([window(p99) for p99 in [10] * 4 + [99] * 4 + [20] * 4]) == 2.0
    assert drift([window(p99) for p99 in [20] * 4 + [99] * 4 + [10] * 4]) == 0.5


def test_one_disturbed_window_is_no_drift():
    assert drift([window(p99) for p99 in [10] * 11 + [5000]]) == 1.0


def test_windows_without_answers_do_not_count_for_drift():
    assert drift([window(p99) for p99 in [10, 10, None, 10, 15, 15, 15, 30, None, 30, 30]]) == 3.0
    assert drift([window(p99) for p99 in [10] * 8 + [None] * 50]) is None


def test_a_new_tritonserver_is_a_restart_and_a_moment_without_one_is_not_two():
    steady = [sample(at, 1.0, pid=10) for at in range(3)]
    assert restarts(steady) == 0
    assert restarts([*steady, sample(4), sample(5, 1.0, pid=20), sample(6, 1.0, pid=20)]) == 1


def test_a_run_within_its_thresholds_passes():
    assert [verdict.passed for verdict in judge(FINE, THRESHOLDS)] == [True] * 5
    edge = replace(FINE, growth_mb_per_hour=30.0, p99_drift=1.5)
    assert all(verdict.passed for verdict in judge(edge, THRESHOLDS))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("errors", {"unexpected": 1}),
        ("errors", {"right": 0, "requests": 0}),
        ("memory", {"growth_mb_per_hour": 30.1}),
        ("p99 drift", {"p99_drift": 1.51}),
        ("restarts", {"restarts": 1}),
        ("end", {"ending": replace(CLEAN_END, status=None)}),
        ("end", {"ending": replace(CLEAN_END, status=1)}),
        ("end", {"ending": replace(CLEAN_END, by_itself=True)}),
        ("end", {"ending": replace(CLEAN_END, left=("process 7 (model)",))}),
    ],
)
def test_each_threshold_fails_alone(name, change):
    assert [v.name for v in judge(replace(FINE, **change), THRESHOLDS) if v.passed is False] == [name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("memory", {"growth_mb_per_hour": None}),
        ("memory", {"growth_mb_per_hour": 9999.0, "growth_over_s": 20.0}),
        ("p99 drift", {"p99_drift": None}),
        ("end", {"ending": None}),
    ],
)
def test_what_a_short_run_cannot_say_is_not_judged(name, change):
    verdicts = judge(replace(FINE, **change), THRESHOLDS)
    assert [v.name for v in verdicts if v.passed is None] == [name]
    assert all(v.says.startswith("not judged") for v in verdicts if v.passed is None)


def test_the_tally_closes_windows_and_forgets_nothing_of_the_whole():
    tally = Tally()
    for took in range(1, 101):
        tally.sent(0.5)
        tally.answered("grpc 1", float(took))
    tally.ended(Outcome.CANCELLED, 3.0)
    first = tally.close_window(10.0)
    assert (first.at_s, first.seconds, first.requests) == (10.0, 10.0, 101)
    assert first.outcomes == {"answered": 100, "cancelled": 1}
    assert first.times == times_of([float(took) for took in range(1, 101)])
    assert first.sent_late_p99_ms == 0.5

    tally.answered("http 8", 500.0)
    tally.ended(Outcome.WRONG_VECTOR, 12.0, "cosine 0.1")
    tally.ended(Outcome.WRONG_VECTOR, 13.0, "cosine 0.2")
    tally.ended(Outcome.LATE, 14.0, "10 s")
    second = tally.close_window(15.0)
    assert (second.seconds, second.requests) == (5.0, 4)
    assert second.times is not None
    assert second.times.p50_ms == 500.0
    assert second.sent_late_p99_ms is None
    assert [(p.kind, p.count, p.first_at_s, p.first_reason) for p in tally.problems()] == [
        ("wrong vector", 2, 12.0, "cosine 0.1"),
        ("no answer in time", 1, 14.0, "10 s"),
    ]
    whole = tally.times()
    assert whole is not None
    assert (whole.requests, whole.p50_ms) == (101, 51.0)
    assert {kind: times.requests for kind, times in tally.times_by_kind().items()} == {"grpc 1": 100, "http 8": 1}
    assert tally.close_window(20.0).requests == 0


@pytest.fixture
def soaked(report) -> SoakReport:
    tally = Tally()
    tally.answered("grpc 1", 12.0)
    tally.ended(Outcome.FAILED, 1.0, "a pipe | and\ntwo lines")
    one = tally.close_window(10.0)
    return SoakReport(
        schema_version=SCHEMA_VERSION,
        partial=False,
        started="2026-01-01T00:00:00+00:00",
        load_s=10.0,
        host=report.host,
        versions={"numpy": "1"},
        source=report.source,
        subject=Subject(
            name="mine", fingerprint="f" * 16, engine="fake", precision="fp32", floor=0.99, canaries=0, long_texts=100
        ),
        workload=report.workload,
        settings=Settings(
            engine="auto", precision="auto", minutes=1.0, share=0.5, window_s=10.0, seed=0, thresholds=THRESHOLDS
        ),
        capacity_per_s=200.0,
        offered_per_s=100.0,
        generator_cpu_share=0.2,
        times=tally.times(),
        times_by_kind=tally.times_by_kind(),
        outcomes=one.outcomes,
        windows=(one,),
        memory=(sample(0, 10.0, 20.0), sample(10, 11.0, 22.0)),
        growth_mb_per_hour={},
        p99_drift=None,
        problems=tally.problems(),
        server_said=("broken", "starting again"),
        ending=CLEAN_END,
        verdicts=judge(replace(FINE, unexpected=1), THRESHOLDS),
    )


def test_the_files_hold_the_whole_report(soaked, tmp_path):
    write_files(soaked, tmp_path)
    assert from_json(SoakReport, json.loads((tmp_path / "soak.json").read_text()), "soak.json") == soaked
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "soak.md").read_text()
    assert "# Soak of mine: beyond its thresholds" in text
    assert "| errors | **FAILED** | 1 of 100 requests" in text
    assert "a pipe \\| and two lines" in text
    assert "0.5 of the 200.0" in text
    assert "starting again" in text
    assert str(Path.home()) not in text


def test_a_report_of_nothing_is_a_valid_one(soaked, tmp_path):
    nothing = replace(
        soaked,
        partial=True,
        capacity_per_s=None,
        offered_per_s=None,
        generator_cpu_share=None,
        load_s=0.0,
        times=None,
        times_by_kind={},
        outcomes={},
        windows=(),
        memory=(),
        problems=(),
        server_said=(),
        ending=None,
    )
    write_files(nothing, tmp_path)
    assert from_json(SoakReport, json.loads((tmp_path / "soak.json").read_text()), "soak.json") == nothing
    assert "**Partial" in (tmp_path / "soak.md").read_text()


def test_a_generator_that_was_late_is_told(soaked):
    late = replace(soaked, windows=(replace(soaked.windows[0], sent_late_p99_ms=80.0),))
    assert "In 1 of 1 windows the generator sent requests more than 20 ms late" in render(late)
    assert "ms late" not in render(soaked)
