"""Suite `startup`: one start of a process, timed to its first vector."""

import json
import sys

import pytest

from benchmarks.suites import startup
from benchmarks.suites.startup import Starter, our_starters, run_start
from mirror_runtime.errors import EngineError


def starter(code: str) -> Starter:
    return Starter(party="x", command=(sys.executable, "-S", "-c", code), installed_bytes=1)


@pytest.mark.process
def test_a_start_is_timed_to_its_first_vector_and_reports_its_memory(tmp_path):
    code = (
        "import sys, time; time.sleep(0.2); print('x'); print('ready 1000', flush=True); time.sleep(0.2); "
        "print('done', len(open(sys.argv[1]).read()))"
    )
    (tmp_path / "texts.json").write_text("seven..")
    start = run_start(starter(code), tmp_path / "texts.json")
    assert start.seconds >= 0.2
    assert (start.first_vector_bytes, start.peak_bytes) == (1000, 7)


@pytest.mark.process
@pytest.mark.parametrize(
    ("printed", "missing"), [("", "its first vector"), ("print('ready 1'); ", "the vectors of the texts")]
)
def test_a_start_without_a_vector_is_an_error(tmp_path, printed, missing):
    with pytest.raises(EngineError, match=f"status 1 before {missing}: no luck"):
        run_start(starter(printed + "raise SystemExit('no luck')"), tmp_path / "absent")


@pytest.mark.process
def test_a_start_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "END_S", 0.1)
    monkeypatch.setattr(startup, "LONGEST_S", 1.0)
    (tmp_path / "texts.json").write_text("")
    done = run_start(
        starter("import time; print('ready 1\\ndone 2', flush=True); time.sleep(60)"), tmp_path / "texts.json"
    )
    assert done.peak_bytes == 2
    with pytest.raises(EngineError, match="status -9 before the vectors of the texts"):
        run_start(starter("import time; print('ready 1', flush=True); time.sleep(60)"), tmp_path / "texts.json")


@pytest.mark.process
def test_our_own_start_computes_vectors_and_reports_its_memory(plan, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(plan.workload.texts))
    (ours,) = our_starters(plan)
    start = run_start(ours, file)
    assert 10e6 < start.first_vector_bytes <= start.peak_bytes < 2e9
