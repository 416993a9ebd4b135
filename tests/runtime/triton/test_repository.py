"""The model repository: the committed example, rendering, and writing."""

import json
import os
import shlex
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tritonclient.grpc.model_config_pb2 as triton_proto
from google.protobuf import text_format

from export import to_triton
from mirror_runtime.bundle import EngineName, Precision, check_files, read_manifest
from mirror_runtime.errors import BundleError, EngineError, InputError
from mirror_runtime.plan import Setting, Trial, write_plan
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.container import container_command
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import (
    render_config,
    render_warmup,
    write_repository,
    write_temporary_repository,
)
from tests.support.example_repositories import MINILM, committed, example
from tests.support.fake_bundles import host_plan


def parsed(text: str) -> triton_proto.ModelConfig:
    """Parse a configuration as Triton does; raise for an unknown field or a syntax error."""
    return text_format.Parse(text, triton_proto.ModelConfig())


def config_of(repository: Path, model: str = "embed") -> triton_proto.ModelConfig:
    return parsed((repository / model / "config.pbtxt").read_text(encoding="utf-8"))


def parameters_of(config: triton_proto.ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.fixture
def write(make_bundle, tmp_path):
    """Write a bundle's repository for the fake engine to "repo"."""
    bundle = make_bundle()

    def write(link: bool = False, overwrite: bool = False, **options: Any) -> Path:
        chosen = ServingOptions(**{"engine": "fake", **options})
        return write_repository(bundle, tmp_path / "repo", chosen, link=link, overwrite=overwrite)

    return write


@pytest.mark.parametrize("backend", Backend)
def test_the_committed_repositories_are_as_rendered(backend):
    assert committed(backend) == example(backend), "python -m tests.support.example_repositories writes them anew"


def test_the_configuration_of_the_model():
    config = parsed(render_config(MINILM, ServingOptions(max_batch_size=64, streams=2)))
    assert (config.name, config.backend, config.max_batch_size) == ("embed", "python", 64)
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("EMBEDDING", triton_proto.TYPE_FP32, [384]),
        ("TOKENS", triton_proto.TYPE_INT32, [1]),
        ("TRUNCATED", triton_proto.TYPE_BOOL, [1]),
        ("FINGERPRINT", triton_proto.TYPE_STRING, [1]),
    ]
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("TEXT", triton_proto.TYPE_STRING, [1])]
    assert [(g.kind, g.count) for g in config.instance_group] == [(triton_proto.ModelInstanceGroup.KIND_CPU, 1)]
    assert config.HasField("dynamic_batching")
    # Any of these makes Triton stall requests for up to 500 ms.
    assert config.dynamic_batching == triton_proto.ModelDynamicBatching()
    assert config.version_policy.latest.num_versions == 1
    assert not config.response_cache.enable
    parameters = parameters_of(config)
    assert ServingOptions.of_parameters(parameters, 64) == ServingOptions(max_batch_size=64, streams=2)
    assert (parameters["bundle"], parameters["fingerprint"]) == ("bundle", "0123456789abcdef")
    options = ServingOptions(instances=3, max_tokens_in_flight=9, long_texts=LongTexts.CHUNK, invariant=True)
    config = parsed(render_config(MINILM, options))
    assert config.instance_group[0].count == 3
    parameters = parameters_of(config)
    assert ServingOptions.of_parameters(parameters, config.max_batch_size) == options
    elastic = replace(MINILM, encoder=replace(MINILM.encoder, trained_dims=(64, 128)))
    for chosen, allowed in (((), "64,128"), ((64,), "64")):
        assert parameters_of(parsed(render_config(elastic, ServingOptions(dimensions=chosen))))["dimensions"] == allowed
    with pytest.raises(InputError, match="--dimensions 32: this encoder was trained for 64, 128"):
        render_config(elastic, ServingOptions(dimensions=(32,)))


def test_any_path_survives_the_configuration_and_warmup_is_length_prefixed_text_that_fits():
    for path in ('a "quoted" name', "back\\slash", "ünïcode", "new\nline"):
        config = parsed(render_config(MINILM, ServingOptions(), bundle=path))
        assert config.parameters["bundle"].string_value == path
    for name, content in render_warmup(MINILM).items():
        (length,) = struct.unpack("<I", content[:4])
        assert length == len(content) - 4, name
        assert 0 < len(content[4:].decode("utf-8").split()) <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"streams": 0}, "streams is 0"),
        ({"row_tokens": 64}, "row_tokens and batch_tokens belong together"),
        ({"row_tokens": 64, "batch_tokens": 1024}, "require engine, precision and streams"),
        ({"invariant": True, "backend": Backend.OPENVINO}, "--invariant is not possible with the backend openvino"),
    ],
)
def test_options_are_validated(options, message):
    with pytest.raises(InputError, match=message):
        ServingOptions(**options)


