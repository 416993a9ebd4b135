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
from benchmarks.load.generator import Window
from benchmarks.load.requests import ExpectedVectors
from benchmarks.load.servers import ALL, Ending, served_bundle
from benchmarks.soak import main
from benchmarks.soak_report import Observed, Settings, drift, growth, judge, write_files
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.triton.server.workspace import SHARED_MEMORY
from tests.support.mirror_serve import wait_until

SETTINGS = Settings(
    engine="auto", precision="auto", minutes=1.0, share=0.5, window_s=10.0, max_growth=30.0, max_drift=1.5,
    max_unexpected=0, seed=0,
)  # fmt: skip
CLEAN_END = Ending(by_itself=False, status=0, seconds=1.0, leftovers=())


def memory(at_s: float, server: float, model: float) -> tuple[float, dict[str, float]]:
    return at_s, {"tritonserver": server, "model": model, ALL: server + model}


def window(*times_ms: float, at_s: float = 10.0, late_ms: float = 0.5, **ends: int) -> Window:
    return Window(
        at_s=at_s,
        seconds=10.0,
        answered_ms={"grpc 1": list(times_ms)} if times_ms else {},
        lag_ms=[late_ms],
        outcomes=Counter({"answered": len(times_ms), **ends}),
        first={end: (at_s, f"{end} | at\n{at_s}") for end in ends if end != "cancelled"},
    )


def windows(*p99s_ms: float | None) -> list[Window]:
    return [window(cancelled=1) if p99_ms is None else window(p99_ms) for p99_ms in p99s_ms]


def fine(**changes) -> Observed:
    """A quarter of an hour without a finding: 5 MB an hour, and p99 grows by a tenth."""
    found = {
        "before": window(*[5.0] * 2000),
        "windows": windows(*[10.0] * 3, *[10.5] * 3, *[11.0] * 3),
        "memory": [memory(60.0 * i, 100.0, 200.0 + i / 12) for i in range(31)],
        "load_s": 90.0,
        "ending": CLEAN_END,
    }
    return Observed(**{**found, **changes})


def test_growth_is_of_the_second_half_by_process_and_per_hour():
    # It doubles while it warms up, then 1 MB every 60 s in the model alone, with some scatter.
    scatter = np.random.default_rng(0).normal(0, 0.05, 21)
    warming = [memory(10.0 * i, 50.0, 100.0 + 10 * i) for i in range(10)]
    steady = [memory(10.0 * i, 50.0, 200.0 + i / 6 + scatter[i]) for i in range(10, 21)]
    found = growth(Observed(memory=[*warming, *steady]))
    assert found == pytest.approx({"tritonserver": 0.0, "model": 60.0, ALL: 60.0}, abs=4)
    assert found[ALL] == pytest.approx(found["model"])
    for few in ([], [memory(0, 1.0, 1.0)], [memory(0, 1.0, 1.0), memory(10, 9.0, 9.0)]):
        assert growth(Observed(memory=few)) == {}


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
    assert drift(Observed(windows=windows(*p99s))) == ratio


@pytest.mark.parametrize(
    ("name", "passed", "changes"),
    [
        ("errors", False, {"windows": [replace(one, outcomes=Counter(), answered_ms={}) for one in windows(1.0)] * 9}),
        ("errors", False, {"windows": [*windows(*[10.0] * 9), window(**{"wrong vector": 1})]}),
        ("errors", False, {"before": window(1.0, **{"server error": 1})}),
        ("memory", False, {"memory": [memory(60.0 * i, 100.0, 200.0 + i) for i in range(31)]}),
        ("p99 drift", False, {"windows": windows(*[10.0] * 3, *[16.0] * 6)}),
        ("restarts", False, {"restarts": 1}),
        ("end", False, {"ending": CLEAN_END._replace(status=None)}),
        ("end", False, {"ending": CLEAN_END._replace(status=1)}),
        ("end", False, {"ending": CLEAN_END._replace(by_itself=True)}),
        ("end", False, {"ending": CLEAN_END._replace(leftovers=("process 7 (model)",))}),
        # What a short run cannot show is not judged.
        ("memory", None, {"memory": []}),
        ("memory", None, {"memory": [memory(1.0 * i, 999.0 * i, 1.0) for i in range(20)]}),
        ("p99 drift", None, {"windows": windows(*[10.0] * 8)}),
        ("end", None, {"ending": None}),
    ],
)
def test_a_run_within_its_thresholds_passes_and_each_fails_alone(name, passed, changes):
    assert all(verdict.passed for verdict in judge(fine(), replace(SETTINGS, max_growth=5.01, max_drift=1.1)))
    verdicts = judge(fine(**changes), SETTINGS)
    assert next(verdict for verdict in verdicts if verdict.name == name).passed is passed
    others = [verdict for verdict in verdicts if verdict.name != name]
    assert all(v.passed or (v.name == "p99 drift" and "windows" in changes) for v in others)
    assert all(verdict.finding.startswith("not judged") for verdict in verdicts if verdict.passed is None)


