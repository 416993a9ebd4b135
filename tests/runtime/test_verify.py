"""`verify` distinguishes agreement, drift, corruption and another model."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import Encoder, verify
from mirror_runtime import bundle as contract
from mirror_runtime.canaries import CanaryVerdict, compare_canaries
from mirror_runtime.cli.main import main
from mirror_runtime.errors import BundleError

CANARIES = tuple(contract.Canary(text=str(i), vector=tuple(float(i == j) for j in range(4))) for i in range(4))


STORED = np.array([canary.vector for canary in CANARIES], np.float32)


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def rewrite(bundle: Path, **changes) -> None:
    """Change the manifest, with the hashes of the present files."""
    manifest = contract.read_manifest(bundle)
    files = {name: contract.sha256_file(bundle / name) for name in manifest.files}
    contract.write_json(dataclasses.replace(manifest, **{"files": files, **changes}), bundle / contract.MANIFEST_FILE)


def turned(vector: tuple[float, ...], cosine: float) -> tuple[float, ...]:
    """Turn a vector by a known angle, keeping its length."""
    v = np.array(vector)
    other = np.roll(v, 1) - v * (np.roll(v, 1) @ v) / (v @ v)
    other *= np.linalg.norm(v) / np.linalg.norm(other)
    return tuple(cosine * v + np.sqrt(1 - cosine**2) * other)


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda v: v, CanaryVerdict.AGREES),
        (lambda v: v + 0.1 * np.roll(v, 1, axis=1), CanaryVerdict.DRIFTED),
        (lambda v: v * 2, CanaryVerdict.DRIFTED),
        (lambda v: v[::-1], CanaryVerdict.ANOTHER_MODEL),
        (lambda v: v * np.float32("nan"), CanaryVerdict.BROKEN),
        (lambda v: v[:, :3], CanaryVerdict.BROKEN),
    ],
    ids=["same", "turned", "longer", "others", "nan", "cut"],
)
def test_what_the_canaries_say(change, verdict):
    compared = compare_canaries(change(STORED), CANARIES, 0.9999)
    assert compared.verdict is verdict
    assert bool(compared.problem) == (verdict is not CanaryVerdict.AGREES)


@pytest.mark.parametrize(("found", "verdict"), [(0.0, CanaryVerdict.AGREES), (1.0, CanaryVerdict.ANOTHER_MODEL)])
def test_a_static_encoders_text_without_tokens_stays_zeros(found, verdict):
    canaries = (*CANARIES, contract.Canary(text="", vector=(0.0,) * 4))
    vectors = np.concatenate([STORED, np.full((1, 4), found, np.float32)])
    assert compare_canaries(vectors, canaries, 0.9999).verdict is verdict


def test_a_good_bundle_agrees_but_not_without_its_engine(tiny_bundle, monkeypatch, capsys):
    assert main(["verify", str(tiny_bundle)]) == 0
    said = report(capsys)
    assert {entry["verdict"] for entry in said["artifacts"]} == {"agrees"}
    with Encoder.load(tiny_bundle, engine="fake") as encoder:
        assert encoder.fingerprint == said["fingerprint"] == contract.read_manifest(tiny_bundle).fingerprint
    assert main(["verify", str(tiny_bundle), "--fingerprint", said["fingerprint"]]) == 0
    report(capsys)
    monkeypatch.setattr(verify, "installed", lambda name: name is contract.EngineName.FAKE)
    assert main(["verify", str(tiny_bundle)]) == 1
    said = report(capsys)
    assert said["ran"] == said["failed"] == 0
    assert said["not_run"] == len(said["artifacts"]) > 0


@pytest.mark.parametrize(("cosine", "verdict"), [(0.99, "drifted"), (0.3, "another model")])
def test_vectors_computed_otherwise_are_drift_unless_no_rounding_explains_them(copy, capsys, cosine, verdict):
    canaries = tuple(
        contract.Canary(text=c.text, vector=turned(c.vector, cosine)) for c in contract.read_canaries(copy)
    )
    contract.write_json(contract.Canaries(canaries=canaries), copy / contract.CANARIES_FILE)
    rewrite(copy)
    assert main(["verify", str(copy)]) == 1
    said = report(capsys)
    assert said["failed"] == said["ran"] > 0
    assert {entry["verdict"] for entry in said["artifacts"]} == {verdict}
    assert said["artifacts"][0]["min_cosine"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize("name", ["model.safetensors", "onnx/model_packed.onnx", "tokenizer.json"])
def test_a_changed_byte_is_corruption(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"corrupted: {name} differ"):
        verify.verify(copy)


def test_whole_files_of_another_vector_space_are_another_model(copy, capsys):
    spec = dataclasses.replace(contract.read_manifest(copy).encoder, pooling=contract.Pooling.CLS)
    rewrite(copy, encoder=spec)
    with pytest.raises(BundleError, match="the bundle contains another model"):
        verify.verify(copy)
    rewrite(copy, fingerprint=contract.fingerprint(spec, contract.read_manifest(copy).files))
    expected = "0" * 16
    assert main(["verify", str(copy), "--fingerprint", expected]) == 2
    assert f"not {expected}" in capsys.readouterr().err
