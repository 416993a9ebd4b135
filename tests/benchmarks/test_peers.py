import dataclasses
import hashlib
import io
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from benchmarks import peer_specs, peer_suite, single_texts, startup
from benchmarks.evalsets import EvaluationSet
from benchmarks.footprint import environment_bytes, needed_by, our_bytes
from benchmarks.latency import FULL_SAMPLES
from benchmarks.peer_specs import PeerPoint, PeerSpec
from benchmarks.peer_suite import prepare_peers, run_peers
from benchmarks.peers.installed import installed_bytes
from benchmarks.peers.worker import PeerWorker
from benchmarks.quality import Judge
from benchmarks.run import _chosen_peers
from benchmarks.session import Plan, Results, loaded, select_points
from benchmarks.startup import Starter, our_starters, run_start
from benchmarks.workload import bundle_tokenizer, load_workload
from mirror_runtime import Encoder
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision, read_manifest
from mirror_runtime.environments import INCOMPLETE, STAMP, make_environment
from mirror_runtime.errors import EngineError, PeerError

# Speaks the protocol without a library: bigger batches are faster, but for 128; its vectors come from a file.
FAKE_PEER = """
import json, os, shutil, sys, pathlib
here = pathlib.Path(__file__).parent
for line in sys.stdin:
    request = json.loads(line)
    with (here / "calls").open("a") as log:
        log.write(request["op"] + " " + str(request.get("batch_size", "")) + "\\n")
    if request["op"] == "export":
        folder = pathlib.Path(request["output"], "openvino")
        folder.mkdir(parents=True)
        (folder / "openvino_model.xml").write_text("")
        answer = {"seconds": 1.0}
    elif request["op"] == "load":
        if request["backend"] == "onnx":
            answer = {"error": "OSError: no such backend here"}
        else:
            n = len(json.load(open(request["texts"])))
            answer = {"load_seconds": 2.0, "versions": {"fake": "1"}, "precision": "float32", "threads": None}
    elif request["op"] == "encode":
        size = request["batch_size"]
        answer = {"seconds": 10.0 if size == 128 else 64.0 / size, "texts": request["limit"] or n}
    elif request["op"] == "dump":
        count = len(json.load(open(request["texts"])))
        shutil.copy(here / ("vectors.npy" if count == n else "judged.npy"), request["output"])
        answer = {"texts": count}
    elif request["op"] == "single":
        assert len(json.load(open(request["texts"]))) == 16
        answer = {"samples_ms": [4.0, 6.0]}
    elif request["op"] == "die":
        sys.stderr.write("out of luck\\n")
        sys.exit(3)
    elif request["op"] == "babble":
        answer = None
    sys.stdout.write((json.dumps(answer) if answer else "not json") + "\\n")
    sys.stdout.flush()
"""

SPEC = PeerSpec(
    name="fake",
    title="fake",
    backends=dict.fromkeys(("torch", "onnx", "openvino"), "fake"),
    exports={"openvino": "openvino/openvino_model.xml"},
)


PAIRS = EvaluationSet(
    name="pairs", group="sts", sha256="0" * 64, first=("a", "b", "c"), second=("d", "e", "f"), scores=(1.0, 2.0, 3.0)
)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "fake_peer.py").write_text(FAKE_PEER)
    monkeypatch.setattr(peer_suite, "FOLDER", folder)
    monkeypatch.setattr(peer_specs, "FOLDER", folder)
    monkeypatch.setattr(peer_suite, "PEERS", (SPEC,))
    monkeypatch.setattr(peer_suite, "SETTLE_S", 0.0)
    monkeypatch.setattr(single_texts, "SETTLE_S", 0.0)
    return folder / "fake_peer.py"


@pytest.fixture
def worker(script, tmp_path):
    with PeerWorker((sys.executable, str(script)), tmp_path / "log") as worker:
        yield worker


@pytest.fixture
def plan(make_bundle, make_artifact, tmp_path) -> Plan:
    bundle = make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))
    manifest = read_manifest(bundle)
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\nand another one\nthe third\n", encoding="utf-8")
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    return Plan(
        bundle=bundle,
        manifest=manifest,
        points=select_points(manifest, (), ()),
        workload=load_workload(texts, tokenizer, quick=False, seed=0),
        suites=(),
        peers=("fake",),
        sets=(),
        training=None,
        quick=False,
        rounds=2,
        seed=0,
        flop_per_token=None,
    )


@pytest.fixture
def progress() -> Progress:
    return Progress(TextColumn(""), console=Console(file=io.StringIO()))


