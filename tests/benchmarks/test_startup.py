"""Suite `startup`: one start of a process, timed to its first vector, and what a party installs."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.protocol import installed_bytes
from benchmarks.suites import startup
from benchmarks.suites.startup import Starter, needed_by, our_bytes, our_starters, run_start
from mirror_runtime.bundle import EngineName
from mirror_runtime.errors import PeerError

ANSWER = "input(); print({}, flush=True); "


def starter(code: str) -> Starter:
    return Starter("x", (sys.executable, "-S", "-c", code), Path(), "b", 1)


@pytest.mark.process
def test_a_start_is_timed_to_its_first_vector_and_reports_its_memory():
    code = f"import time; time.sleep(0.2); {ANSWER} x = bytearray(50_000_000); time.sleep(0.3); {ANSWER} input()"
    seconds, first, peak = run_start(starter(code), [])
    assert 0.2 <= seconds < 30
    assert 0 < first < peak - 20e6


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no luck')", "load: the worker ended with status 1: no luck"),
        (ANSWER + "raise SystemExit('no luck')", "encode: the worker ended with status 1: no luck"),
        (ANSWER + "import time; time.sleep(60)", "encode: no answer after 1 seconds"),
    ],
)
def test_a_start_without_a_vector_is_an_error_and_is_killed_in_time(monkeypatch, code, message):
    monkeypatch.setattr(startup, "LONGEST_S", 1.0)
    with pytest.raises(PeerError, match=message):
        run_start(starter(code), [])


@pytest.mark.process
def test_our_own_start_computes_vectors_and_reports_its_memory(plan):
    (ours,) = our_starters(plan)
    _, first, peak = run_start(ours, plan.workload.texts)
    assert 10e6 < first <= peak < 2e9


def test_packages_and_their_dependencies_are_counted():
    needed = needed_by("mirror-runtime", "openvino")
    assert {"mirror-runtime", "numpy", "tokenizers", "openvino"} <= needed
    assert not {"torch", "onnxruntime", "pytest"} & needed
    assert 10e6 < installed_bytes({"numpy"}) < our_bytes(EngineName.OPENVINO)
    assert our_bytes(EngineName.FAKE) == 0
