"""Our figures beside hyperfine's: what two whole processes differ by, and a clear word where they do not agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import agree
from benchmarks.encode_passes import BATCH, SINGLE
from benchmarks.latency import TEXTS_A_LENGTH
from benchmarks.workload import QUICK_TEXTS
from mirror_runtime.bundle import EngineName, Precision
from tests.support.paths import ROOT

# Loading takes it half a second, a pass the time that the test says.
HYPERFINE = """#!{python}
import json, shlex, sys
options = dict(part.split("=", 1) for part in sys.argv[1:] if part.startswith("--"))
*_, passes, way = shlex.split(sys.argv[-1])
median = 0.5 + int(passes) * {seconds}[way]
json.dump({{"results": [{{"median": median}}]}}, open(options["--export-json"], "w"))
"""


@pytest.fixture
def bundle(make_bundle, make_artifact) -> Path:
    return make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))


@pytest.fixture
def stopwatch(tmp_path, monkeypatch, report):
    """Put a hyperfine on PATH that gives these seconds a pass, and a report beside it."""

    def make(batch: float, single: float) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "hyperfine"
        program.write_text(HYPERFINE.format(python=sys.executable, seconds={BATCH: batch, SINGLE: single}))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    monkeypatch.setattr(agree, "_report", lambda *_: report)
    monkeypatch.setattr(agree, "TOKENS", 8)  # the length that the report has: 1.5 ms on average, and 200 texts/s
    return make


def test_what_twice_the_texts_take_longer_is_the_figure(bundle, stopwatch, capsys):
    arguments = [str(bundle), "--engine", "fake", "--precision", "fp32", "--rounds", "2", "--passes", "2"]
    stopwatch(batch=QUICK_TEXTS / 190, single=TEXTS_A_LENGTH * 0.0016)
    assert agree.main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["throughput"]["hyperfine"] == pytest.approx([190, 190])
    assert line["throughput"]["ratio"] == pytest.approx(200 / 190)
    assert line["latency, 8 tokens"]["hyperfine"] == pytest.approx([1.6, 1.6])
    assert line["latency, 8 tokens"]["ours"] == [1.5, 1.5]


@pytest.mark.parametrize(
    ("batch", "single", "apart"), [(QUICK_TEXTS / 150, 0.0015, "throughput"), (QUICK_TEXTS / 200, 0.0012, "latency")]
)
def test_figures_that_are_apart_are_named_and_the_status_says_so(bundle, stopwatch, capsys, batch, single, apart):
    stopwatch(batch=batch, single=TEXTS_A_LENGTH * single)
    assert agree.main([str(bundle), "--engine", "fake", "--precision", "fp32", "--rounds", "1"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.endswith("apart"))
    assert f"fake fp32, {apart}" in line


def test_without_hyperfine_the_cure_is_named(bundle, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert agree.main([str(bundle)]) == 2
    assert "apt-get install hyperfine" in capsys.readouterr().err


@pytest.mark.parametrize("way", [BATCH, SINGLE])
def test_the_timed_program_ends_well(bundle, tmp_path, way):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["one", "two words"]))
    command = [sys.executable, "benchmarks/encode_passes.py", str(bundle), "fake", "fp32", str(texts), "2", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