def test_answers_come_in_turn(worker):
    assert worker.ask("encode", batch_size=32, limit=5) == {"seconds": 2.0, "texts": 5}
    assert worker.ask("encode", batch_size=64, limit=7) == {"seconds": 1.0, "texts": 7}


def test_an_error_is_raised_and_the_peer_goes_on(worker):
    with pytest.raises(PeerError, match="load: OSError: no such backend here"):
        worker.ask("load", backend="onnx", texts="")
    assert worker.ask("encode", batch_size=32, limit=5)["seconds"] == 2.0


def test_a_dead_peer_is_reported_with_its_last_words(worker):
    with pytest.raises(PeerError, match="ended with status 3: out of luck"):
        worker.ask("die")
    with pytest.raises(PeerError, match="ended with status 3"):
        worker.ask("encode", batch_size=1, limit=1)


def test_an_answer_that_is_no_json_is_refused(worker):
    with pytest.raises(PeerError, match="not JSON"):
        worker.ask("babble")


def test_the_real_worker_keeps_standard_output_clean_and_names_errors(tmp_path):
    script = Path(peer_suite.__file__).parent / "peers" / "sentence_transformers_peer.py"
    with PeerWorker((sys.executable, "-I", str(script)), tmp_path / "log") as worker:
        with pytest.raises(PeerError, match="FileNotFoundError"):
            worker.ask("load", model="absent", backend="torch", texts=str(tmp_path / "absent.json"))
        with pytest.raises(PeerError, match="nothing is loaded"):
            worker.ask("encode", batch_size=1, limit=None)


def test_the_suite_sweeps_takes_turns_compares_and_names_what_failed(plan, script, progress, tmp_path):
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    results = Results()
    judge = Judge([PAIRS], seed=0)
    before = sorted(plan.bundle.rglob("*"))
    points = prepare_peers(plan, {"fake": environment}, tmp_path / "unused", tmp_path, results, progress)
    assert [(point.backend, point.model == plan.bundle.resolve()) for point in points] == [
        ("torch", True),
        ("onnx", True),
        ("openvino", False),  # was exported into a copy
    ]
    assert sorted(plan.bundle.rglob("*")) == before
    with Encoder.load(plan.bundle, engine="fake") as encoder:
        vectors = encoder.encode(plan.workload.texts)
    vectors[2] = -vectors[2]
    np.save(script.parent / "vectors.npy", vectors)
    np.save(script.parent / "judged.npy", np.random.default_rng(0).standard_normal((6, 8), np.float32))
    with loaded(plan, results) as runners:
        run_peers(plan, runners, points, judge, results, progress)

    assert [(failure.party, failure.reason) for failure in results.failures] == [
        ("fake onnx", "load: OSError: no such backend here")
    ]
    torch = results.peers["fake torch"]
    assert [tried.batch_size for tried in torch.sweep] == [8, 16, 32, 64, 128]
    assert (torch.batch_size, torch.samples_s, torch.texts_per_s) == (64, (1.0, 1.0), 3.0)
    assert len(results.ours_beside_peers["fake fp32"].samples_s) == plan.rounds
    comparison = results.comparisons["fake fp32", "fake openvino"]
    ours = results.ours_beside_peers["fake fp32"].samples_s
    assert comparison.ratio == pytest.approx(1.0 / np.median(ours))
    assert comparison.min_cosine == pytest.approx(-1.0)
    assert comparison.mean_cosine == pytest.approx(1 / 3)
    worth = results.quality["fake torch"]
    assert (worth.ours, worth.baseline, worth.scores[0].cosines) == (False, None, ())
    assert torch.version == "1"
    alone = results.single_texts
    assert [(name, one.ours) for name, one in alone.items()] == [
        ("fake fp32", True),
        ("fake torch", False),
        ("fake openvino", False),
    ]
    assert (alone["fake torch"].samples_ms, alone["fake torch"].p50_ms) == ((4.0, 6.0) * plan.rounds, 5.0)
    assert len(alone["fake fp32"].samples_ms) == FULL_SAMPLES
    assert results.has("peers")


def test_vectors_of_another_shape_are_no_comparison(plan, script, progress, tmp_path):
    np.save(script.parent / "vectors.npy", np.zeros((2, 8), np.float32))
    point = PeerPoint(spec=SPEC, backend="torch", python=Path(sys.executable), model=plan.bundle)
    results = Results()
    with loaded(plan, results) as runners:
        run_peers(plan, runners, [point], None, results, progress)
    assert "shape (2, 8) where (3, 8)" in results.failures[0].reason
    assert not results.peers
    assert results.ours_beside_peers


