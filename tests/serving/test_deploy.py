"""`mirror deploy`: the serving model is replaced under load, or not at all."""

import asyncio
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
from mirror_runtime.bundle import (
    CANARIES_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Canaries,
    Canary,
    fingerprint,
    read_canaries,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.cli.main import main
from mirror_runtime.errors import MirrorError
from mirror_runtime.triton import AsyncClient, Client, ServingOptions
from mirror_runtime.triton.server.deploy import deploy
from tests.support.mirror_serve import Load, MirrorServe, wait_until

pytestmark = pytest.mark.serving

TEXTS = [f"text number {i} " * (i % 5 + 1) for i in range(40)]


def write_bundle(folder: Path, template: Path, dim: int) -> Path:
    """Write a bundle for the fake engine, with matching fingerprint and canaries."""
    shutil.copytree(template, folder)
    seal(folder, dim=dim)
    with Encoder.load(folder, engine="fake") as encoder:
        canaries = ["", "hello world", "a canary that is too long " * 30]
        vectors = encoder.encode(canaries)
    write_json(
        Canaries(
            canaries=tuple(
                Canary(text=text, vector=tuple(map(float, vector)))
                for text, vector in zip(canaries, vectors, strict=True)
            )
        ),
        folder / CANARIES_FILE,
    )
    seal(folder, dim=dim)
    return folder


def seal(folder: Path, dim: int) -> None:
    """Update a manifest's hashes and fingerprint to its files."""
    manifest = read_manifest(folder)
    spec = dataclasses.replace(manifest.encoder, dim=dim)
    files = {name: sha256_file(folder / name) for name in (TOKENIZER_FILE, CANARIES_FILE) if (folder / name).exists()}
    sealed = dataclasses.replace(manifest, encoder=spec, files=files, fingerprint=fingerprint(spec, files))
    write_json(sealed, folder / MANIFEST_FILE)


@pytest.fixture(scope="module")
def old(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("old") / "bundle", fake_bundle, 16)


@pytest.fixture(scope="module")
def new(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("new") / "bundle", fake_bundle, 24)


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, except those of running servers and deployments."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith(".mirror-")}


def corrupt_a_file(bundle: Path) -> None:
    with (bundle / TOKENIZER_FILE).open("a") as file:
        file.write(" ")


def lose_its_canaries(bundle: Path) -> None:
    write_json(Canaries(canaries=()), bundle / CANARIES_FILE)
    seal(bundle, dim=24)


def store_other_vectors(bundle: Path) -> None:
    """Make the bundle consistent, but with stored vectors that its model does not return."""
    canaries = read_canaries(bundle)
    wrong = dataclasses.replace(canaries[1], vector=canaries[0].vector)
    write_json(Canaries(canaries=(canaries[0], wrong, canaries[2])), bundle / CANARIES_FILE)
    seal(bundle, dim=24)


def break_the_tokenizer(bundle: Path) -> None:
    (bundle / TOKENIZER_FILE).write_text("{}")
    seal(bundle, dim=24)


@pytest.mark.slow
def test_a_model_is_replaced_under_load(old: Path, new: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    first = deploy(old, repository, ServingOptions(engine="fake", max_batch_size=64))
    assert (first.version, first.previous, first.switched) == (1, None, False)
    expected = {}
    for bundle in (old, new):
        with Encoder.load(bundle, engine="fake") as encoder:
            expected[encoder.fingerprint] = encoder.encode(TEXTS)

    with MirrorServe(repository) as served:
        clients = [Client(served.grpc), Client(served.grpc), Client(served.http, protocol="http")]
        callers: list[Callable[[], object]] = [
            *(lambda client=client: client.encode_detailed(TEXTS[:8], 4) for client in clients[:2]),
            lambda: clients[2].encode_detailed(TEXTS, 5),
        ]
        with Load(callers) as load:
            wait_until(lambda: len(load.outcomes) > 10)
            command = [sys.executable, "-m", "mirror_runtime.cli", "deploy", str(new), "--to", str(repository)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            count = len(load.outcomes)
            wait_until(lambda: len(load.outcomes) > count + 10)
        second = json.loads(done.stdout)
        assert second["switched"] is True
        assert (second["version"], second["previous"]) == (2, first.fingerprint)
        assert not load.failures()
        for outcome in load.outcomes:
            result = outcome.result
            np.testing.assert_array_equal(
                result.vectors,  # type: ignore[attr-defined]
                expected[result.fingerprint][: len(result.vectors)],  # type: ignore[attr-defined]
            )
        labels = [o.result.fingerprint for o in sorted(load.outcomes, key=lambda o: o.ended)]  # type: ignore[attr-defined]
        assert labels[0] == first.fingerprint
        assert labels[-1] == second["fingerprint"]

        # Back to the kept version, with the options of the first deployment.
        assert sorted(entry.name for entry in (repository / "embed").iterdir()) == ["1", "2", "config.pbtxt", "warmup"]
        third = deploy(repository / "embed" / "1" / "bundle", repository)
        assert third.fingerprint == first.fingerprint
        assert sorted(entry.name for entry in (repository / "embed").glob("[0-9]*")) == ["2", "3"]
        assert clients[0].encode(TEXTS).shape == (40, 16)
        assert "max_batch_size: 64" in (repository / "embed" / "config.pbtxt").read_text()
        for client in clients:
            client.close()
        assert served.terminate() == 0
        assert "restarting" not in served.output, "the watchdog distinguishes a replaced model from a dead one"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no scratch folder remains"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt_a_file, "is corrupted: tokenizer.json differ from the manifest"),
        (lose_its_canaries, "has no canaries to prove it with"),
        (store_other_vectors, "the server's vectors differ from those in the bundle"),
        (break_the_tokenizer, "embed_candidate cannot be loaded"),
    ],
)
def test_an_invalid_bundle_is_rejected_and_the_old_one_continues_to_serve(
    old_server: MirrorServe, new: Path, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    repository = old_server.source
    bad = tmp_path / "bad"
    shutil.copytree(new, bad)
    harm(bad)
    before = tree(repository)
    with Client(old_server.grpc) as client, Load([lambda: client.encode(TEXTS[:4])]) as load:
        wait_until(lambda: load.outcomes)
        with pytest.raises(MirrorError, match=message):
            deploy(bad, repository)
        count = len(load.outcomes)
        wait_until(lambda: len(load.outcomes) > count + 5)
    assert not load.failures()
    assert all(o.result.shape == (4, 16) for o in load.outcomes)  # type: ignore[attr-defined]
    assert tree(repository) == before
    assert "restarting" not in old_server.output


@pytest.fixture(scope="module")
def old_server(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MirrorServe]:
    repository = tmp_path_factory.mktemp("served") / "models"
    deploy(old, repository, ServingOptions(engine="fake"))
    with MirrorServe(repository) as served:
        yield served
        assert served.terminate() == 0
        assert not served.shared_memory()


def test_the_commands_end_with_a_message_and_status_2(
    old_server: MirrorServe, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(new, tmp_path / "bad")
    store_other_vectors(tmp_path / "bad")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["deploy", str(tmp_path / "bad"), "--to", str(old_server.source)]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
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


def test_a_call_never_mixes_two_models(old_server: MirrorServe, old: Path, new: Path) -> None:
    async def run() -> None:
        async with AsyncClient(old_server.grpc) as client:
            texts = TEXTS * 10
            results = [await client.encode_detailed(texts, 1)]
            ended = asyncio.ensure_future(asyncio.to_thread(deploy, new, old_server.source))
            while not ended.done():
                results.append(await client.encode_detailed(texts, 1))
            results.append(await client.encode_detailed(texts, 1))
            assert (await ended).switched
        assert {result.fingerprint for result in results} == set(expected)
        for result in results:
            np.testing.assert_array_equal(result.vectors, np.tile(expected[result.fingerprint or ""], (10, 1)))

    expected = {}
    for bundle in (old, new):
        with Encoder.load(bundle, engine="fake") as encoder:
            expected[encoder.fingerprint] = encoder.encode(TEXTS)
    asyncio.run(run())