SETTING = Setting(engine=EngineName.OPENVINO, precision=Precision.BF16, streams=4, row_tokens=32, batch_tokens=2048)

TRIAL = Trial(setting=SETTING, texts_per_s=1000.0, p50_ms=2.0, min_cosine=1.0, certified_cosine=1.0, accepted=True)
PLAN = host_plan(chosen=SETTING, measured=(TRIAL,))


def test_a_plan_fills_open_options():
    options = ServingOptions(max_batch_size=8).follow(PLAN, "0123456789abcdef")
    assert options.setting == SETTING
    assert options.max_batch_size == 8
    assert ServingOptions(streams=1).follow(PLAN, "0123456789abcdef").streams == 1
    with pytest.raises(InputError, match="the plan is for the bundle 0123456789abcdef, not fed"):
        ServingOptions().follow(PLAN, "fed")
    with pytest.raises(InputError, match="accepted nothing for engine onnxruntime"):
        ServingOptions(engine="onnxruntime").follow(PLAN, "0123456789abcdef")


@pytest.mark.parametrize("link", [False, True])
def test_the_repository_holds_its_own_bundle(write, tmp_path, link):
    folder = write(link=link)
    assert folder == tmp_path / "repo" / "embed"
    copy = folder / "1" / "bundle"
    check_files(copy, read_manifest(copy))
    assert os.path.samefile(copy / "tokenizer.json", tmp_path / "bundle" / "tokenizer.json") == link
    assert config_of(tmp_path / "repo").output[0].dims == [8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"], "no other file may remain"


def test_links_become_copies_if_there_are_none_and_a_changed_bundle_is_rejected(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(18, "Invalid cross-device link")))
    copy = write(link=True) / "1" / "bundle"
    check_files(copy, read_manifest(copy))
    shutil.rmtree(tmp_path / "repo")
    with (tmp_path / "bundle" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match=r"tokenizer\.json differ"):
        write()
    assert not (tmp_path / "repo").exists()


