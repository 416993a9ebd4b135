"""An encoder to a bundle: graphs, proofs, canaries, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from export.graphs import EXTERNAL_DATA_BYTES, Graph, export_graphs
from export.parity import Expected, prove_packed, prove_padded
from export.texts import CANARIES, parity_texts
from mirror_runtime import __version__
from mirror_runtime.bundle import (
    CANARIES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Artifact,
    Canaries,
    Canary,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Parity,
    Pooling,
    Precision,
    fingerprint,
    sha256_file,
    write_json,
)
from mirror_runtime.engines import installed
from mirror_runtime.errors import EngineError, InputError, MissingExtra
from mirror_runtime.folders import whole_folder
from mirror_runtime.host import has_bf16
from training.layout import write_layout
from training.reference import Reference
from training.source import resolve

WEIGHTS_FILE = "model.safetensors"
PRECISIONS = (Precision.FP32, Precision.BF16)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export and where to.

    Attributes:
        encoder: a run folder, a sentence-transformers folder, a plain Hugging Face folder, or a hub name.
        output: the bundle to be.
        revision: of a hub name.
        pooling: needed where the encoder records none.
        max_tokens: replaces the recorded length limit.
        precisions: what must be proven besides fp32; None proves bf16 where this machine can.
        texts: what to prove on; None takes the built-in ones.
        overwrite: replace an existing bundle.
        external_data_bytes: graphs larger than this keep their weights beside them.
    """

    encoder: str
    output: Path
    revision: str | None = None
    pooling: Pooling | None = None
    max_tokens: int | None = None
    precisions: tuple[Precision, ...] | None = None
    texts: tuple[str, ...] | None = None
    overwrite: bool = False
    external_data_bytes: int = EXTERNAL_DATA_BYTES


def build(request: Request, on_stage: Callable[[str], None] = lambda _: None) -> Manifest:
    """Export an encoder, prove every artifact, and write the bundle whole or not at all.

    Args:
        request: what to export.
        on_stage: called with the name of each stage as it begins.

    Returns:
        The manifest that was written.

    Raises:
        BundleError: the encoder cannot be loaded or its pooling cannot be fused.
        ParityError: an artifact's vectors differ from the reference, or are not finite. Nothing is left behind.
        EngineError: an engine that must be proven cannot run here.
        InputError: the output exists, cannot be written, or is being written by another process.
    """
    pairs = _pairs(request.precisions)
    on_stage("load")
    source = resolve(request.encoder, revision=request.revision, pooling=request.pooling, max_tokens=request.max_tokens)
    reference = Reference.load(source)
    with whole_folder(request.output, overwrite=request.overwrite, marker=MANIFEST_FILE) as folder:
        try:
            return _fill(folder, reference, pairs, request, on_stage)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{request.output} cannot be written: {reason}") from error


def _fill(
    folder: Path,
    reference: Reference,
    pairs: tuple[tuple[EngineName, Precision], ...],
    request: Request,
    on_stage: Callable[[str], None],
) -> Manifest:
    spec = reference.spec
    write_layout(folder, model=reference.model, tokenizer=reference.tokenizer, spec=spec, card="")
    onnx_folder = folder / "onnx"
    onnx_folder.mkdir()
    on_stage("export padded graph")
    graphs: dict[Layout, Graph] = {}
    for graph in export_graphs(reference.model, spec, onnx_folder, external_data_bytes=request.external_data_bytes):
        graphs[graph.layout] = graph
        if graph.layout is Layout.PADDED:
            on_stage("export packed graph")
    on_stage("reference vectors")
    expected = Expected.of(reference, request.texts or parity_texts())
    on_stage("prove padded graph")
    padded = prove_padded(graphs[Layout.PADDED], expected)
    artifacts = [_artifact(folder, graphs[Layout.PADDED], EngineName.ONNXRUNTIME, Precision.FP32, padded)]
    for engine, precision in pairs:
        on_stage(f"prove packed graph, {engine.value} {precision.value}")
        parity = prove_packed(folder, graphs[Layout.PACKED], engine, precision, expected)
        artifacts.append(_artifact(folder, graphs[Layout.PACKED], engine, precision, parity))
    on_stage("manifest")
    vectors = reference.encode(CANARIES)
    canaries = (
        Canary(text=text, vector=tuple(float(f"{x:.8g}") for x in vector))
        for text, vector in zip(CANARIES, vectors, strict=True)
    )
    write_json(Canaries(canaries=tuple(canaries)), folder / CANARIES_FILE)
    # Again, now that the card can state what was measured; the weights are written once.
    (folder / "README.md").write_text(
        (folder / "README.md").read_text(encoding="utf-8") + _card(spec, artifacts), encoding="utf-8"
    )
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"mirror-runtime {__version__}",
        encoder=spec,
        fingerprint=fingerprint(spec, files[WEIGHTS_FILE], files[TOKENIZER_FILE]),
        files=files,
        artifacts=tuple(artifacts),
    )
    write_json(manifest, folder / MANIFEST_FILE)
    return manifest


