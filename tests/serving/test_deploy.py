"""`mirror deploy`: the serving model is replaced under load, or not at all."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from mirror_runtime import Encoder
from mirror_runtime import bundle as contract
from mirror_runtime.cli.main import main
from mirror_runtime.errors import MirrorError
from mirror_runtime.triton import Client, Served, ServingOptions
from mirror_runtime.triton.server.deploy import deploy
from mirror_runtime.triton.server.deploy_lock import CANDIDATE_NAME
from mirror_runtime.triton.server.processes import runners
from tests.support.mirror_serve import Load, MirrorServe, wait_until

pytestmark = pytest.mark.serving

TEXTS = [f"text number {i} " * (i % 5 + 1) for i in range(40)]


def write_bundle(folder: Path, template: Path, dim: int) -> Path:
    """Write a bundle for the fake engine, with matching contract.fingerprint and canaries."""
    shutil.copytree(template, folder)
    seal(folder, dim)
    texts = ["", "hello world", "a canary that is too long " * 30]
    with Encoder.load(folder, engine="fake") as encoder:
        vectors = encoder.encode(texts).tolist()
    seal(
        folder,
        dim,
        *(contract.Canary(text=text, vector=tuple(vector)) for text, vector in zip(texts, vectors, strict=True)),
    )
    return folder


def seal(folder: Path, dim: int, *canaries: contract.Canary) -> None:
    """Store canaries, and update a manifest's hashes and contract.fingerprint to its files."""
    contract.write_json(contract.Canaries(canaries=canaries), folder / contract.CANARIES_FILE)
    manifest = contract.read_manifest(folder)
    spec = dataclasses.replace(manifest.encoder, dim=dim)
    files = {name: contract.sha256_file(folder / name) for name in (contract.TOKENIZER_FILE, contract.CANARIES_FILE)}
    sealed = dataclasses.replace(manifest, encoder=spec, files=files, fingerprint=contract.fingerprint(spec, files))
    contract.write_json(sealed, folder / contract.MANIFEST_FILE)


@pytest.fixture(scope="module")
def old(fake_bundle, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("old") / "bundle", fake_bundle, 16)


@pytest.fixture(scope="module")
def new(fake_bundle, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("new") / "bundle", fake_bundle, 24)


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, except those of running servers and deployments."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith(".mirror-")}


def corrupt_a_file(bundle: Path) -> None:
    with (bundle / contract.TOKENIZER_FILE).open("a") as file:
        file.write(" ")


def lose_its_canaries(bundle: Path) -> None:
    seal(bundle, 24)


def store_other_vectors(bundle: Path) -> None:
    """Make the bundle consistent, but with stored vectors that its model does not return."""
    first, second, third = contract.read_canaries(bundle)
    seal(bundle, 24, first, dataclasses.replace(second, vector=first.vector), third)


def break_the_tokenizer(bundle: Path) -> None:
    (bundle / contract.TOKENIZER_FILE).write_text("{}")
    seal(bundle, 24, *contract.read_canaries(bundle))


@pytest.fixture(scope="module")
def old_server(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MirrorServe]:
    repository = tmp_path_factory.mktemp("served") / "models"
    first = deploy(old, repository, ServingOptions(engine="fake", max_batch_size=64))
    assert (first.version, first.previous, first.switched) == (1, None, False)
    with MirrorServe(repository) as served:
        yield served
        assert served.terminate() == 0
        assert "restarting" not in served.output, "the watchdog distinguishes a replaced model from a dead one"
        assert not served.shared_memory()
    assert [path.name for path in repository.parent.iterdir()] == ["models"], "no scratch folder remains"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt_a_file, "is corrupted: tokenizer.json differ from the manifest"),
        (lose_its_canaries, "has no canaries to prove it with"),
        (store_other_vectors, "the server's vectors differ from those in the bundle"),
        (break_the_tokenizer, "embed_candidate cannot be loaded"),
    ],
)
def test_an_invalid_bundle_is_rejected_and_the_old_one_continues_to_serve(old_server, new, tmp_path, harm, message):
    repository = old_server.source
    bad = shutil.copytree(new, tmp_path / "bad")
    harm(bad)
    before = tree(repository)
    with Client(old_server.grpc) as client, Load([lambda: client.encode(TEXTS[:4])], pause_s=0.02) as load:
        wait_until(lambda: load.outcomes)
        with pytest.raises(MirrorError, match=message):
            deploy(bad, repository)
        count = len(load.outcomes)
        wait_until(lambda: len(load.outcomes) > count + 5)
    assert not load.failures()
    assert all(o.result.shape == (4, 16) for o in load.outcomes)  # type: ignore[attr-defined]
    assert tree(repository) == before