def test_a_model_is_replaced_only_with_overwrite_and_a_failure_leaves_the_old_one(write, tmp_path, monkeypatch):
    old = write() / "old"
    old.touch()
    before = (tmp_path / "repo" / "embed" / "config.pbtxt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy2", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left"):
            write(max_batch_size=1, overwrite=True)
    assert (tmp_path / "repo" / "embed" / "config.pbtxt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]
    with pytest.raises(InputError, match="--overwrite"):
        write()
    assert old.exists()
    write(overwrite=True)
    assert not old.exists()


def test_an_artifact_that_the_bundle_lacks_cannot_be_served(make_bundle, make_artifact, tmp_path):
    artifact = make_artifact(EngineName.ONNXRUNTIME, Precision.FP32)
    bundle = make_bundle(artifacts=(artifact,))
    has = "it has onnxruntime fp32"
    for engine, precision, message in (
        ("openvino", "auto", has),
        ("auto", "bf16", has),
        ("warp", "auto", "is unknown"),
    ):
        with pytest.raises(EngineError, match=message):
            write_repository(bundle, tmp_path / "repo", ServingOptions(engine=engine, precision=precision))
    write_repository(bundle, tmp_path / "repo", ServingOptions())


def test_a_temporary_repository_refers_to_the_bundle_and_has_no_backend(make_bundle, tmp_path):
    bundle = make_bundle()
    (tmp_path / "repo").mkdir()
    write_temporary_repository(bundle, tmp_path / "repo", ServingOptions(engine="fake"))
    config = config_of(tmp_path / "repo")
    assert config.parameters["bundle"].string_value == str(bundle)
    assert not (tmp_path / "repo" / "embed" / "1" / "bundle").exists()
    with pytest.raises(InputError, match="only in NVIDIA's container"):
        write_temporary_repository(bundle, tmp_path, ServingOptions(backend=Backend.OPENVINO))


def test_the_container_command_is_one_shell_command_on_loopback():
    words = shlex.split(container_command("/data/my repo", "/src/clone", engine="openvino"))
    assert words[:3] == ["docker", "run", "--rm"]
    assert "/data/my repo:/models:ro" in words
    assert "/src/clone:/src:ro" in words
    assert [word for word in words if ":8000" in word] == ["127.0.0.1:8000:8000"]
    assert words[-3:-1] == ["sh", "-c"]
    assert "pip install --quiet '/tmp/mirror[openvino]' &&" in words[-1]
    assert "--gpus=all" not in words


@pytest.mark.parametrize("backend", [Backend.TENSORRT, Backend.ONNXRUNTIME_CUDA])
def test_the_container_of_a_gpu_backend_has_the_gpus_and_no_engine(backend):
    words = shlex.split(container_command("/models", "/src/clone", engine=backend.value, backend=backend))
    assert "--gpus=all" in words
    assert "pip install --quiet '/tmp/mirror' &&" in words[-1]


@pytest.mark.parametrize(
    ("engine", "packages"),
    [
        ("onnxruntime-cuda", "'/tmp/mirror[gpu]'"),
        ("onnxruntime-tensorrt", "'/tmp/mirror[gpu]' 'tensorrt<11'"),
        ("tensorrt", "'/tmp/mirror[tensorrt]'"),
    ],
)
def test_the_container_of_a_gpu_engine_has_the_gpus_and_its_packages(engine, packages):
    words = shlex.split(container_command("/models", "/src/clone", engine=engine))
    assert "--gpus=all" in words
    assert f"pip install --quiet {packages} &&" in words[-1]


def test_to_triton_writes_a_repository_and_ends_in_one_json_line(make_bundle, tmp_path, capsys):
    arguments = [str(make_bundle()), "--output", str(tmp_path / "repo"), "--engine", "fake", "--long-texts", "chunk"]
    assert to_triton.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["repository"] == str(tmp_path / "repo")
    assert (report["dim"], report["fingerprint"]) == (8, "0123456789abcdef")
    assert report["container"].startswith("docker run")
    config = config_of(tmp_path / "repo")
    assert config.parameters["long_texts"].string_value == LongTexts.CHUNK.value
    assert to_triton.main([str(tmp_path / "absent"), "--output", str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "is not a bundle" in captured.err
    assert "Traceback" not in captured.err
    assert to_triton.main(["--no-such-flag"]) == 2


def test_to_triton_follows_a_plan(make_bundle, make_artifact, tmp_path, capsys):
    bundle = make_bundle(artifacts=(make_artifact(EngineName.OPENVINO, Precision.BF16),))
    write_plan(PLAN, tmp_path / "plan.json")
    arguments = [str(bundle), "--output", str(tmp_path / "repo"), "--plan", str(tmp_path / "plan.json")]
    assert to_triton.main(arguments) == 0, capsys.readouterr().err
    config = config_of(tmp_path / "repo")
    expected = {"engine": "openvino", "precision": "bf16", "streams": "4", "row_tokens": "32"}
    assert expected.items() <= parameters_of(config).items()


def test_to_triton_writes_both_models_of_a_backend(make_bundle, make_artifact, tmp_path, capsys):
    bundle = make_bundle(artifacts=(make_artifact(EngineName.ONNXRUNTIME, Precision.FP32),))
    (bundle / "onnx").mkdir()
    (bundle / "onnx" / "model_packed.onnx").write_bytes(b"a graph")
    arguments = [str(bundle), "--output", str(tmp_path / "repo"), "--backend", "onnxruntime", "--cores", "8"]
    assert to_triton.main([*arguments, "--streams", "2"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["backend"] == "onnxruntime"
    assert "'/tmp/mirror'" in report["container"], "it needs no engine package"
    repository = tmp_path / "repo"
    assert (repository / "encoder" / "1" / "model.onnx").read_bytes() == b"a graph"
    kept = {path.name for path in (repository / "embed" / "1" / "bundle").iterdir()}
    assert kept == {"manifest.json", "tokenizer.json"}, "the graph is stored once"
    encoder = config_of(repository, "encoder")
    assert encoder.parameters["intra_op_thread_count"].string_value == "4"
    embed = config_of(repository)
    assert not embed.model_warmup, "models cannot reach each other before the server is ready"
    parameters = parameters_of(embed)
    names = ("backend", "engine", "precision", "streams")
    assert [parameters[name] for name in names] == ["onnxruntime", "onnxruntime", "fp32", "2"]
    assert to_triton.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert to_triton.main([str(bundle), "--output", str(repository), "--engine", "fake", "--overwrite"]) == 0
    assert [path.name for path in repository.iterdir()] == ["embed"], "the unused encoder is removed"