def _pairs(asked: tuple[Precision, ...] | None) -> tuple[tuple[EngineName, Precision], ...]:
    """List the engines and precisions to prove the packed graph with, ONNX Runtime in fp32 always."""
    unknown = [precision.value for precision in asked or () if precision not in PRECISIONS]
    if unknown:
        raise InputError(f"precision {', '.join(unknown)} cannot be exported yet: choose fp32 or bf16")
    pairs = [(EngineName.ONNXRUNTIME, Precision.FP32)]
    openvino = installed(EngineName.OPENVINO)
    if asked and Precision.BF16 in asked:
        if not openvino:
            raise MissingExtra("openvino", "openvino")
        if not has_bf16():
            raise EngineError("bf16 cannot be proven here: this CPU has neither avx512_bf16 nor amx_bf16. Leave it out")
    if openvino:
        pairs.append((EngineName.OPENVINO, Precision.FP32))
        if has_bf16() and (asked is None or Precision.BF16 in asked):
            pairs.append((EngineName.OPENVINO, Precision.BF16))
    return tuple(pairs)


def _artifact(folder: Path, graph: Graph, engine: EngineName, precision: Precision, parity: Parity) -> Artifact:
    return Artifact(
        path=graph.path.relative_to(folder).as_posix(),
        engine=engine,
        precision=precision,
        layout=graph.layout,
        inputs=graph.inputs,
        outputs=graph.outputs,
        size=sum(file.stat().st_size for file in graph.path.parent.glob(f"{graph.path.name}*")),
        parity=parity,
        toolchain=_versions("torch", "transformers", "onnx", engine.value),
    )


def _versions(*packages: str) -> Mapping[str, str]:
    return {package: version(package) for package in packages}


def _card(spec: EncoderSpec, artifacts: list[Artifact]) -> str:
    rows = "\n".join(
        f"| {a.engine.value} | {a.precision.value} | {a.layout.value} | {a.parity.min_cosine:.6f} | "
        f"{a.parity.mean_cosine:.6f} | {a.parity.max_abs_diff:.1e} |"
        for a in artifacts
    )
    parity = artifacts[0].parity
    return f"""
# {spec.base_model}, exported

{spec.dim} numbers a text, pooling {spec.pooling.value}, {"unit length" if spec.normalize else "not normalised"}, \
texts of up to {spec.max_tokens} tokens. The pooled head is inside the graphs.

Compared with {parity.reference} on {parity.texts:,} ragged texts (sha256 {parity.texts_sha256[:16]}…):

| engine | precision | layout | worst cosine | mean cosine | largest difference |
|---|---|---|---|---|---|
{rows}

```python
from mirror_runtime import Encoder
vectors = Encoder.load("path/to/this/folder").encode(["some text"])

from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("path/to/this/folder").encode(["some text"])
```
"""