def test_the_commands_end_with_a_message_and_status_2(old_server, new, tmp_path, capsys, monkeypatch):
    store_other_vectors(shutil.copytree(new, tmp_path / "bad"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command's handler would outlive it
    assert main(["deploy", str(tmp_path / "bad"), "--to", str(old_server.source)]) == 2
    written, progress = capsys.readouterr()
    assert written == ""
    assert "proving it beside the model that serves" in progress
    assert "error: the server's vectors differ from those in the bundle" in progress
    assert "Traceback" not in progress
    assert main(["serve", str(old_server.source)]) == 2
    assert "another mirror serve runs on" in capsys.readouterr().err


def test_models_are_controlled_only_with_the_key(old_server: MirrorServe) -> None:
    client = tritonclient.grpc.InferenceServerClient(old_server.grpc)
    for forbidden in (lambda: client.unload_model("embed"), lambda: client.load_model("embed")):
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="protocol is restricted"):
            forbidden()
    client.close()
    assert (old_server.source / ".mirror-serve.json").stat().st_mode & 0o077 == 0


def test_a_deployment_that_is_killed_disturbs_nobody_and_the_next_one_clears_what_it_left(old_server, old, new):
    repository = old_server.source
    command = [sys.executable, "-m", "mirror_runtime.cli", "deploy", str(new), "--to", str(repository)]
    with Client(old_server.grpc) as client, Load([lambda: client.encode_detailed(TEXTS[:4])], 0.02) as load:
        for stage in ("writing", "proving", "switching"):
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as deployer:
                assert deployer.stderr is not None
                assert any(stage in line for line in deployer.stderr)
                if stage == "proving":
                    wait_until((repository / CANDIDATE_NAME).exists)
                deployer.kill()
            assert len(list(repository.parent.iterdir())) == 2, "else this test proves nothing"
        assert deploy(old, repository).switched
        assert not (repository / CANDIDATE_NAME).exists()
        assert not runners(old_server.tritonserver, CANDIDATE_NAME)
        assert client.encode(TEXTS[:1]).shape == (1, 16)
    assert not load.failures()
    assert [path.name for path in repository.parent.iterdir()] == ["models"]
    assert "restarting" not in old_server.output


@pytest.mark.slow  # a deployment starts Python twice and loads the model twice
def test_a_model_is_replaced_under_load(old_server: MirrorServe, old: Path, new: Path) -> None:
    repository = old_server.source
    expected, fingerprints = {}, []
    for bundle in (old, new):
        with Encoder.load(bundle, engine="fake") as encoder:
            expected[encoder.fingerprint] = encoder.encode(TEXTS)
            fingerprints.append(encoder.fingerprint)
    clients = [Client(old_server.grpc), Client(old_server.http, protocol="http"), Client(old_server.grpc)]
    callers: list[Callable[[], Served]] = [
        lambda: clients[0].encode_detailed(TEXTS[:8], 4),
        lambda: clients[1].encode_detailed(TEXTS, 5),
        lambda: clients[2].encode_detailed(TEXTS * 10, 1),  # spans the switch, and must not mix both models
    ]
    with Load(callers, pause_s=0.1) as load:
        wait_until(lambda: len(load.outcomes) > 10)
        command = [sys.executable, "-m", "mirror_runtime.cli", "deploy", str(new), "--to", str(repository)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        count = len(load.outcomes)
        wait_until(lambda: len(load.outcomes) > count + 10)
    report = json.loads(done.stdout)
    assert report["switched"] is True
    assert (report["previous"], report["fingerprint"]) == (fingerprints[0], fingerprints[1])
    assert not load.failures()
    results = [outcome.result for outcome in sorted(load.outcomes, key=lambda outcome: outcome.ended)]
    for result in results:
        assert isinstance(result, Served)
        vectors = expected[result.fingerprint or ""]
        np.testing.assert_array_equal(result.vectors, np.resize(vectors, (len(result.vectors), vectors.shape[1])))
    assert [results[0].fingerprint, results[-1].fingerprint] == fingerprints  # type: ignore[attr-defined]

    version = report["version"]
    kept = [str(version - 1), str(version)]
    # Back to the kept version, with the options of the first deployment.
    assert sorted(entry.name for entry in (repository / "embed").iterdir()) == [*kept, "config.pbtxt", "warmup"]
    assert deploy(repository / "embed" / kept[0] / "bundle", repository).fingerprint == fingerprints[0]
    assert sorted(int(entry.name) for entry in (repository / "embed").glob("[0-9]*")) == [version, version + 1]
    assert clients[0].encode(TEXTS).shape == (40, 16)
    assert "max_batch_size: 64" in (repository / "embed" / "config.pbtxt").read_text()
    for client in clients:
        client.close()
