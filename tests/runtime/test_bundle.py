import json
from dataclasses import replace

import pytest

from mirror_runtime import bundle
from mirror_runtime.errors import BundleError
from tests.support.fake_bundles import encoder_spec

SPEC = encoder_spec(pooling=bundle.Pooling.CLS)


def test_manifest_survives_the_round_trip(make_bundle, make_artifact):
    folder = make_bundle(artifacts=(make_artifact(bundle.EngineName.OPENVINO, bundle.Precision.BF16),))
    manifest = bundle.read_manifest(folder)
    bundle.write_json(manifest, folder / "again.json")
    assert (folder / "again.json").read_text() == (folder / "manifest.json").read_text()
    assert manifest.artifacts[0].precision is bundle.Precision.BF16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim is None; expected int"),
        ({"dim": "384"}, "dim is '384'; expected int"),
        ({"dim": True}, "dim is True; expected int"),
        ({"pooling": "average"}, "pooling is 'average'; known are mean, cls, mean_padded"),
        ({"surprise": 1}, "unknown surprise"),
        ({"pad_to": 64}, "set it for mean_padded only"),
        ({"max_tokens": 2}, "max_tokens is 2"),
        ({"pooling": ...}, "missing pooling"),
        ({"trained_dims": [4, 2]}, "trained_dims is \\[4, 2\\]: it must hold ascending positive numbers"),
        ({"trained_dims": [2, 8]}, "trained_dims holds 8: vectors have 8 components"),
        ({"trained_depths": [0]}, "trained_depths is \\[0\\]"),
    ],
)
def test_the_reader_is_strict(change, message):
    data = {name: value for name, value in {**bundle.to_json(SPEC), **change}.items() if value is not ...}
    with pytest.raises(BundleError, match=message):
        bundle.from_json(bundle.EncoderSpec, data, "encoder.json")


def test_fields_that_were_added_later_are_in_a_file_only_where_they_say_something():
    old = bundle.to_json(SPEC)
    assert not {"trained_dims", "trained_depths"} & old.keys()
    assert bundle.from_json(bundle.EncoderSpec, old, "encoder.json") == SPEC
    elastic = replace(SPEC, trained_dims=(4,), trained_depths=(1, 2))
    assert bundle.to_json(elastic) == {**old, "trained_dims": [4], "trained_depths": [1, 2]}
    assert bundle.from_json(bundle.EncoderSpec, bundle.to_json(elastic), "encoder.json") == elastic
    assert bundle.fingerprint(elastic, FILES) == bundle.fingerprint(SPEC, FILES), "the vectors are the same"


def test_no_bundle_a_broken_manifest_and_one_that_points_outside_are_clear_errors(make_bundle, tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.read_manifest(tmp_path)
    with pytest.raises(BundleError, match="is not a run folder"):
        bundle.read_encoder(tmp_path)
    for text in ("", "{", "[]", '{"format_version": 2}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            bundle.read_manifest(tmp_path)
    folder = make_bundle()
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["../secret"] = "0"
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.read_manifest(folder)


def test_corruption_and_loss_are_told_by_file(make_bundle):
    folder = make_bundle()
    manifest = bundle.read_manifest(folder)
    bundle.check_files(folder, manifest)
    (folder / "canaries.json").write_text("{}")
    with pytest.raises(BundleError, match=r"canaries\.json differ"):
        bundle.check_files(folder, manifest)
    (folder / "canaries.json").unlink()
    with pytest.raises(BundleError, match=r"lacks canaries\.json"):
        bundle.check_files(folder, manifest)


FILES = {"model.safetensors": "w", "tokenizer.json": "t", "README.md": "r"}


def test_the_fingerprint_names_the_space_and_not_the_origin():
    same = bundle.fingerprint(SPEC, FILES)
    assert same == bundle.fingerprint(SPEC, {**FILES, "README.md": "new"})
    assert same == bundle.fingerprint(replace(SPEC, base_model="copy", revision="abc"), FILES)
    others = {
        bundle.fingerprint(SPEC, {**FILES, "model.safetensors": "v"}),
        bundle.fingerprint(SPEC, {**FILES, "tokenizer.json": "u"}),
        bundle.fingerprint(SPEC, {**FILES, "2_Dense/model.safetensors": "d"}),
        bundle.fingerprint(replace(SPEC, pooling=bundle.Pooling.MEAN), FILES),
        bundle.fingerprint(replace(SPEC, max_tokens=51), FILES),
    }
    assert len(others) == 5
    assert same not in others
