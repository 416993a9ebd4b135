"""Two-speed bundles: the twin answers where it is asked for, and another encoder's is refused by name."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.pair import main
from mirror_runtime import Encoder
from mirror_runtime.bundle import (
    CANARIES_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Canaries,
    Canary,
    EngineName,
    Precision,
    check_files,
    fingerprint,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.errors import BundleError, EngineError, InputError
from mirror_runtime.twins import twin_setting
from tests.support.fake_bundles import FINGERPRINT, TWIN, artifact, change_bundle
from tests.support.gateways import running


@pytest.fixture
def pair(make_bundle) -> tuple[Path, Path]:
    """A bundle, and one of its twin."""
    proven = (artifact(EngineName.ONNXRUNTIME, Precision.FP32),)
    return make_bundle(artifacts=proven), change_bundle(make_bundle(name="fast", artifacts=proven), twin_of=FINGERPRINT)


def folder_of(twin: Path) -> str:
    """The folder of a twin in its encoder's bundle."""
    return f"twin/{sha256_file(twin / MANIFEST_FILE)[:16]}"


def test_a_paired_bundle_answers_at_both_speeds_and_keeps_its_own_fingerprint(pair):
    bundle, twin = pair
    before = read_manifest(bundle)
    assert main([str(bundle), str(twin)]) == 0
    after = read_manifest(bundle)
    check_files(bundle, after)
    added = {f"{folder_of(twin)}/{path.name}" for path in twin.iterdir()}
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
    change_bundle(twin, **changes)
    assert main([str(bundle), str(twin)]) == 2
    assert message in capsys.readouterr().err
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert not (bundle / "twin").exists()
    shutil.copytree(twin, bundle / "twin" / "other")
    manifest = json.loads(before)
    manifest["files"]["twin/other/manifest.json"] = sha256_file(twin / MANIFEST_FILE)
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as refused:
        Encoder.load(bundle, engine="fake")
    assert message in str(refused.value)


def test_an_exchanged_twin_is_noticed_and_a_bundle_without_one_is_not_fast(pair):
    bundle, twin = pair
    with Encoder.load(bundle, engine="fake") as encoder, pytest.raises(InputError, match="has no static twin"):
        encoder.encode(["a"], speed="fast")
    assert main([str(bundle), str(twin)]) == 0
    inside = bundle / folder_of(twin)
    change_bundle(inside, twin_of=FINGERPRINT, fingerprint="1" * 16)
    with pytest.raises(BundleError, match=f"{MANIFEST_FILE} differ from the manifest"):
        Encoder.load(bundle, engine="fake")
    shutil.copy(twin / MANIFEST_FILE, inside)
    (inside / CANARIES_FILE).write_text("{}")
    with pytest.raises(BundleError, match=r"canaries\.json differ"):
        check_files(bundle, read_manifest(bundle))


def test_another_twin_takes_the_place_of_the_first_one_even_if_a_kill_interrupts_it(pair, monkeypatch):
    bundle, twin = pair
    assert main([str(bundle), str(twin)]) == 0
    manifest = read_manifest(twin)
    write_json(Canaries(canaries=(Canary(text="a", vector=(1.0,)),)), twin / CANARIES_FILE)
    files = {TOKENIZER_FILE: manifest.files[TOKENIZER_FILE], "new.json": sha256_file(twin / CANARIES_FILE)}
    (twin / CANARIES_FILE).rename(twin / "new.json")
    write_json(dataclasses.replace(manifest, files=files, fingerprint="1" * 16), twin / MANIFEST_FILE)

    class Killed(BaseException): ...

    def killed_at_the_last(source: Path, target: Path, move=os.replace) -> None:
        if target == bundle / MANIFEST_FILE:
            raise Killed
        move(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", killed_at_the_last)
        with pytest.raises(Killed):
            main([str(bundle), str(twin)])
    for space in (TWIN, "1" * 16):
        check_files(bundle, read_manifest(bundle))
        with Encoder.load(bundle, engine="fake") as encoder:
            assert encoder.at("fast").fingerprint == space
        assert main([str(bundle), str(twin)]) == 0
    listed = {name for name in read_manifest(bundle).files if name.startswith("twin/")}
    assert listed == {str(path.relative_to(bundle)) for path in (bundle / "twin").rglob("*") if path.is_file()}
    assert listed == {f"{folder_of(twin)}/{name}" for name in (*files, MANIFEST_FILE)}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (("auto", "auto"), ("auto", "auto")),
        (("openvino", "int8"), ("openvino", "auto")),
        (("onnxruntime", "bf16"), ("onnxruntime", "auto")),
        (("openvino", "bf16"), ("openvino", "bf16")),
        (("auto", "fp32"), ("auto", "fp32")),
        (("tensorrt", "fp16"), ("auto", "auto")),
    ],
)
def test_engine_and_precision_hold_for_a_twin_where_its_bundle_has_them(make_bundle, named, expected):
    proven = [artifact(EngineName.OPENVINO, precision) for precision in (Precision.FP32, Precision.BF16)]
    bundle = make_bundle(artifacts=(artifact(EngineName.ONNXRUNTIME, Precision.FP32), *proven))
    assert twin_setting(bundle, *named) == expected


def test_a_named_precision_is_that_of_both_where_both_have_it(pair):
    bundle, twin = pair
    assert main([str(bundle), str(twin)]) == 0
    with Encoder.load(bundle, engine="fake", precision="int8") as encoder:
        assert encoder.engine.precision is encoder.at("fast").engine.precision is Precision.INT8


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
