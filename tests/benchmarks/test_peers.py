"""Suite `peers` and the line-JSON protocol, with a peer that speaks it without a library."""

import dataclasses
import hashlib
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import environments, specs
from benchmarks.peers.environments import INCOMPLETE, STAMP, make_environment, parse_environments
from benchmarks.peers.libraries import EXPORTS, LIBRARIES, engine_loops
from benchmarks.peers.specs import FOLDER, PeerSpec, worker_command
from benchmarks.plan import Environments, Plan, Suite
from benchmarks.recorder import Recorder
from benchmarks.run import _chosen_peers
from benchmarks.suites import peers
from benchmarks.suites.latency import calls_a_round
from benchmarks.suites.peers import prepare_peers, run_peers
from benchmarks.workers import WorkerProcess, run_to_end
from evaluation.sets import EvaluationSet
from mirror_runtime import Encoder
from mirror_runtime.errors import InputError, PeerError
from mirror_runtime.vectors import cosines
from tests.support import fake_peer

SPEC = PeerSpec(
    name="fake",
    title="fake",
    backends=dict.fromkeys(("torch", "onnx", "openvino"), "fake"),
    exports={"openvino": "openvino/openvino_model.xml"},
)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    script = Path(shutil.copy(fake_peer.__file__, tmp_path / "peer.py"))
    monkeypatch.setattr(specs, "SCRIPT", script)
    monkeypatch.setattr(peers, "PEERS", (SPEC,))
    monkeypatch.setattr(peers, "SETTLE_S", 0.0)
    return script


@pytest.fixture
def worker(script, tmp_path):
    with WorkerProcess((sys.executable, str(script)), tmp_path / "log") as worker:
        yield worker


@pytest.fixture
def peers_plan(plan, tmp_path) -> Plan:
    environment = tmp_path / "env"  # a virtual environment that is this Python
    environment.symlink_to(sys.prefix, target_is_directory=True)
    own = Environments(given={"fake": environment}, folder=tmp_path / "unused")
    return dataclasses.replace(plan, peers=("fake",), environments=own, quick=False)


