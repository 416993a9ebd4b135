"""benchmarks/soak.py against the real `mirror serve`: a clean run, a wrong vector, Ctrl-C, a restart, what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import soak_run
from benchmarks.soak import main
from benchmarks.soak_figures import restarts
from benchmarks.soak_results import MemorySample, SoakReport
from benchmarks.soak_server import ServedBundle
from mirror_runtime.bundle import from_json
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.triton.server.server import SHARED_MEMORY
from tests.support.mirror_serve import wait_until
from tests.support.paths import ROOT

pytestmark = [pytest.mark.serving, pytest.mark.slow]


def command(bundle: Path, output: Path, minutes: float) -> list[str]:
    texts = output.with_name("texts.txt")  # of the default ones the collection alone takes seconds
    texts.write_text("".join(f"the quick brown fox number {i} {'jumps ' * (i % 9)}\n" for i in range(200)))
    options = ["--engine", "fake", "--texts", str(texts), "--minutes", str(minutes), "--window", "1"]
    return [str(bundle), *options, "--output", str(output)]


def read(output: Path) -> SoakReport:
    return from_json(SoakReport, json.loads((output / "soak.json").read_text()), "soak.json")


def test_a_clean_run_is_within_its_thresholds(fake_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = command(fake_bundle, output, 0.1)
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["passed"] is True
    report = read(output)
    assert not report.partial
    assert report.problems == ()
    assert set(report.outcomes) == {"answered", "bad request refused", "cancelled"}
    assert report.outcomes["answered"] > 100
    assert set(report.times_by_kind) >= {f"{protocol} {size}" for protocol in ("grpc", "http") for size in (1, 8, 32)}
    assert len(report.windows) >= 5
    assert sum(window.requests for window in report.windows) == sum(report.outcomes.values())
    assert report.capacity_per_s is not None
    assert sum(report.outcomes.values()) / 6 == pytest.approx(0.5 * report.capacity_per_s, rel=0.25)
    for sample in report.memory:
        assert {"mirror serve", "tritonserver", "model"} <= {process.name for process in sample.processes}
        assert min(process.resident_mb for process in sample.processes) > 1
    assert report.ending is not None
    assert (report.ending.by_itself, report.ending.status, report.ending.left) == (False, 0, ())
    assert {"soak.json", "soak.md", "soak.png"} == {path.name for path in output.iterdir()}


def test_a_wrong_vector_fails_the_run(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = soak_run.prepare

    def spoilt(*arguments: object) -> soak_run.Served:
        served = prepare(*arguments)  # type: ignore[arg-type]
        components = served.expected.components.copy()
        components[: served.expected.long_from : 10] *= -1
        return replace(served, expected=replace(served.expected, components=components))

    monkeypatch.setattr("benchmarks.soak.prepare", spoilt)
    assert main(command(fake_bundle, tmp_path / "out", 0.05)) == 1
    (problem,) = read(tmp_path / "out").problems
    assert problem.kind == "wrong vector"
    assert "cosine -1.0" in problem.first_reason
    assert "FAILED     errors" in capsys.readouterr().err


def test_ctrl_c_leaves_a_valid_partial_report_and_no_server(fake_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = set(SHARED_MEMORY.glob("mirror_*"))
    with subprocess.Popen(
        [sys.executable, "benchmarks/soak.py", *command(fake_bundle, output, 0.5)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A runner that puts us into the background makes its children ignore Ctrl-C: a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            wait_until(lambda: set(SHARED_MEMORY.glob("mirror_*")) - before, timeout_s=60)
            time.sleep(8)  # the model gets ready, the rate takes 3 s, and some windows are over
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["partial"] is True
    report = read(output)
    assert report.partial
    assert report.windows
    assert report.load_s < 20
    assert report.problems == ()
    assert report.ending is not None
    assert (report.ending.status, report.ending.left) == (0, ())
    assert set(SHARED_MEMORY.glob("mirror_*")) <= before


def test_a_restart_and_what_is_left_are_seen(fake_bundle: Path) -> None:
    with ServedBundle(fake_bundle, "--engine", "fake") as server:
        before = MemorySample(at_s=0, processes=server.processes())
        pids = {process.name: process.pid for process in before.processes}
        os.kill(pids["model"], signal.SIGKILL)
        wait_until(lambda: any("serving again" in line for line in server.said))
        after = MemorySample(at_s=1, processes=server.processes())
        assert {process.name for process in after.processes} >= {"mirror serve", "tritonserver", "model"}
        assert restarts([before, after]) == 1
        region = SHARED_MEMORY / f"mirror_{pids['mirror serve']}_left"
        region.touch()
        ending = server.end()
        assert (ending.by_itself, ending.status) == (False, 0)
        assert ending.left == (f"shared memory {region.name}",)
    assert not region.exists()


def test_a_server_that_is_killed_has_ended_by_itself_and_nothing_of_it_runs_on(fake_bundle: Path) -> None:
    with ServedBundle(fake_bundle, "--engine", "fake") as server:
        pids = [process.pid for process in server.processes()]
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not server.running)
        ending = server.end()
        assert (ending.by_itself, ending.status) == (True, -signal.SIGKILL)
    assert not any(map(alive, pids))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"did not start: .* is not a bundle"), ServedBundle(tmp_path):
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
def test_mistakes_end_in_status_2_before_anything_is_served(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"bundle": fake_bundle, "absent": tmp_path / "absent"}
    given = [argument.format(**names) for argument in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "out")]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []
