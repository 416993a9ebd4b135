"""`to_tensorrt.py` from bundle to proven artifact, on a stand-in GPU that runs the graph with ONNX Runtime."""

import json
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export import to_tensorrt
from export.proof.floors import Floors
from export.proof.proof_texts import CANARIES
from export.tensorrt import prove_plan
from export.tensorrt.artifact import Options, choose_graph, write_samples
from export.tensorrt.builder import read_request
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Layout, Precision, VectorType, check_files, read_manifest, sha256_file
from mirror_runtime.engines import load_engine, onnxruntime_gpu
from mirror_runtime.engines.plan_card import read_card
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import Vectors
from tests.support import fake_gpu
from tests.support.tensorrt_binding import VERSIONS

TEXTS = ("the cat sat on the mat.", "a man is playing a guitar", "dog " * 80, "river", *"abcdefgh")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def graph_of(bundle: Path) -> Path:
    return bundle / "onnx" / "model_packed.onnx"


def with_gpu(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, noise: float = 0.0, version: str = VERSIONS[1]
) -> fake_gpu.Gpu:
    """A GPU on which a plan of the packed graph gives that graph's vectors, and noise."""
    spec = read_manifest(bundle).encoder
    plain = load_engine(EngineName.ONNXRUNTIME, Precision.FP32, graph_of(bundle), spec=spec)

    def compute(rows: PackedRows) -> Vectors:
        vectors = plain.run(rows)
        return vectors + np.float32(noise) * np.sin(np.arange(vectors.size, dtype=np.float32)).reshape(vectors.shape)

    return fake_gpu.install(monkeypatch, version, compute, spec.dim)


def run(*arguments: object) -> int:
    return to_tensorrt.main([str(argument) for argument in arguments])