def test_answers_come_in_turn_after_an_error_and_after_one_that_ctrl_c_left_unread(worker, monkeypatch):
    assert worker.ask("encode", batch_size=32, limit=5) == {"seconds": 2.0, "texts": 5}
    with pytest.raises(PeerError, match="load: OSError: no such backend here"):
        worker.ask("load", backend="onnx", texts=[])
    with monkeypatch.context() as patch:
        patch.setattr(worker._output, "readline", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            worker.ask("encode", batch_size=32, limit=6)
    assert worker.ask("encode", batch_size=64, limit=7) == {"seconds": 1.0, "texts": 7}


@pytest.mark.parametrize(
    ("op", "message"),
    [("die", "ended with status 1: out of luck"), ("babble", "not JSON"), ("sleep", "after 0 seconds")],
)
def test_a_worker_that_ends_babbles_or_takes_too_long_is_an_error(worker, op, message):
    with pytest.raises(PeerError, match=message):
        worker.ask(op, timeout_s=0.3 if op == "sleep" else None)
    if op == "die":
        with pytest.raises(PeerError, match="ended with status 1"):
            worker.ask("encode", batch_size=1, limit=1)


@pytest.mark.process
def test_the_real_worker_names_errors_and_measures_a_library(tiny_bundle, tmp_path):
    texts, output = ["the cat", "a man is playing a guitar", "dog"], tmp_path / "vectors.npy"
    with WorkerProcess(worker_command(Path(sys.executable), "engine_loops"), tmp_path / "log") as worker:
        with pytest.raises(PeerError, match="load: NoSuchFile: "):
            worker.ask("load", model="absent", backend="onnxruntime", texts=texts)
        with pytest.raises(PeerError, match="nothing is loaded"):
            worker.ask("encode", batch_size=1, limit=None)
        answer = worker.ask("load", model=str(tiny_bundle), backend="onnxruntime", texts=texts)
        assert (answer["precision"], answer["load_seconds"] > 0) == ("float32", True)
        assert worker.ask("encode", batch_size=2, limit=None)["seconds"] > 0
        assert len(worker.ask("single", texts=texts, calls=5)["samples_ms"]) == 5
        worker.ask("dump", batch_size=2, output=str(output), texts=texts)
        assert worker.ask("versions")["versions"]["numpy"] == np.__version__
        assert worker.ask("size")["bytes"] > 100e6
        assert worker.peak_bytes() > 10e6
    with Encoder.load(tiny_bundle, engine="onnxruntime") as encoder:
        assert cosines(np.load(output), encoder.encode(texts)).min() > 0.9999


def test_every_engine_loop_restores_the_order_of_the_texts(tiny_bundle):
    texts = [f"{'the cat sat ' * (number % 5)}number {number}" for number in range(11)]
    loops = [engine_loops(str(tiny_bundle), backend, "") for backend in ("onnxruntime", "openvino", "openvino-async")]
    expected = np.concatenate([loops[0].encode([text], 1) for text in texts])
    for loop in loops:
        assert cosines(loop.encode(texts, 4), expected).min() > 0.999


@pytest.mark.process
def test_the_suite_sweeps_takes_turns_compares_and_names_failures(peers_plan, script, progress):
    scores = np.array([1.0, 2.0, 3.0])
    pairs = EvaluationSet(name="pairs", first=tuple("abc"), second=tuple("def"), scores=scores, sha256="0" * 64)
    plan = dataclasses.replace(peers_plan, suites=(Suite.PEERS, Suite.QUALITY, Suite.STARTUP), sets=(pairs,))
    recorder = Recorder()
    before = sorted(plan.bundle.rglob("*"))
    plan = prepare_peers(plan, recorder, progress)
    starters = plan.peer_starters
    assert [(starter.party, starter.model, starter.backend) for starter in starters] == [
        ("fake torch", plan.bundle.resolve(), "torch"),
        ("fake onnx", plan.bundle.resolve(), "onnx"),
        ("fake openvino", plan.scratch / "fake-openvino", "openvino"),  # exported into a copy
    ]
    assert starters[0].installed_bytes == 123
    assert sorted(plan.bundle.rglob("*")) == before
    with Encoder.load(plan.bundle, engine="fake") as encoder:
        vectors = encoder.encode(plan.workload.texts)
    vectors[2] = -vectors[2]
    np.save(script.parent / "vectors.npy", vectors)
    np.save(script.parent / "judged.npy", np.random.default_rng(0).standard_normal((6, 8), np.float32))
    run_peers(plan, recorder, progress)

    assert [(failure.party, failure.reason) for failure in recorder.failures] == [
        ("fake onnx", "load: OSError: no such backend here")
    ]
    found = {(one.metric, one.party, one.conditions.get("batch size")): one for one in recorder.measurements}
    count = len(plan.workload.texts)
    sizes = [size for metric, party, size in found if (metric, party) == ("texts per second, sweep", "fake torch")]
    assert sizes == [8, 16, 32, 64, 128]
    rate = found["texts per second", "fake torch", 64]
    assert rate.samples == (count,) * plan.rounds  # a round takes it a second
    assert (rate.conditions["version"], rate.conditions["computes in"]) == ("1", "float32")
    ours = found["texts per second", "fake fp32", None]
    assert len(ours.samples) == plan.rounds
    ratio = found["our rate over its rate", "fake openvino", None]
    our_seconds = [count / rate for rate in ours.samples]
    assert ratio.median == pytest.approx(1.0 / np.median(our_seconds), rel=0.01)
    assert ratio.figures["low"] <= ratio.median <= ratio.figures["high"]
    assert ratio.conditions == {"ours": "fake fp32"}
    agreement = found["worst cosine to fp32", "fake openvino", None]
    assert agreement.median == pytest.approx(-1.0)
    assert agreement.figures["mean"] == pytest.approx((count - 2) / count)
    assert found["worst cosine to fp32", "fake fp32", None].median == pytest.approx(1.0)
    assert found["time per text", "fake torch", None].samples == (4.0, 6.0) * plan.rounds
    assert found["time per text", "fake fp32", None].total == calls_a_round(plan) * plan.rounds
    assert ("Spearman x 100", "fake torch", None) in found
    assert ("cosine of pairs", "fake torch", None) not in found


@pytest.mark.process
def test_what_fails_of_a_peer_is_named_and_the_others_go_on(peers_plan, script, progress, tmp_path):
    np.save(script.parent / "vectors.npy", np.zeros((2, 8), np.float32))
    recorder, plan = Recorder(), dataclasses.replace(peers_plan, quick=True)
    run_peers(prepare_peers(plan, recorder, progress), recorder, progress)
    shape = f"shape (2, 8) where ({len(plan.workload.texts)}, 8)"
    assert [shape in failure.reason for failure in recorder.failures if failure.party != "fake onnx"] == [True, True]
    rates = [one.party for one in recorder.measurements if one.metric == "texts per second"]
    assert rates == ["fake fp32"]
    absent = Environments(given={"fake": tmp_path / "absent"}, folder=tmp_path)
    recorder, plan = Recorder(), dataclasses.replace(peers_plan, environments=absent)
    assert prepare_peers(plan, recorder, progress) == plan
    assert "not a virtual environment" in recorder.failures[0].reason
    assert not prepare_peers(dataclasses.replace(plan, peers=()), recorder, progress).peer_backends
    assert len(recorder.failures) == 1  # only the chosen peers are prepared


@pytest.mark.process
def test_an_environment_is_made_once_and_anew_and_the_users_own_are_left_alone(tmp_path, monkeypatch):
    requirements, folder, run = tmp_path / "r.txt", tmp_path / "env", run_to_end
    said: list[str] = []
    commands: list[list[str]] = []

    def stand_in(command, name):
        commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            (folder / "bin").mkdir()
            (folder / "bin" / "python").touch()
        elif "missing" in requirements.read_text():
            run(["sh", "-c", "echo first >&2; echo no index has it >&2; exit 3"], name)

    monkeypatch.setattr(environments, "run_to_end", stand_in)
    requirements.write_text("# nothing\n")
    python = make_environment(requirements, folder, said.append)
    assert python.is_file()
    assert [command[2] for command in commands] == ["venv", "pip"]
    digest = hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()
    assert (folder / STAMP).read_text() == digest
    assert make_environment(requirements, folder, said.append) == python
    assert (len(commands), said) == (2, ["making env"])
    requirements.write_text("missing==1\n")
    with pytest.raises(PeerError, match="pip ended with status 3: no index has it"):
        make_environment(requirements, folder, said.append)
    assert said == ["making env"] * 2
    assert (folder / STAMP).read_text() == INCOMPLETE
    (folder / STAMP).rename(folder / "thesis.txt")
    assert make_environment(requirements, folder, said.append) == python  # the user's own
    python.unlink()
    with pytest.raises(PeerError, match="is not a virtual environment"):
        make_environment(requirements, folder, said.append)
    assert (folder / "thesis.txt").exists()


def test_environments_are_parsed_from_pairs():
    assert parse_environments(["a=x/y"], "--env", {"a"}) == {"a": Path("x/y")}
    for pair in ("b=x", "a", "a="):
        with pytest.raises(InputError, match=f"--env '{pair}': write NAME=DIR"):
            parse_environments([pair], "--env", {"a"})


def test_a_peer_is_chosen_in_any_case_and_has_its_function_and_pinned_requirements():
    assert _chosen_peers(["ctranslate2", "Plain-Loop"], quick=False) == ("CTranslate2", "plain-loop")
    for spec in specs.PEERS:
        assert set(spec.exports) <= set(spec.backends)
        assert spec.name in LIBRARIES
        assert bool(spec.exports) == (spec.name in EXPORTS)
        lines = (FOLDER / f"{spec.name}.txt").read_text().splitlines()
        assert all("==" in line for line in lines if line and line != "numpy" and not line.startswith("#"))
