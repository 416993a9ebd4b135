"""Two-speed bundles: the twin answers where it is asked for, and another encoder's is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.pair import main
from mirror_runtime import Encoder
from mirror_runtime.bundle import (
    CANARIES_FILE,
    MANIFEST_FILE,
    EngineName,
    Precision,
    check_files,
    fingerprint,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.errors import BundleError, EngineError, InputError
from mirror_runtime.triton.model.request_options import parse_options
from tests.support.fake_bundles import FINGERPRINT, artifact
from tests.support.gateways import running

TWIN = "fedcba9876543210"


def change(bundle: Path, *, fingerprint: str = TWIN, **encoder: object) -> Path:
    """Change a manifest's fingerprint and fields of its encoder."""
    manifest = read_manifest(bundle)
    changed = dataclasses.replace(manifest.encoder, **encoder)  # type: ignore[arg-type]
    write_json(dataclasses.replace(manifest, encoder=changed, fingerprint=fingerprint), bundle / MANIFEST_FILE)
    return bundle


@pytest.fixture
def pair(make_bundle) -> tuple[Path, Path]:
    """A bundle, and one of its twin."""
    proven = (artifact(EngineName.ONNXRUNTIME, Precision.FP32),)
    return make_bundle(artifacts=proven), change(make_bundle(name="fast", artifacts=proven), twin_of=FINGERPRINT)


def test_a_paired_bundle_answers_at_both_speeds_and_keeps_its_own_fingerprint(pair, monkeypatch):
    bundle, twin = pair
    before = read_manifest(bundle)
    assert main([str(bundle), str(twin)]) == 0
    after = read_manifest(bundle)
    check_files(bundle, after)
    added = {f"twin/{path.name}" for path in twin.iterdir()}
    assert after.files.keys() - before.files.keys() == added
    assert fingerprint(after.encoder, {**after.files, "twin/model.safetensors": "0"}) == fingerprint(
        after.encoder, before.files
    )
    with Encoder.load(bundle, engine="fake") as encoder:
        np.testing.assert_array_equal(encoder.encode(["a"]), encoder.encode(["a"], speed="full"))
        fast = encoder.at("fast")
        assert (encoder.fingerprint, fast.fingerprint) == (FINGERPRINT, TWIN)
        assert encoder.at("full") is encoder
        assert encoder.at("fast") is fast, "it is opened once"
        texts = fast.stats.texts
        encoder.encode(["b"])
        assert fast.stats.texts == texts, "never by itself"
        encoder.encode(["b"], speed="fast")
        assert fast.stats.texts == texts + 1
        with pytest.raises(InputError, match="speed is 'slow': it must be one of full, fast"):
            encoder.encode(["a"], speed="slow")
    with pytest.raises(EngineError, match="closed"):
        fast.encode(["a"])
    with pytest.raises(EngineError, match="closed"):
        encoder.at("fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"twin_of": None}, f"fake ({TWIN}) is not a twin"),
        ({"twin_of": "0" * 16}, f"the twin {TWIN} belongs to the encoder {'0' * 16} and not to fake, {FINGERPRINT}"),
        ({"dim": 4}, "the twin has dim 4, and the encoder 8"),
        ({"normalize": False}, "the twin has normalize False, and the encoder True"),
    ],
)
def test_another_twin_is_refused_when_it_is_added_and_when_it_is_loaded(pair, capsys, changes, message):
    bundle, twin = pair
    before = (bundle / MANIFEST_FILE).read_bytes()
    change(twin, **changes)
    assert main([str(bundle), str(twin)]) == 2
    assert message in capsys.readouterr().err
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert not (bundle / "twin").exists()
    shutil.copytree(twin, bundle / "twin")
    manifest = json.loads(before)
    manifest["files"]["twin/manifest.json"] = sha256_file(bundle / "twin" / MANIFEST_FILE)
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as refused:
        Encoder.load(bundle, engine="fake")
    assert message in str(refused.value)


def test_an_exchanged_twin_is_noticed_and_a_bundle_without_one_is_not_fast(pair):
    bundle, twin = pair
    with Encoder.load(bundle, engine="fake") as encoder, pytest.raises(InputError, match="has no static twin"):
        encoder.encode(["a"], speed="fast")
    assert main([str(bundle), str(twin)]) == 0
    change(bundle / "twin", twin_of=FINGERPRINT, fingerprint="1" * 16)
    with pytest.raises(BundleError, match=f"twin/{MANIFEST_FILE} differ from the manifest"):
        Encoder.load(bundle, engine="fake")
    shutil.copy(twin / MANIFEST_FILE, bundle / "twin")
    (bundle / "twin" / CANARIES_FILE).write_text("{}")
    with pytest.raises(BundleError, match=r"canaries\.json differ"):
        check_files(bundle, read_manifest(bundle))


def test_a_gateway_answers_at_the_requested_speed_and_says_which(pair, monkeypatch):
    bundle, twin = pair
    with running(bundle) as gateway:
        refused = gateway.embed("a", speed="fast")
        assert (refused.status, refused.error["param"]) == (400, "speed")
        assert "no static twin" in refused.error["message"]
        assert gateway.send("GET", "/info").json["speeds"] == {"full": FINGERPRINT}
    assert main([str(bundle), str(twin)]) == 0
    with running(bundle) as gateway:
        fast = gateway.encoder.at("fast")
        run = fast.engine.run
        monkeypatch.setattr(fast.engine, "run", lambda rows: -run(rows))
        for speed, space, sign in ((None, FINGERPRINT, 1), ("full", FINGERPRINT, 1), ("fast", TWIN, -1)):
            reply = gateway.send("POST", "/embed", {"inputs": "a", "speed": speed})
            assert reply.headers["x-vector-space"] == space
            np.testing.assert_allclose(reply.json[0], sign * gateway.encoder.encode(["a"])[0], rtol=1e-6)
        assert gateway.embed("a", speed="fast").headers["x-vector-space"] == TWIN
        assert gateway.embed("a", speed="medium").status == 422
        assert gateway.send("GET", "/info").json["speeds"] == {"full": FINGERPRINT, "fast": TWIN}


def test_triton_refuses_the_twin_by_name(pair):
    spec = read_manifest(pair[0]).encoder
    assert parse_options('{"speed": "full"}', spec).prompt == ""
    with pytest.raises(InputError, match="parameter 'speed' is 'fast': only the full encoder runs here"):
        parse_options('{"speed": "fast"}', spec)