def test_an_environment_that_is_none_is_a_failure_of_that_peer(plan, script, progress, tmp_path):
    results = Results()
    assert prepare_peers(plan, {"fake": tmp_path / "absent"}, tmp_path, tmp_path, results, progress) == []
    assert "no virtual environment" in results.failures[0].reason


def test_an_environment_is_made_once_and_anew_when_requirements_change(tmp_path, monkeypatch):
    requirements, folder = tmp_path / "r.txt", tmp_path / "env"
    said: list[str] = []
    requirements.write_text("# nothing\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = make_environment(requirements, folder, said.append)
    assert python.is_file()
    digest = hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()
    assert (folder / STAMP).read_text() == digest
    said.clear()
    assert make_environment(requirements, folder, said.append) == python
    assert said == []
    requirements.write_text("a-package-that-no-index-has==1\n")
    with pytest.raises(PeerError, match="a-package-that-no-index-has"):
        make_environment(requirements, folder, said.append)
    assert (folder / STAMP).read_text() == INCOMPLETE


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    requirements = tmp_path / "r.txt"
    requirements.write_text("")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "thesis.txt").write_text("")
    with pytest.raises(PeerError, match="not made by this program"):
        make_environment(requirements, tmp_path / "env", lambda line: None)
    assert (tmp_path / "env" / "thesis.txt").exists()


def starter(code: str) -> Starter:
    return Starter(party="x", min_cosine=None, command=(sys.executable, "-S", "-c", code), installed_bytes=1)


def test_a_start_is_timed_to_its_first_vector_and_tells_its_memory(tmp_path):
    code = (
        "import sys, time; time.sleep(0.2); print('x'); print('ready 1000', flush=True); time.sleep(0.6); "
        "print('done', len(open(sys.argv[1]).read()))"
    )
    (tmp_path / "texts.json").write_text("seven..")
    start = run_start(starter(code), tmp_path / "texts.json")
    assert 0.2 <= start.seconds < 0.8
    assert (start.first_vector_bytes, start.peak_bytes) == (1000, 7)


@pytest.mark.parametrize(("said", "missing"), [("", "its first vector"), ("print('ready 1'); ", "those of the texts")])
def test_a_start_without_a_vector_is_an_error(tmp_path, said, missing):
    with pytest.raises(EngineError, match=f"status 1 before {missing}: no luck"):
        run_start(starter(said + "raise SystemExit('no luck')"), tmp_path / "absent")


def test_a_start_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "END_S", 0.1)
    monkeypatch.setattr(startup, "LONGEST_S", 1.0)
    (tmp_path / "texts.json").write_text("")
    done = run_start(
        starter("import time; print('ready 1\\ndone 2', flush=True); time.sleep(60)"), tmp_path / "texts.json"
    )
    assert done.peak_bytes == 2
    with pytest.raises(EngineError, match="status -9 before those of the texts"):
        run_start(starter("import time; print('ready 1', flush=True); time.sleep(60)"), tmp_path / "texts.json")


def test_our_own_start_gives_vectors_and_tells_its_memory(plan, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(plan.workload.texts))
    (ours,) = our_starters(plan)
    start = run_start(ours, file)
    assert 10e6 < start.first_vector_bytes <= start.peak_bytes < 2e9


def test_packages_and_all_that_they_need_are_counted():
    needed = needed_by("mirror-runtime", "openvino")
    assert {"mirror-runtime", "numpy", "tokenizers", "openvino"} <= needed
    assert not {"torch", "onnxruntime", "pytest"} & needed
    assert 10e6 < installed_bytes({"numpy"}) < installed_bytes({"numpy", "openvino"}) <= our_bytes(EngineName.OPENVINO)
    assert environment_bytes(Path(sys.executable)) > our_bytes(EngineName.OPENVINO)


def test_a_peer_is_chosen_in_any_case():
    assert _chosen_peers(["ctranslate2", "Plain-Loop"], quick=False) == ("CTranslate2", "plain-loop")


def test_only_the_chosen_peers_are_prepared(plan, script, progress, tmp_path):
    results = Results()
    nobody = dataclasses.replace(plan, peers=())
    assert prepare_peers(nobody, {"fake": tmp_path / "absent"}, tmp_path, tmp_path, results, progress) == []
    assert not results.failures


def test_every_peer_has_its_files():
    folder = Path(peer_suite.__file__).parent / "peers"
    for spec in peer_specs.PEERS:
        assert set(spec.exports) <= set(spec.backends)
        assert (folder / f"{spec.name}_peer.py").is_file()
        pinned = [line for line in (folder / f"{spec.name}.txt").read_text().splitlines() if line[:1] not in ("", "#")]
        assert all("==" in line for line in pinned if line != "numpy")
