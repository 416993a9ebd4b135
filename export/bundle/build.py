"""An encoder to a bundle: graphs, certificates, canaries, card, manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from encoders.reference import Reference
from encoders.source import Head, resolve
from encoders.write import write_layout
from evaluation.sets import EvaluationSet
from export.bundle.card import write_card
from export.bundle.head_options import HeadOptions, add, write_fitted
from export.graph.trace import EXTERNAL_DATA_BYTES, Graph, export_graphs, parts
from export.precision.variants import VARIANTS, provers, write_aliases, write_variant
from export.proof.parity import Candidate, Expected, prove_artifact
from export.proof.proof_texts import CANARIES, parity_texts
from mirror_runtime import __version__
from mirror_runtime.bundle import (
    CANARIES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Artifact,
    Canaries,
    Canary,
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
from mirror_runtime.errors import EngineError, InputError, MissingExtra, ParityError
from mirror_runtime.folders import whole_folder
from mirror_runtime.host import has_bf16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export and where to.

    Attributes:
        encoder: a run folder, a sentence-transformers folder, a plain Hugging Face folder, or a hub name.
        output: the bundle to be.
        revision: of a hub name.
        pooling: needed where the encoder records none.
        head: what else is said of a head that the encoder does not record.
        additions: what is added behind it.
        max_tokens: replaces the recorded length limit.
        precisions: what must be proven besides fp32; None proves bf16 where this machine can.
        calibration: texts to find the scales of int8 and fp8 on; None takes the built-in ones.
        texts: what to prove on besides the canaries; None takes the built-in ones.
        sets: scored pairs on which no artifact may lose quality.
        overwrite: replace an existing bundle.
        external_data_bytes: graphs larger than this keep their weights beside them.
    """

    encoder: str
    output: Path
    revision: str | None = None
    pooling: Pooling | None = None
    head: Head | None = None
    additions: HeadOptions = field(default_factory=HeadOptions)
    max_tokens: int | None = None
    precisions: tuple[Precision, ...] | None = None
    calibration: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None
    sets: tuple[EvaluationSet, ...] = ()
    overwrite: bool = False
    external_data_bytes: int = EXTERNAL_DATA_BYTES


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An artifact that is not in the bundle, since it missed its floor or its engine failed.

    Attributes:
        name: its engine, precision and layout.
        asked: whether the request named its precision.
        reason: what it missed, and the worst texts.
    """

    name: str
    asked: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """A written bundle.

    Attributes:
        manifest: as it was written.
        refused: what was left out.
    """

    manifest: Manifest
    refused: tuple[Refused, ...]


def build(request: Request, on_stage: Say = lambda _: None, *, reference: Reference | None = None) -> Export:
    """Export an encoder, prove every artifact, and write the bundle whole or not at all.

    The fp32 graphs on ONNX Runtime are the ground that everything else stands on: where one of them misses its floor
    there is no bundle. Any other artifact that misses its own is left out, and the rest stays whole.

    Args:
        request: what to export.
        on_stage: called with the name of each stage as it begins.
        reference: the encoder, loaded already; `request.encoder` and what replaces its settings are then not read.

    Returns:
        What was written, and what was refused.

    Raises:
        BundleError: the encoder cannot be loaded or its pooling cannot be fused.
        ParityError: the fp32 vectors differ from the reference, or are not finite. Nothing is left behind.
        EngineError: an engine that must be proven cannot run here.
        InputError: the output exists, cannot be written, or is being written by another process.
    """
    pairs = _pairs(request.precisions)
    if reference is None:
        on_stage("load")
        source = resolve(
            request.encoder,
            revision=request.revision,
            pooling=request.pooling,
            head=request.head,
            max_tokens=request.max_tokens,
        )
        reference = Reference.load(source)
    if request.additions != HeadOptions():
        on_stage("extend the head")
    reference, fitted = add(reference, request.additions)
    with whole_folder(request.output, overwrite=request.overwrite, marker=MANIFEST_FILE) as folder:
        try:
            if fitted is not None:
                write_fitted(fitted, folder)
            return _fill(folder, reference, pairs, request, on_stage)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{request.output} cannot be written: {reason}") from error


def _fill(
    folder: Path,
    reference: Reference,
    pairs: tuple[tuple[EngineName, Precision], ...],
    request: Request,
    on_stage: Say,
) -> Export:
    spec = reference.spec
    write_layout(
        folder, model=reference.model, tokenizer=reference.tokenizer, spec=spec, dense=reference.dense, card=""
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"mirror-runtime {__version__}",
        encoder=spec,
        fingerprint=fingerprint(spec, _hashes(folder)),
        files={},
        artifacts=(),
    )
    (folder / "onnx").mkdir()
    on_stage("export padded and packed graph")
    graphs = export_graphs(reference, folder / "onnx", external_data_bytes=request.external_data_bytes)
    on_stage("reference vectors")
    expected = Expected.of(reference, request.texts or parity_texts(), request.sets)
    artifacts: list[Artifact] = []
    refused: list[Refused] = []

    def refuse(name: str, precision: Precision, error: Exception) -> None:
        refused.append(Refused(name=name, asked=precision in (request.precisions or ()), reason=str(error)))

    def prove(candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            on_stage(f"prove {candidate}")
            try:
                parity = prove_artifact(folder, candidate, manifest, expected)
            except (ParityError, EngineError) as error:
                if (candidate.engine, candidate.precision) == (EngineName.ONNXRUNTIME, Precision.FP32):
                    raise
                refuse(str(candidate), candidate.precision, error)
            else:
                artifacts.append(_artifact(folder, candidate, parity))

    prove(_fp32_files(folder, graphs, pairs))
    for precision in [precision for precision in VARIANTS if precision in (request.precisions or ())]:
        on_stage(f"write {precision.value}")
        try:
            written = list(
                write_variant(
                    folder,
                    graphs,
                    precision,
                    spec=spec,
                    calibration=request.calibration,
                    external_data_bytes=request.external_data_bytes,
                    gpu=Precision.FP16 in (request.precisions or ()),
                )
            )
        except EngineError as error:
            refuse(precision.value, precision, error)
        else:
            prove(_variant_files(folder, written, precision))
    _keep_proven(folder, artifacts)
    on_stage("manifest")
    _write_canaries(folder, expected)
    manifest = dataclasses.replace(manifest, artifacts=tuple(artifacts))
    write_card(folder, manifest)
    manifest = dataclasses.replace(manifest, files=_hashes(folder))
    write_json(manifest, folder / MANIFEST_FILE)
    return Export(manifest=manifest, refused=tuple(refused))


def _fp32_files(
    folder: Path, graphs: Mapping[Layout, Graph], pairs: tuple[tuple[EngineName, Precision], ...]
) -> Iterator[Candidate]:
    """List what the fp32 files are to be proven with, ONNX Runtime first."""
    padded, packed = graphs[Layout.PADDED], graphs[Layout.PACKED]
    yield Candidate.of(folder, padded, EngineName.ONNXRUNTIME, Precision.FP32)
    for engine, precision in pairs:
        yield Candidate.of(folder, packed, engine, precision)


def _variant_files(folder: Path, graphs: Iterable[Graph], precision: Precision) -> Iterator[Candidate]:
    """List what the files of another precision are to be proven with."""
    for graph in graphs:
        for engine in provers(graph, precision):
            if installed(engine):
                yield Candidate.of(folder, graph, engine, precision)


def _pairs(asked: tuple[Precision, ...] | None) -> tuple[tuple[EngineName, Precision], ...]:
    """List the engines and precisions to prove the packed graph with, ONNX Runtime in fp32 always."""
    pairs = [(EngineName.ONNXRUNTIME, Precision.FP32)]
    openvino = installed(EngineName.OPENVINO)
    if asked and Precision.BF16 in asked:
        if not openvino:
            raise MissingExtra("openvino", "openvino")
        if not has_bf16():
            raise EngineError("bf16 cannot be proven here: this CPU has neither avx512_bf16 nor amx_bf16. Leave it out")
    if openvino:
        pairs.append((EngineName.OPENVINO, Precision.FP32))
        if has_bf16() and asked is None:  # where bf16 is asked for, it has a file of its own
            pairs.append((EngineName.OPENVINO, Precision.BF16))
    return tuple(pairs)


def _artifact(folder: Path, candidate: Candidate, parity: Parity) -> Artifact:
    path = folder / candidate.path
    return candidate.certified(
        parity,
        path=candidate.path,
        size=sum(file.stat().st_size for file in parts(path)),
        toolchain={name: version(name) for name in ("torch", "transformers", "onnx", candidate.engine.value)},
    )


def _keep_proven(folder: Path, artifacts: Iterable[Artifact]) -> None:
    """Remove the graphs that no artifact has proven, and give those that have been the names that others look for."""
    proven = {part for artifact in artifacts for part in parts(folder / artifact.path)}
    for path in set((folder / "onnx").iterdir()) - proven:
        path.unlink()
    for artifact in artifacts:
        if artifact.layout is Layout.PADDED:
            write_aliases(folder / artifact.path, artifact.precision)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _write_canaries(folder: Path, expected: Expected) -> None:
    vectors = dict(zip(expected.texts, expected.vectors, strict=True))
    canaries = (Canary(text=text, vector=tuple(float(f"{x:.8g}") for x in vectors[text])) for text in CANARIES)
    write_json(Canaries(canaries=tuple(canaries)), folder / CANARIES_FILE)
