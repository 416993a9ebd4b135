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
from benchmarks.soak_report import Observed, drift, growth, judge, write_report
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.triton.server.workspace import SHARED_MEMORY
from tests.support.mirror_serve import wait_until

MODEL = "triton_python_backend_stub"
CLEAN_END = Ending(by_itself=False, status=0, seconds=1.0, leftovers=())


def memory(at_s: float, server: float, model: float) -> tuple[float, dict[str, float]]:
    return at_s, {"tritonserver": server, "model": model, ALL: server + model}


def window(*times_ms: float, at_s: float = 10.0, **ends: int) -> Window:
    return Window(
        at_s=at_s,
        seconds=10.0,
        times_ms=list(times_ms),
        lag_ms=[0.5],
        outcomes=Counter({"answered": len(times_ms), **ends}),
        first={end: (at_s, f"{end} | at\n{at_s}") for end in ends if end != "cancelled"},
    )


def observed(*windows: Window, before: Window | None = None, **changes) -> Observed:
    """A quarter of an hour without a finding but those of the windows: 5 MB an hour."""
    quiet = {"memory": [memory(60.0 * i, 100.0, 200.0 + i / 12) for i in range(31)], "ending": CLEAN_END}
    found = Observed(capacity=200.0, load_s=90.0, **{**quiet, **changes})
    found.count(before or window(5.0))
    for one in windows:
        found.add(one)
    return found


FINE = [window(ms) for ms in [10.0] * 3 + [10.5] * 3 + [11.0] * 3]


def test_growth_is_of_the_second_half_by_process_and_per_hour():
    # It doubles while it warms up, then 1 MB every 60 s in the model alone, with some scatter.
    scatter = np.random.default_rng(0).normal(0, 0.05, 21)
    warming = [memory(10.0 * i, 50.0, 100.0 + 10 * i) for i in range(10)]
    steady = [memory(10.0 * i, 50.0, 200.0 + i / 6 + scatter[i]) for i in range(10, 21)]
    found = growth([*warming, *steady])
    assert found == pytest.approx({"tritonserver": 0.0, "model": 60.0, ALL: 60.0}, abs=4)
    for few in ([], [memory(0, 1.0, 1.0)], [memory(0, 1.0, 1.0), memory(10, 9.0, 9.0)]):
        assert growth(few) == {}


@pytest.mark.parametrize(
    ("p99s", "ratio"),
    [
        ([10] * 4 + [99] * 4 + [20] * 4, 2.0),
        ([20] * 4 + [99] * 4 + [10] * 4, 0.5),
        ([10] * 11 + [5000], 1.0),  # one disturbed window
        ([10] * 8, None),
    ],
)
def test_drift_compares_the_last_third_with_the_first(p99s, ratio):
    silent = [window(cancelled=1)] * 50  # windows without answers do not count
    assert drift(observed(*map(window, p99s), *silent).windows) == ratio


@pytest.mark.parametrize(
    ("name", "passed", "found"),
    [
        ("errors", False, observed()),
        ("errors", False, observed(*FINE, window(11.0, **{"wrong vector": 1}))),
        ("errors", False, observed(*FINE, before=window(1.0, **{"server error": 1}))),
        ("memory", False, observed(*FINE, memory=[memory(60.0 * i, 100.0, 200.0 + i) for i in range(31)])),
        ("p99 drift", False, observed(*FINE[:3], *[window(16.0)] * 6)),
        ("restarts", False, observed(*FINE, restarts=1)),
        ("end", False, observed(*FINE, ending=CLEAN_END._replace(status=None))),
        ("end", False, observed(*FINE, ending=CLEAN_END._replace(status=1))),
        ("end", False, observed(*FINE, ending=CLEAN_END._replace(by_itself=True))),
        ("end", False, observed(*FINE, ending=CLEAN_END._replace(leftovers=("process 7 (model)",)))),
        # What a short run cannot show is not judged.
        ("memory", None, observed(*FINE, memory=[])),
        ("memory", None, observed(*FINE, memory=[memory(1.0 * i, 999.0 * i, 1.0) for i in range(20)])),
        ("p99 drift", None, observed(*FINE[:8])),
        ("end", None, observed(*FINE, ending=None)),
    ],
)
def test_a_run_within_its_thresholds_passes_and_each_fails_alone(name, passed, found):
    assert all(verdict.passed for verdict in judge(observed(*FINE), 5.01, 1.11))
    verdicts = judge(found, 30.0, 1.5)
    assert next(verdict for verdict in verdicts if verdict.name == name).passed is passed
    others = [verdict for verdict in verdicts if verdict.name != name]
    assert all(v.passed or (v.name == "p99 drift" and not found.windows) for v in others)


def test_the_file_has_the_whole_report(report, tmp_path):
    failed = window(13.0, 11.0, at_s=20.0, **{"server error": 2, "cancelled": 1})
    found = observed(window(12.0, **{"server error": 1}), failed, log=["broken", "starting again"])
    facts = {"bundle": "mine", "host": report.facts.host, "workload": report.facts.workload}
    headline = write_report(tmp_path, "fake fp32", facts, found, judge(found, 30.0, 1.5))
    written = read(tmp_path)
    assert (written["passed"], written["unexpected"], written["requests"], written["partial"]) == (False, 3, 8, False)
    assert headline.items() <= written.items()
    assert written["server_log"] == ["broken", "starting again"]
    assert written["facts"]["host"]["cpu_model"] == "a CPU"
    assert written["problems"] == [
        {"outcome": "server error", "count": 3, "first_at_s": 10.0, "first_reason": "server error | at\n10.0"}
    ]
    assert written["capacity_per_s"] == 200.0
    assert written["outcomes"] == {"answered": 4, "server error": 3, "cancelled": 1}
    assert [(one["at_s"], one["p99_ms"]) for one in written["windows"]] == [(10.0, 12.0), (20.0, pytest.approx(12.98))]
    sample = {"at_s": 60.0, "tritonserver": 100.0, "model": 200.0 + 1 / 12, ALL: 300.0 + 1 / 12}
    assert written["memory_mb"][1] == pytest.approx(sample)


def test_an_interrupted_run_that_saw_nothing_has_a_report(tmp_path):
    nothing = Observed(partial=True)
    write_report(tmp_path, "fake fp32", {"bundle": "mine"}, nothing, judge(nothing, 30.0, 1.5))
    written = read(tmp_path)
    assert (written["partial"], written["requests"], written["growth_mb_per_hour"]) == (True, 0, None)


@pytest.fixture
def gentle(monkeypatch):
    """Offer a tenth of what the server can do: half of it is seconds of both cores."""
    monkeypatch.setattr(soak, "SHARE", 0.1)


def command(bundle: Path, output: Path, minutes: float) -> list[str]:
    texts = output.with_name("texts.txt")  # collecting the default ones takes seconds
    texts.write_text("".join(f"the quick brown fox number {i} {'jumps ' * (i % 9)}\n" for i in range(200)))
    options = ["--engine", "fake", "--texts", str(texts), "--minutes", str(minutes), "--window", "1"]
    return [str(bundle), *options, "--output", str(output)]


def read(output: Path) -> dict:
    report: dict = json.loads((output / "soak.json").read_text())
    return report


@pytest.mark.serving
@pytest.mark.slow  # a real server under load for six seconds
def test_a_clean_run_is_within_its_thresholds(gentle, gateway_bundle, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(gateway_bundle, output, 0.1)) == 0, capsys.readouterr().err
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline["passed"] is True
    report = read(output)
    assert (report["partial"], report["problems"]) == (False, [])
    ends = {"answered", "bad request refused"}
    assert ends <= report["outcomes"].keys() <= {*ends, "cancelled"}
    assert len(report["windows"]) >= 5
    assert headline["requests"] == pytest.approx((0.6 + 0.1 * 6) * report["capacity_per_s"], rel=0.25)
    for name in ("mirror serve", "tritonserver", MODEL, "all"):
        assert min(sample[name] for sample in report["memory_mb"]) > 1
    assert (report["ending"]["status"], report["ending"]["leftovers"]) == (0, [])
    assert {path.name for path in output.iterdir()} == {"soak.json"}


@pytest.mark.serving
@pytest.mark.slow  # a real server under load, interrupted
def test_wrong_vectors_are_found_and_ctrl_c_leaves_a_partial_report(
    gentle, gateway_bundle, tmp_path, monkeypatch, capsys
):
    compute = ExpectedVectors.compute

    def spoilt(*arguments):
        expected = compute(*arguments)
        components = expected.components.copy()
        components[::10] *= -1
        return replace(expected, components=components)

    def interrupted(found: Observed) -> str:
        if len(found.windows) >= 2:
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
    report = read(output)
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
        pids = {name: process.pid for process, name in server.processes().items()}
        os.kill(pids[MODEL], signal.SIGKILL)
        wait_until(lambda: any("serving again" in line for line in server.log))
        assert server.memory().keys() >= {"mirror serve", "tritonserver", MODEL}
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
        pids = [process.pid for process in server.processes()]
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
        (["{bundle}", "--minutes", "0"], "--minutes"),
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