def test_a_reranker_is_refused_by_every_way(reranker_bundle, tmp_path, capsys):
    for options in ((), ("--check",), ("--script", tmp_path / "script"), ("--engine", "onnxruntime-cuda")):
        assert run(reranker_bundle, *options) == 2
        assert "is a reranker, which is proven on CPUs only" in capsys.readouterr().err
    assert not (tmp_path / "script").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_is_built_proven_added_and_served(monkeypatch, bundle, texts, tmp_path, capsys, version):
    gpu = with_gpu(monkeypatch, bundle, version=version)
    cache = tmp_path / "timing.cache"
    options = ("--precision", "fp32", "--parity-texts", texts, "--timing-cache", cache, "--batch-tokens", 2048)
    assert run(bundle, *options) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["path"], report["engine"]) == ("tensorrt/model_packed.plan", "tensorrt")
    assert report["min_cosine"] > 0.99999
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    (artifact,) = (a for a in manifest.artifacts if a.engine is EngineName.TENSORRT)
    assert (artifact.precision, artifact.layout) == (Precision.FP32, Layout.PACKED)
    assert artifact.parity.texts == len({*TEXTS, *CANARIES})
    assert (artifact.toolchain["tensorrt"], artifact.toolchain["gpu"]) == (version, "NVIDIA L4 (8.9)")
    assert read_card(bundle / artifact.path).profiles[-1]["input_ids"][2][1] >= manifest.encoder.max_tokens
    shapes = {profile["input_ids"][2] for profile in read_card(bundle / artifact.path).profiles}
    assert {(16, 64), (32, 64)} <= shapes
    assert cache.read_bytes() == b"timings"
    assert not list(bundle.glob(".partial-*"))
    with (
        Encoder.load(bundle, engine="tensorrt", precision="fp32") as encoder,
        Encoder.load(bundle, engine="onnxruntime", precision="fp32") as plain,
    ):
        np.testing.assert_allclose(encoder.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    assert gpu.trt.__version__ == version


def test_a_plan_that_misses_the_floor_leaves_the_bundle_as_it_was(monkeypatch, bundle, texts, capsys):
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    before = content()
    with_gpu(monkeypatch, bundle, noise=0.05)
    assert run(bundle, "--precision", "fp32", "--parity-texts", texts) == 2
    assert "cosine below 0.99999" in capsys.readouterr().err
    assert content() == before


def test_without_tensorrt_or_a_gpu_the_error_says_what_to_do(monkeypatch, bundle, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run(bundle, "--precision", "fp32") == 2
    assert "[tensorrt]" in capsys.readouterr().err
    with_gpu(monkeypatch, bundle)

    fake_gpu.install_driver(monkeypatch, None)
    assert run(bundle, "--precision", "fp32") == 2
    assert "no NVIDIA driver" in capsys.readouterr().err


def test_ragged_attention_needs_a_tensorrt_that_has_it(monkeypatch, bundle, capsys):
    with_gpu(monkeypatch, bundle, version=VERSIONS[0])
    assert run(bundle, "--precision", "fp32", "--ragged") == 2
    assert f"--ragged needs TensorRT 11.1, and {VERSIONS[0]} is installed" in capsys.readouterr().err


def test_a_providers_artifact_is_proven_and_added(monkeypatch, bundle, texts, capsys):
    name = EngineName.ONNXRUNTIME_CUDA
    on_cpu = replace(onnxruntime_gpu.PROVIDERS[name], name="CPUExecutionProvider", device="cpu", options=lambda *_: {})
    monkeypatch.setattr(onnxruntime_gpu, "PROVIDERS", {name: on_cpu})
    fake_gpu.install_driver(monkeypatch, fake_gpu.FakeDriver())
    assert run(bundle, "--precision", "fp32", "--engine", name.value, "--parity-texts", texts) == 0
    (artifact,) = (a for a in read_manifest(bundle).artifacts if a.engine is name)
    assert (artifact.path, artifact.toolchain["gpu"]) == ("onnx/model_packed.onnx", "NVIDIA L4 (8.9)")
    assert artifact.parity.min_cosine > 0.99999
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["engine"] == name.value


def test_check_passes_on_every_exported_graph(bundle: Path, capsys: Any):
    assert run(bundle, "--check") == 0
    graphs = json.loads(capsys.readouterr().out)["graphs"]
    expected: list[Any] = [(f"onnx/{name}.onnx", "fp32", []) for name in ("model", "model_packed")]
    assert [(graph["graph"], graph["precision"], graph["breaches"]) for graph in graphs] == expected


def record(bundle: Path, graph: str, path: Path | None) -> None:
    """Set a graph's hash in the manifest, or take the graph out."""
    data = json.loads((bundle / "manifest.json").read_text())
    if path is None:
        del data["files"][graph]
    else:
        data["files"][graph] = sha256_file(path)
    (bundle / "manifest.json").write_text(json.dumps(data))


def fuse(bundle: Path) -> None:
    """Put an operator into the packed graph that TensorRT does not know."""
    model = onnx.load(graph_of(bundle))
    erf = next(node for node in model.graph.node if node.op_type == "Erf")
    erf.op_type, erf.domain, erf.name = "Gelu", "com.microsoft", "fused_gelu"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, graph_of(bundle))
    record(bundle, "onnx/model_packed.onnx", graph_of(bundle))


def test_check_names_the_node_of_a_contrib_operator(bundle: Path, capsys: Any):
    fuse(bundle)
    assert run(bundle, "--check") == 2
    captured = capsys.readouterr()
    assert "onnx/model_packed.onnx" in captured.err
    assert "Gelu fused_gelu: its domain is com.microsoft" in captured.out
    assert run(bundle, "--precision", "fp32") == 2
    assert "model_packed.onnx is not suitable for TensorRT: Gelu fused_gelu" in capsys.readouterr().err


def test_check_passes_over_a_graph_beside_which_there_is_a_fit_one(bundle: Path, capsys: Any):
    other = graph_of(bundle).with_name("model_packed_gpu.onnx")
    shutil.copy(graph_of(bundle), other)
    fuse(bundle)
    record(bundle, "onnx/model_packed_gpu.onnx", other)
    assert run(bundle, "--check") == 0
    breaches = {g["graph"]: len(g["breaches"]) for g in json.loads(capsys.readouterr().out)["graphs"]}
    assert breaches["onnx/model_packed.onnx"] > 0
    assert breaches["onnx/model_packed_gpu.onnx"] == 0
    other.unlink()
    record(bundle, "onnx/model_packed_gpu.onnx", None)
    assert run(bundle, "--check") == 2
    assert run(bundle, "--check", "--padded") == 0


@pytest.mark.parametrize("padded", [False, True])
def test_a_script_folder_builds_and_proves_what_the_bundle_holds(bundle, texts, tmp_path, capsys, padded):
    folder = tmp_path / "target"
    options = ("--precision", "fp32", "--script", folder, "--parity-texts", texts)
    assert run(bundle, *options, *(["--padded"] if padded else [])) == 0
    assert "trtexec --onnx=model" in capsys.readouterr().err
    graph, output = ("model.onnx", "sentence_embedding") if padded else ("model_packed.onnx", "embedding")
    written = {"build_engine.py", "prove_plan.py", "request.json", "samples.npz", graph}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / graph).read_bytes() == (bundle / "onnx" / graph).read_bytes()
    assert (folder / "prove_plan.py").read_bytes() == Path(prove_plan.__file__).read_bytes()
    request = read_request(folder / "request.json")
    assert (request.layout, request.timing_cache) == ("padded" if padded else "packed", "timing.cache")
    held = [profile["input_ids"] for profile in request.profiles]
    session = onnxruntime.InferenceSession(str(folder / graph), providers=["CPUExecutionProvider"])
    stored = np.load(folder / "samples.npz")
    assert str(stored["output"]) == output
    batches = range(int(stored["batches"]))
    assert sum(stored[f"{i}/vectors"].shape[0] for i in batches) == len(TEXTS)
    for i in batches:
        prefix = f"{i}/input/"
        feed = {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
        shape = feed["input_ids"].shape
        assert any(all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True)) for low, _, high in held)
        (found,), vectors = session.run([output], feed), stored[f"{i}/vectors"]
        np.testing.assert_allclose(found.reshape(-1, vectors.shape[1])[stored[f"{i}/slots"]], vectors, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"vector_type": VectorType.BINARY}, {"vector_type": VectorType.INT8, "int8_scale": 0.01}]
)
def test_the_short_proof_holds_rounded_vectors_to_the_floor_of_their_type(bundle: Path, tmp_path: Path, changes: Any):
    manifest = read_manifest(bundle)
    graph = choose_graph(bundle, manifest, Options(precision=Precision.FP32))
    reference = Reference.load(resolve(str(bundle)))
    reference = replace(reference, spec=replace(reference.spec, normalize=True, **changes))
    write_samples(tmp_path / "samples.npz", bundle, reference, graph, TEXTS, Precision.FP32)
    floor = float(np.load(tmp_path / "samples.npz")["floor"])
    assert floor == Floors.of(Precision.FP32, reference.spec).reference
    assert floor < Floors.of(Precision.FP32, manifest.encoder).reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision fp16", r"no packed graph in fp16; it has onnx/model_packed.onnx \(fp32\).*--precision fp16"),
        ("--precision fp32 --engine onnxruntime-cuda", "CUDAExecutionProvider"),
        ("--check --script {folder}", "exclude each other"),
        ("--engine onnxruntime-cuda --padded", "runs packed graphs"),
        ("--ragged --padded", "--ragged is for packed plans"),
        ("--precision fp32 --script {folder} --workspace 0", "workspace_gib is 0.0"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_reference_vectors(bundle, tmp_path, capsys, options, message):
    assert run(bundle, *options.format(folder=tmp_path / "s").split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL)
    assert "reference vectors" not in error


def test_a_damaged_bundle_is_refused(bundle: Path, capsys: Any):
    graph_of(bundle).write_bytes(graph_of(bundle).read_bytes()[:-10])
    assert run(bundle, "--check") == 2
    assert "corrupted" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_real_gpu_builds_proves_and_serves_a_plan(bundle: Path, texts: Path, capsys: Any):
    if find_spec("tensorrt") is None or shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU and the extra tensorrt")
    assert run(bundle, "--precision", "fp32", "--parity-texts", texts, "--level", 1) == 0, capsys.readouterr().err
    with (
        Encoder.load(bundle, engine="tensorrt", precision="fp32") as encoder,
        Encoder.load(bundle, engine="onnxruntime", precision="fp32") as plain,
    ):
        np.testing.assert_allclose(encoder.encode(TEXTS), plain.encode(TEXTS), atol=2e-3)
