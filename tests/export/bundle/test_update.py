"""Adding artifacts to an existing bundle: completely, by one process at a time, and without damage on failure."""

import os
from pathlib import Path

import pytest

from encoders.card import CARD_FILE
from evaluation.statistics import Estimate
from export.bundle import card
from export.bundle.update import add_artifacts, updating
from mirror_runtime.bundle import (
    MANIFEST_FILE,
    EngineName,
    Precision,
    check_files,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.errors import InputError


def test_new_files_and_artifacts_are_in_the_manifest_and_the_rest_is_as_before(make_bundle, make_artifact):
    bundle = make_bundle(artifacts=(make_artifact(EngineName.ONNXRUNTIME, Precision.FP32),))
    before = read_manifest(bundle)
    with updating(bundle) as staging:
        (staging / "tensorrt").mkdir()
        (staging / "tensorrt" / "model.plan").write_bytes(b"plan")
        add_artifacts(bundle, staging, [make_artifact(EngineName.TENSORRT, Precision.FP16)])
    after = read_manifest(bundle)
    check_files(bundle, after)
    assert after.files == {**before.files, "tensorrt/model.plan": sha256_file(bundle / "tensorrt/model.plan")}
    assert [a.engine for a in after.artifacts] == [EngineName.ONNXRUNTIME, EngineName.TENSORRT]
    assert not list(bundle.glob(".partial-*"))


def test_the_card_keeps_what_witness_and_probes_said(make_bundle, make_artifact):
    bundle = make_bundle(artifacts=(artifact := make_artifact(EngineName.ONNXRUNTIME, Precision.FP32),))
    cost = card.ProbeCost(
        path=artifact.path,
        engine=artifact.engine,
        precision=artifact.precision,
        probe="content, accuracy",
        items=9,
        before=1.0,
        after=2.0,
        gain=Estimate(value=1.0, low=0.5, high=1.5),
    )
    write_json(card.ProbeCosts(reference="tests", texts_sha256="0", costs=(cost,)), bundle / card.PROBES_FILE)
    seen = card.Testimony(version="library 1", texts=5, min_cosine=1.0, problem="")
    write_json(seen, bundle / card.WITNESS_FILE)
    (bundle / CARD_FILE).touch()
    card.write_card(bundle, read_manifest(bundle))
    with updating(bundle) as staging:
        add_artifacts(bundle, staging, [make_artifact(EngineName.TENSORRT, Precision.FP16)])
    text = (bundle / CARD_FILE).read_text()
    assert "| content, accuracy | 9 | 1.00 | +1.00 [+0.50, +1.50] |  |" in text, "none of the artifact that was added"
    assert "library 1, reading the encoder's own folder, computes the reference's vectors" in text


def test_a_failure_leaves_the_bundle_as_it_was(make_bundle):
    bundle: Path = make_bundle()
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(InputError, match="No such file"), updating(bundle) as staging:
        _ = [(staging / name).write_bytes(b"plan") for name in ("model.plan", "no folder/half way")]
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_two_at_once_are_refused_and_leftovers_of_the_killed_removed(make_bundle, tmp_path):
    bundle: Path = make_bundle()
    (bundle / ".partial-killed").mkdir()
    with updating(bundle):
        assert not (bundle / ".partial-killed").exists()
        with pytest.raises(InputError, match="another process is adding"), updating(bundle):
            pass
    with updating(bundle):
        pass
    with pytest.raises(InputError, match="absent cannot be written: No such file"), updating(tmp_path / "absent"):
        pass


def test_the_manifest_is_written_last(make_bundle, make_artifact, monkeypatch):
    bundle = make_bundle()
    replaced: list[str] = []
    real = os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (replaced.append(Path(b).name), real(a, b)))
    with updating(bundle) as staging:
        (staging / "z.plan").write_bytes(b"plan")
        add_artifacts(bundle, staging, [make_artifact(EngineName.TENSORRT, Precision.FP16)])
    assert replaced == ["z.plan", MANIFEST_FILE]
    with updating(bundle) as staging:
        add_artifacts(bundle, staging, [make_artifact(EngineName.TENSORRT, Precision.FP16)])
    assert len(read_manifest(bundle).artifacts) == 1, "a second build takes the place of the first"
