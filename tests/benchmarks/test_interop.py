"""The consumers' matrix, on the libraries that the tests' own environment happens to hold."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import interop
from benchmarks.interop import REQUIREMENTS, Cell, Verdict, main, run_consumers
from benchmarks.peers.libraries import LIBRARIES
from benchmarks.peers.specs import CONSUMERS
from mirror_runtime.bundle import (
    CANARIES_FILE,
    MANIFEST_FILE,
    Canaries,
    Canary,
    Pooling,
    read_canaries,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.errors import BundleError, InputError, PeerError


@pytest.fixture
def environments(tmp_path) -> Path:
    """Environments that are this one: it has sentence-transformers 6 and both engines, but not fastembed."""
    folder = tmp_path / "environments"
    folder.mkdir()
    for name in {consumer.environment for consumer in CONSUMERS}:
        (folder / name).symlink_to(sys.prefix, target_is_directory=True)
    return folder


def run(bundle: Path, environments: Path, *only: str) -> dict[str, Cell]:
    return {cell.consumer: cell for cell in run_consumers(bundle, environments, only, {}, print)}


def test_libraries_read_the_bundle_unchanged_and_compute_the_same_vectors(tiny_bundle, environments):
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")}
    cells = run(tiny_bundle, environments, "onnxruntime", "openvino")
    verdicts = {name: cell.verdict for name, cell in cells.items()}
    assert verdicts == {"onnxruntime": Verdict.AGREES, "openvino": Verdict.AGREES}
    exact = cells["onnxruntime"]
    assert exact.floor == 0.99999
    assert (exact.min_cosine or 0.0) >= 0.99999
    assert exact.versions["onnxruntime"]
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")} == before


@pytest.mark.slow  # imports torch and transformers in a process of its own
def test_sentence_transformers_pools_as_the_bundle_states(tiny_bundle, environments):
    (cell,) = run(tiny_bundle, environments, "sentence-transformers 6").values()
    assert (cell.verdict, cell.file) == (Verdict.AGREES, "model.safetensors")
    assert cell.versions["sentence-transformers"]


def test_a_library_that_is_not_installed_is_a_failure(tiny_bundle, tmp_path, capsys):
    options = ["--env-dir", str(tmp_path), "--env", f"fastembed={sys.prefix}", "--library", "fastembed", "--json"]
    assert main([str(tiny_bundle), *options]) == 1
    (cell,) = json.loads(capsys.readouterr().out.splitlines()[-1])["consumers"]
    assert (cell["consumer"], cell["verdict"]) == ("fastembed", "failed")
    assert "No module named 'fastembed'" in cell["reason"]


def test_an_environment_that_cannot_be_made_is_reported_once(tiny_bundle, tmp_path, monkeypatch):
    made = []

    def fail(requirements, folder, on_progress):
        made.append((requirements, folder))
        raise PeerError("the environment cannot be made (status 1): no network")

    monkeypatch.setattr("benchmarks.peers.environments.make_environment", fail)
    cells = run(tiny_bundle, tmp_path / "none", "onnxruntime", "openvino")
    assert {cell.verdict for cell in cells.values()} == {Verdict.NOT_INSTALLED}
    assert all(cell.failed and "no network" in cell.reason for cell in cells.values())
    assert made == [(REQUIREMENTS / "fastembed.txt", tmp_path / "none" / "fastembed")], "tried once"


def test_other_vectors_are_a_difference_and_a_corrupted_bundle_is_refused(tiny_bundle, environments, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    others = tuple(Canary(text=c.text, vector=c.vector[::-1]) for c in read_canaries(copy))
    write_json(Canaries(canaries=others), copy / CANARIES_FILE)
    with pytest.raises(BundleError, match=r"canaries\.json differ"):
        run(copy, environments, "onnxruntime")
    manifest = read_manifest(copy)
    files = {**manifest.files, CANARIES_FILE: sha256_file(copy / CANARIES_FILE)}
    write_json(dataclasses.replace(manifest, files=files), copy / MANIFEST_FILE)
    assert run(copy, environments, "onnxruntime")["onnxruntime"].verdict is Verdict.DIFFERS


def test_what_the_bundle_does_not_offer_is_neither_a_pass_nor_a_failure(tiny_bundle, environments):
    (cell,) = run(tiny_bundle, environments, "sentence-transformers 5, OpenVINO").values()
    assert (cell.verdict, cell.failed) == (Verdict.NOT_OFFERED, False)
    assert "to_openvino.py" in cell.reason


def test_an_unknown_library_is_refused(tiny_bundle, environments):
    with pytest.raises(InputError, match="no library is named keras"):
        run(tiny_bundle, environments, "keras")
    assert main([str(tiny_bundle), "--env", "keras=."]) == 2


def test_every_consumer_has_its_function_and_pinned_requirements():
    for consumer in CONSUMERS:
        assert consumer.library in LIBRARIES
        lines = (REQUIREMENTS / f"{consumer.environment}.txt").read_text(encoding="utf-8").splitlines()
        assert all("==" in line for line in lines if line and line != "numpy" and not line.startswith("#"))


def offered(bundle: Path, **changes) -> set[str]:
    manifest = read_manifest(bundle)
    changed = dataclasses.replace(manifest, encoder=dataclasses.replace(manifest.encoder, **changes))
    return {c.title for c in CONSUMERS if not interop.not_offered(c, changed, bundle)}


def test_heads_that_a_library_lacks_are_not_offered_to_it(tiny_bundle, tmp_path):
    everyone = {consumer.title for consumer in CONSUMERS}
    assert offered(tiny_bundle) == offered(tiny_bundle, template="query: {text}") == everyone
    assert offered(tiny_bundle, pooling=Pooling.MAX) == everyone - {"fastembed"}
    assert offered(tiny_bundle, template="[{text}]") == set()
    bare = shutil.copytree(tiny_bundle, tmp_path / "bare")
    (bare / "modules.json").unlink()
    assert offered(bare) == {"optimum-onnx", "onnxruntime", "openvino"}
