"""The soak: its arithmetic and report without a server, then real `mirror serve` runs."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.load.requests import ExpectedVectors
from benchmarks.load.window import FirstSeen, Window
from benchmarks.soak import main
from benchmarks.soaking.observations import ALL, Ending, MemorySample, Observations, WindowFigures
from benchmarks.soaking.report import Settings, SoakReport, Subject, render, write_files
from benchmarks.soaking.server import served_bundle
from benchmarks.soaking.verdicts import Thresholds, drift, growth, judge, restarts
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.triton.server.server import SHARED_MEMORY
from tests.support.mirror_serve import wait_until

THRESHOLDS = Thresholds(growth_mb_per_hour=30.0, drift=1.5, unexpected=0)
CLEAN_END = Ending(by_itself=False, status=0, seconds=1.0, leftovers=())


def sample(at_s: float, *sizes: float, pid: int | None = 10) -> MemorySample:
    """A tritonserver's memory, and its models'."""
    resident_mb = dict(zip(("tritonserver", "model", ALL), (sizes[0], sum(sizes[1:]), sum(sizes)), strict=True))
    return MemorySample(at_s=at_s, server=pid, resident_mb=resident_mb)


def figures(p99_ms: float | None) -> WindowFigures:
    return WindowFigures(at_s=0.0, unexpected=0, p50_ms=p99_ms, p99_ms=p99_ms, lag_p99_ms=None)


def window(*times_ms: float, at_s: float = 10.0, late_ms: float = 0.5, **ends: int) -> Window:
    return Window(
        at_s=at_s,
        seconds=10.0,
        answered_ms={"grpc 1": list(times_ms)},
        lag_ms=[late_ms],
        outcomes=Counter({"answered": len(times_ms), **ends}),
        first={end: FirstSeen(at_s=at_s, reason=f"{end} at {at_s}") for end in ends if end != "cancelled"},
        cpu_s=0.5,
    )


def fine(**changes) -> Observations:
    """A quarter of an hour without a finding: 5 MB an hour, and p99 grows by a tenth."""
    observed = Observations(
        memory=[sample(60.0 * i, 100.0, 200.0 + i / 12) for i in range(31)],
        windows=[figures(10.0)] * 3 + [figures(10.5)] * 3 + [figures(11.0)] * 3,
        ending=CLEAN_END,
    )
    observed.outcomes.update({"answered": 95, "cancelled": 5})
    for name, value in changes.items():
        setattr(observed, name, value)
    return observed


def test_growth_is_of_the_second_half_by_process_and_per_hour():
    # It doubles while it warms up, then 1 MB every 60 s in the model alone, with some scatter.
    scatter = np.random.default_rng(0).normal(0, 0.05, 21)
    warming = [sample(10.0 * i, 50.0, 100.0 + 10 * i) for i in range(10)]
    steady = [sample(10.0 * i, 50.0, 100.0, 100.0 + i / 6 + scatter[i]) for i in range(10, 21)]
    found = growth([*warming, *steady])
    assert found == pytest.approx({"tritonserver": 0.0, "model": 60.0, ALL: 60.0}, abs=4)
    assert found[ALL] == pytest.approx(found["model"])

    assert growth([]) == growth([sample(0, 1.0)]) == growth([sample(0, 1.0), sample(10, 9.0)]) == {}  # too few


@pytest.mark.parametrize(
    ("p99s", "ratio"),
    [
        ([10] * 4 + [99] * 4 + [20] * 4, 2.0),
        ([20] * 4 + [99] * 4 + [10] * 4, 0.5),
        ([10] * 11 + [5000], 1.0),  # one disturbed window
        ([10, 10, None, 10, 15, 15, 15, 30, None, 30, 30], 3.0),  # windows without answers do not count
        ([10] * 8 + [None] * 50, None),
    ],
)
def test_drift_compares_the_last_third_with_the_first(p99s, ratio):
    assert drift([figures(p99) for p99 in p99s]) == ratio


def test_a_new_tritonserver_is_a_restart_and_a_moment_without_one_is_not_two():
    steady = [sample(at, 1.0, pid=10) for at in range(3)]
    assert restarts(steady) == 0
    assert restarts([*steady, sample(4, 1.0, pid=None), sample(5, 1.0, pid=20), sample(6, 1.0, pid=20)]) == 1


def test_a_run_within_its_thresholds_passes():
    assert [verdict.passed for verdict in judge(fine(), THRESHOLDS)] == [True] * 5
    assert judge(fine(), replace(THRESHOLDS, growth_mb_per_hour=5.01, drift=1.1))[1].passed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("errors", {"outcomes": fine().outcomes - fine().outcomes}),
        ("memory", {"memory": [sample(60.0 * i, 100.0, 200.0 + i) for i in range(31)]}),
        ("p99 drift", {"windows": [figures(10.0)] * 3 + [figures(16.0)] * 6}),
        ("restarts", {"memory": [*fine().memory[:-1], sample(1800.0, 100.0, 202.5, pid=20)]}),
        ("end", {"ending": replace(CLEAN_END, status=None)}),
        ("end", {"ending": replace(CLEAN_END, status=1)}),
        ("end", {"ending": replace(CLEAN_END, by_itself=True)}),
        ("end", {"ending": replace(CLEAN_END, leftovers=("process 7 (model)",))}),
    ],
)
def test_each_threshold_fails_alone(name, changes):
    assert [verdict.name for verdict in judge(fine(**changes), THRESHOLDS) if verdict.passed is False] == [name]


def test_an_unexpected_end_fails_the_run_and_its_first_reason_is_kept():
    observed = fine()
    observed.add(window(12.0, 13.0, at_s=10.0, **{"wrong vector": 2, "cancelled": 1}))
    observed.add(window(at_s=20.0, **{"wrong vector": 1}))
    observed.add(Window(at_s=30.0, seconds=10, cpu_s=1))
    assert observed.problems == {"wrong vector": 3}
    assert observed.first == {"wrong vector": (10.0, "wrong vector at 10.0")}
    assert (observed.unexpected, observed.answered, observed.cpu_s) == (3, 97, 2.0)
    last, empty_of_answers = observed.windows[-2:]  # the window without any request is left out
    assert (last.p50_ms, last.lag_p99_ms, empty_of_answers.p99_ms) == (12.5, 0.5, None)
    assert [v.name for v in judge(observed, THRESHOLDS) if v.passed is False] == ["errors"]
    assert {label: len(times) for label, times in observed.times()} == {ALL: 2, "grpc 1": 2}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("memory", {"memory": []}),
        ("memory", {"memory": [sample(1.0 * i, 999.0 * i) for i in range(20)]}),
        ("p99 drift", {"windows": [figures(10.0)] * 8}),
        ("end", {"ending": None}),
    ],
)
def test_what_a_short_run_cannot_show_is_not_judged(name, changes):
    verdicts = judge(fine(**changes), THRESHOLDS)
    assert [v.name for v in verdicts if v.passed is None] == [name]
    assert all(v.finding.startswith("not judged") for v in verdicts if v.passed is None)


@pytest.fixture
def soaked(report) -> SoakReport:
    observed = Observations(
        capacity_per_s=200.0,
        load_s=10.0,
        memory=[sample(0, 10.0, 20.0), sample(10, 11.0, 22.0)],
        server_log=("broken", "starting again"),
        ending=CLEAN_END,
    )
    failed = window(12.0, **{"server error": 1})
    observed.add(replace(failed, first={"server error": FirstSeen(at_s=1.0, reason="a pipe | and\ntwo lines")}))
    return SoakReport(
        started="2026-01-01T00:00:00+00:00",
        host=report.facts.host,
        versions={"numpy": "1"},
        source=report.facts.source,
        subject=Subject(
            name="mine", fingerprint="f" * 16, engine="fake", precision="fp32", floor=0.99, canaries=0, long_texts=100
        ),
        workload=report.facts.workload,
        settings=Settings(
            engine="auto", precision="auto", minutes=1.0, share=0.5, window_s=10.0, seed=0, thresholds=THRESHOLDS
        ),
        observed=observed,
    )


def test_the_files_have_the_whole_report(soaked, tmp_path):
    write_files(soaked, tmp_path)
    written, found = read(tmp_path)
    assert (written["passed"], written["unexpected"], written["p99_ms"]) == (False, 1, 12.0)
    assert written["problems"][0]["first_reason"] == "a pipe | and\ntwo lines"
    assert found["requests per second", "open"] == [100.0]
    assert found["time per request", "grpc 1"] == [12.0]
    assert found["requests", "server error", "no"] == [1.0]
    assert found["resident memory", "model"] == [20.0, 22.0]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "soak.md").read_text()
    assert "# Soak of mine: beyond its thresholds" in text
    assert "| errors | **FAILED** | 1 of 2 requests" in text
    assert "a pipe \\| and two lines" in text
    assert "0.5 of the 200.0" in text
    assert "starting again" in text
    assert str(Path.home()) not in text

    assert "ms late" not in text
    soaked.observed.add(window(12.0, late_ms=80.0))
    assert "In 1 of 2 windows the generator sent requests more than 20 ms late" in render(soaked)


def test_an_interrupted_run_that_saw_nothing_has_a_report(soaked, tmp_path):
    write_files(replace(soaked, observed=Observations(partial=True)), tmp_path)
    assert json.loads((tmp_path / "soak.json").read_text())["measurements"] == []
    assert "**Partial" in (tmp_path / "soak.md").read_text()


def command(bundle: Path, output: Path, minutes: float) -> list[str]:
    texts = output.with_name("texts.txt")  # collecting the default ones takes seconds
    texts.write_text("".join(f"the quick brown fox number {i} {'jumps ' * (i % 9)}\n" for i in range(200)))
    options = ["--engine", "fake", "--texts", str(texts), "--minutes", str(minutes), "--window", "1"]
    return [str(bundle), *options, "--output", str(output)]


def read(output: Path) -> tuple[dict, dict]:
    """The report, and its samples by metric and conditions."""
    report = json.loads((output / "soak.json").read_text())
    return report, {(m["metric"], *m.get("conditions", {}).values()): m["samples"] for m in report["measurements"]}


@pytest.mark.serving
@pytest.mark.slow  # a real server under load for six seconds
def test_a_clean_run_is_within_its_thresholds(gateway_bundle, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(gateway_bundle, output, 0.1)) == 0, capsys.readouterr().err
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline["passed"] is True
    report, found = read(output)
    assert (report["partial"], report["problems"]) == (False, [])
    outcomes = {key[1] for key in found if key[0] == "requests"}
    assert {"answered", "bad request refused"} <= outcomes <= {"answered", "bad request refused", "cancelled"}
    assert {key[1] for key in found if key[0] == "time per request"} >= {"all", "grpc 1", "http 1", "grpc 8", "http 8"}
    assert len(found[("end of a window",)]) >= 5
    (capacity,), requests = found["requests per second", "closed"], headline["requests"]
    assert requests / 6 == pytest.approx(0.5 * capacity, rel=0.25)
    for name in ("mirror serve", "tritonserver", "model", "all"):
        assert min(found["resident memory", name]) > 1
    assert (report["ending"]["status"], report["ending"]["leftovers"]) == (0, [])
    assert {path.name for path in output.iterdir()} == {"soak.json", "soak.md", "soak.png"}


@pytest.mark.serving
@pytest.mark.slow  # a real server under load, interrupted
def test_wrong_vectors_are_found_and_ctrl_c_leaves_a_partial_report(gateway_bundle, tmp_path, monkeypatch, capsys):
    compute = ExpectedVectors.compute

    def spoilt(*arguments):
        expected = compute(*arguments)
        components = expected.components.copy()
        components[: expected.long_from : 10] *= -1
        return replace(expected, components=components)

    def interrupted(observed: Observations) -> str:
        if len(observed.windows) >= 2:
            signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr(ExpectedVectors, "compute", spoilt)
    monkeypatch.setattr(soak, "_summary", interrupted)
    output = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    try:
        assert main(command(gateway_bundle, output, 1.0)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    report, _ = read(output)
    assert report["partial"] is True
    assert report["load_s"] < 30
    (problem,) = report["problems"]
    assert problem["outcome"] == "wrong vector"
    assert "cosine -1.0" in problem["first_reason"]
    assert (report["ending"]["status"], report["ending"]["leftovers"]) == (0, [])
    assert "FAILED     errors" in capsys.readouterr().err


@pytest.mark.serving
@pytest.mark.slow  # a real server whose model is killed and restarted
def test_a_restart_and_leftovers_are_found(gateway_bundle):
    with served_bundle(gateway_bundle, "--engine", "fake") as server:
        before = server.memory(0)
        pids = {name: pid for pid, name in server.processes().items()}
        os.kill(pids["model"], signal.SIGKILL)
        wait_until(lambda: any("serving again" in line for line in server.log))
        after = server.memory(1)
        assert after.resident_mb.keys() >= {"mirror serve", "tritonserver", "model"}
        assert restarts([before, after]) == 1
        region = SHARED_MEMORY / f"mirror_{pids['mirror serve']}_left"
        region.touch()
        ending = server.end()
        assert (ending.by_itself, ending.status) == (False, 0)
        assert ending.leftovers == (f"shared memory {region.name}",)
    assert not region.exists()


@pytest.mark.serving
def test_a_server_that_is_killed_has_ended_by_itself_and_leaves_no_process(gateway_bundle):
    with served_bundle(gateway_bundle, "--engine", "fake") as server:
        pids = list(server.processes())
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not server.running)
        ending = server.end()
        assert (ending.by_itself, ending.status) == (True, -signal.SIGKILL)
    assert not any(map(alive, pids))


@pytest.mark.process
def test_a_server_that_does_not_start_names_the_reason(tmp_path):
    with (
        pytest.raises(ServerError, match=r"serve did not start \(status 2\)(.|\n)* is not a bundle"),
        served_bundle(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{absent}"], "is not a bundle"),
        (["{bundle}", "--engine", "nothing"], "engine 'nothing' is unknown"),
        (["{bundle}", "--output", "{bundle}"], "is not replaced"),
        (["{bundle}", "--texts", "{absent}"], "cannot be read"),
        (["{bundle}", "--share", "2"], "--share"),
    ],
)
def test_mistakes_end_in_status_2_before_anything_is_served(gateway_bundle, tmp_path, capsys, arguments, message):
    names = {"bundle": gateway_bundle, "absent": tmp_path / "absent"}
    options = [argument.format(**names) for argument in arguments]
    if "--output" not in options:
        options += ["--output", str(tmp_path / "out")]
    assert main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []
