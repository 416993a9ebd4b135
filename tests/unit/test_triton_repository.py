"""The model repository: what is committed, what is rendered, and what is written."""

import json
import os
import shlex
import struct
from pathlib import Path

import pytest
import tritonclient.grpc.model_config_pb2 as triton_proto
from google.protobuf import text_format

from export import to_triton
from mirror_runtime.bundle import (
    FORMAT_VERSION,
    EncoderSpec,
    EngineName,
    Manifest,
    Pooling,
    Precision,
    check_files,
    read_manifest,
)
from mirror_runtime.errors import BundleError, EngineError, InputError
from mirror_runtime.tokens import LongTexts
from mirror_runtime.triton.repository import (
    MODEL_SOURCE,
    ServingOptions,
    container_command,
    render_config,
    render_warmup,
    write_repository,
    write_temporary_repository,
)

COMMITTED = Path(__file__).resolve().parents[2] / "triton_models" / "embed"

MINILM = Manifest(
    format_version=FORMAT_VERSION,
    created_by="tests",
    encoder=EncoderSpec(
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        revision=None,
        family="bert",
        pooling=Pooling.MEAN,
        normalize=True,
        max_tokens=256,
        dim=384,
        pad_to=None,
    ),
    fingerprint="0123456789abcdef",
    files={},
    artifacts=(),
)


def parsed(text: str) -> triton_proto.ModelConfig:
    """Read a configuration the way Triton does; an unknown field or a syntax error raises."""
    return text_format.Parse(text, triton_proto.ModelConfig())


def test_the_committed_model_is_what_is_rendered():
    assert (COMMITTED / "config.pbtxt").read_text(encoding="utf-8") == render_config(MINILM, ServingOptions())
    assert (COMMITTED / "1" / "model.py").read_text(encoding="utf-8") == MODEL_SOURCE
    warmup = render_warmup(MINILM)
    assert {path.name: path.read_bytes() for path in (COMMITTED / "warmup").iterdir()} == warmup


def test_config_says_what_triton_must_know():
    config = parsed(render_config(MINILM, ServingOptions(max_batch_size=64, streams=2)))
    assert (config.name, config.backend, config.max_batch_size) == ("embed", "python", 64)
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("EMBEDDING", triton_proto.TYPE_FP32, [384]),
        ("TOKENS", triton_proto.TYPE_INT32, [1]),
        ("TRUNCATED", triton_proto.TYPE_BOOL, [1]),
    ]
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("TEXT", triton_proto.TYPE_STRING, [1])]
    assert [(g.kind, g.count) for g in config.instance_group] == [(triton_proto.ModelInstanceGroup.KIND_CPU, 1)]
    assert config.HasField("dynamic_batching")
    # Any of these makes Triton stall requests for up to 500 ms.
    assert config.dynamic_batching == triton_proto.ModelDynamicBatching()
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == {
        "bundle": "bundle",
        "engine": "auto",
        "precision": "auto",
        "streams": "2",
        "long_texts": "truncate",
        "fingerprint": "0123456789abcdef",
    }


@pytest.mark.parametrize("path", ['a "quoted" name', "back\\slash", "ünïcode", "new\nline"])
def test_any_path_survives_the_configuration(path):
    config = parsed(render_config(MINILM, ServingOptions(), bundle=path))
    assert config.parameters["bundle"].string_value == path


def test_warmup_holds_length_prefixed_text_that_fits_the_encoder():
    for name, content in render_warmup(MINILM).items():
        (length,) = struct.unpack("<I", content[:4])
        assert length == len(content) - 4, name
        assert 0 < len(content[4:].decode("utf-8").split()) <= 64


def test_options_are_checked():
    with pytest.raises(InputError, match="max_batch_size is 0"):
        ServingOptions(max_batch_size=0)
    with pytest.raises(InputError, match="streams is 0"):
        ServingOptions(streams=0)


@pytest.mark.parametrize("link", [False, True])
def test_the_repository_holds_its_own_bundle(make_bundle, tmp_path, link):
    bundle = make_bundle()
    folder = write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"), link=link)
    assert folder == tmp_path / "repo" / "embed"
    copy = folder / "1" / "bundle"
    check_files(copy, read_manifest(copy))
    assert os.path.samefile(copy / "tokenizer.json", bundle / "tokenizer.json") == link
    assert parsed((folder / "config.pbtxt").read_text(encoding="utf-8")).output[0].dims == [8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"], "nothing may be left beside"


def test_links_become_copies_where_the_file_system_has_none(make_bundle, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = write_repository(make_bundle(), tmp_path / "repo", ServingOptions(engine="fake"), link=True)
    check_files(folder / "1" / "bundle", read_manifest(folder / "1" / "bundle"))


def test_a_changed_bundle_is_refused_and_nothing_is_written(make_bundle, tmp_path):
    bundle = make_bundle()
    (bundle / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"tokenizer\.json differ"):
        write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    assert not (tmp_path / "repo").exists()


def test_a_failure_half_way_leaves_what_was_there(make_bundle, tmp_path, monkeypatch):
    bundle = make_bundle()
    folder = write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    before = (folder / "config.pbtxt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(InputError, match="No space left"):
        write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake", max_batch_size=1), overwrite=True)
    assert (folder / "config.pbtxt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]


def test_an_existing_model_is_replaced_only_when_asked(make_bundle, tmp_path):
    bundle = make_bundle()
    write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    (tmp_path / "repo" / "embed" / "old").touch()
    with pytest.raises(InputError, match="--overwrite"):
        write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    assert (tmp_path / "repo" / "embed" / "old").exists()
    write_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"), overwrite=True)
    assert not (tmp_path / "repo" / "embed" / "old").exists()


def test_what_the_bundle_does_not_hold_cannot_be_served(make_bundle, make_artifact, tmp_path):
    artifact = make_artifact(EngineName.ONNXRUNTIME, Precision.FP32)
    bundle = make_bundle(artifacts=(artifact,))
    for engine, precision in (("openvino", "auto"), ("auto", "bf16"), ("warp", "auto")):
        with pytest.raises(EngineError, match="it has onnxruntime fp32"):
            write_repository(bundle, tmp_path / "repo", ServingOptions(engine=engine, precision=precision))
    write_repository(bundle, tmp_path / "repo", ServingOptions())


def test_a_temporary_repository_refers_to_the_bundle(make_bundle, tmp_path):
    bundle = make_bundle()
    (tmp_path / "repo").mkdir()
    write_temporary_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    config = parsed((tmp_path / "repo" / "embed" / "config.pbtxt").read_text(encoding="utf-8"))
    assert config.parameters["bundle"].string_value == str(bundle)
    assert not (tmp_path / "repo" / "embed" / "1" / "bundle").exists()


def test_the_container_command_is_one_shell_command_on_loopback():
    words = shlex.split(container_command("/data/my repo", "/src/clone", engine="openvino"))
    assert words[:3] == ["docker", "run", "--rm"]
    assert "/data/my repo:/models:ro" in words
    assert "/src/clone:/src:ro" in words
    assert [word for word in words if ":8000" in word] == ["127.0.0.1:8000:8000"]
    assert words[-3:-1] == ["sh", "-c"]
    assert "pip install --quiet '/tmp/mirror[openvino]'" in words[-1]


def test_to_triton_writes_a_repository_and_ends_in_one_json_line(make_bundle, tmp_path, capsys):
    arguments = [str(make_bundle()), "--output", str(tmp_path / "repo"), "--engine", "fake", "--long-texts", "chunk"]
    assert to_triton.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["repository"] == str(tmp_path / "repo")
    assert (report["dim"], report["fingerprint"]) == (8, "0123456789abcdef")
    assert report["container"].startswith("docker run")
    config = parsed((tmp_path / "repo" / "embed" / "config.pbtxt").read_text(encoding="utf-8"))
    assert config.parameters["long_texts"].string_value == LongTexts.CHUNK.value


def test_to_triton_says_what_is_wrong_without_a_traceback(tmp_path, capsys):
    assert to_triton.main([str(tmp_path / "absent"), "--output", str(tmp_path / "repo")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "is not a bundle" in captured.err
    assert "Traceback" not in captured.err
    assert to_triton.main(["--no-such-flag"]) == 2