def test_the_files_have_the_whole_report(report, tmp_path):
    failed = window(13.0, 11.0, at_s=20.0, late_ms=80.0, **{"server error": 2, "cancelled": 1})
    observed = fine(windows=[window(12.0, **{"server error": 1}), failed], log=["broken", "starting again"])
    facts = {"bundle": "mine", "host": report.facts.host, "workload": report.facts.workload}
    headline = write_files(tmp_path, "fake fp32", SETTINGS, facts, observed)
    written, found = read(tmp_path)
    assert (written["passed"], written["unexpected"], written["requests"], written["partial"]) == (False, 3, 7, False)
    assert headline.items() <= written.items()
    assert written["p99_ms"] == pytest.approx(12.98)
    assert written["facts"]["settings"]["max_drift"] == 1.5
    assert written["problems"] == [
        {"outcome": "server error", "count": 3, "first_at_s": 10.0, "first_reason": "server error | at\n10.0"}
    ]
    assert found["requests per second", "open"] == [100.0]
    assert found["time per request", "grpc 1"] == found["time per request", ALL] == [12.0, 13.0, 11.0]
    assert found["requests", "server error", "no"] == [3.0]
    assert found["requests", "cancelled", "yes"] == [1.0]
    assert found["end of a window",] == [10.0, 20.0]
    assert found["sending lag p99",] == [0.5, 80.0]
    assert found["resident memory", "model"][:2] == [200.0, 200.0 + 1 / 12]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "soak.md").read_text()
    for words in (
        "# Soak of mine: beyond its thresholds", "| errors | FAILED | 3 of 7 requests",
        "| server error | 3 | 10.0 | server error \\| at 10.0 |", "starting again", "a CPU",
        "In 1 of 2 windows the generator sent requests more than 20 ms late",
    ):  # fmt: skip
        assert words in text
    assert str(Path.home()) not in text


def test_an_interrupted_run_that_saw_nothing_has_a_report(tmp_path):
    write_files(tmp_path, "fake fp32", SETTINGS, {"bundle": "mine"}, Observed(partial=True))
    assert read(tmp_path)[0]["measurements"] == []
    text = (tmp_path / "soak.md").read_text()
    assert "**Partial" in text
    assert "ms late" not in text


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

    def interrupted(observed: Observed) -> str:
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
        server.memory()
        pids = {name: pid for pid, name in server.processes().items()}
        os.kill(pids["model"], signal.SIGKILL)
        wait_until(lambda: any("serving again" in line for line in server.log))
        assert server.memory().keys() >= {"mirror serve", "tritonserver", "model"}
        assert server.restarts == 1
        region = SHARED_MEMORY / f"mirror_{pids['mirror serve']}_left"
        region.touch()
        ending = server.end()
        assert (ending.by_itself, ending.status) == (False, 0)
        assert ending.leftovers == (f"shared memory {region.name}",)
    assert not region.exists()


@pytest.mark.serving
def test_a_server_that_is_killed_has_ended_by_itself_and_leaves_no_process(gateway_bundle, tmp_path):
    with served_bundle(gateway_bundle, "--engine", "fake") as server:
        pids = list(server.processes())
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not server.running)
        assert server.end()[:2] == (True, -signal.SIGKILL)
    assert not any(map(alive, pids))
    refused = pytest.raises(ServerError, match=r"serve did not start \(status 2\)(.|\n)* is not a bundle")
    with refused, served_bundle(tmp_path):
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
