"""Build a bundle from an encoder: graphs, certificates, canaries, card, manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from encoders.depth import at_depth
from encoders.reference import Reference
from encoders.source import HeadSpec, ResolvedEncoder, resolve
from encoders.write import write_layout
from evaluation.probes import Probe
from evaluation.sets import EvaluationSet
from export.bundle.card import WHITENING_FILE, WITNESS_FILE, ProbeCost, ProbeCosts, write_card
from export.bundle.head_options import HeadOptions, extend_head
from export.graph.trace import export_graphs, graph_files
from export.precision.variants import VARIANTS, provers, write_aliases, write_variant
from export.proof import witness
from export.proof.candidate import Candidate
from export.proof.own_texts import OwnTexts
from export.proof.parity import Expected, prove_artifact
from export.proof.proof_texts import CANARIES
from mirror_runtime import __version__
from mirror_runtime.bundle import (
    CANARIES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Artifact,
    Canaries,
    Canary,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Pooling,
    Precision,
    fingerprint,
    hash_files,
    write_json,
)
from mirror_runtime.engines import installed
from mirror_runtime.errors import EngineError, InputError, MissingExtra, ParityError
from mirror_runtime.folders import whole_folder
from mirror_runtime.host import has_bf16
from mirror_runtime.pairs import canary_items

OnProgress = Callable[[str], None]
"""Called with the name of each stage as it begins."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export, and where to."""

    encoder: str  # see `resolve`, like revision, pooling, head and max_tokens
    output: Path
    revision: str | None = None
    pooling: Pooling | None = None
    head: HeadSpec | None = None
    depth: int | None = None  # number of first layers to keep; None for all
    head_options: HeadOptions = field(default_factory=HeadOptions)
    max_tokens: int | None = None
    # Besides fp32; fp16 beside int8 also makes the int8 file for GPUs. None also proves the fp32 file in bf16, where
    # OpenVINO is installed and the CPU has bf16.
    precisions: tuple[Precision, ...] | None = None
    calibration: tuple[str, ...] | None = None  # texts to measure the scales of int8 and fp8 on; None: built-in ones
    texts: tuple[str, ...] | None = None  # to prove on, in addition to the canaries; None: built-in ones
    sets: tuple[EvaluationSet, ...] = ()  # scored pairs on which no artifact may lose quality
    probes: tuple[Probe, ...] = ()  # on the user's own texts: what each artifact costs there is recorded
    max_probe_loss: float | None = None  # points that an artifact may surely lose on one; None for any number
    overwrite: bool = False
    accept_difference: bool = False  # go on where sentence-transformers reads other vectors from the same folder


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An artifact that is left out of the bundle because it missed its floor or its engine failed."""

    name: str
    requested: bool  # whether the request named its precision
    reason: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """A written bundle, and the artifacts left out of it."""

    manifest: Manifest
    refused: tuple[Refused, ...]
    costs: ProbeCosts  # of the artifacts, on the user's own texts


def build(request: Request, on_progress: OnProgress = lambda _: None) -> Export:
    """Export an encoder, prove every artifact, and write the bundle whole or not at all.

    Everything else is derived from the fp32 graphs on ONNX Runtime: if one of them misses its floor, no bundle is
    written. Any other artifact that misses its floor is left out.

    Args:
        request: what to export.
        on_progress: called with the name of each stage as it begins.

    Raises:
        BundleError: the encoder cannot be loaded or its pooling cannot be fused.
        ParityError: the fp32 vectors differ from the reference or are not finite, or sentence-transformers computes
            other vectors from the same folder. Nothing is written.
        EngineError: an engine that must be proven cannot run here.
        InputError: the output exists, cannot be written, or is being written by another process.
    """
    pairs = _pairs(request.precisions)
    on_progress("load")
    source = resolve(
        request.encoder,
        revision=request.revision,
        pooling=request.pooling,
        head=request.head,
        max_tokens=request.max_tokens,
        text_vectors=False,
    )
    if source.spec.scores_pairs or source.spec.per_token:
        _check_unusual(request, source.spec)
    whole = Reference.load(source)
    reference = whole if request.depth is None else at_depth(whole, request.depth)
    if reference.is_static:
        pairs = tuple(pair for pair in pairs if Precision.FP32 in pair)
    testimony = None
    if source.published is not None and witness.available(source.spec.family):
        on_progress(f"compare with {witness.library(source.spec.family)}")
        testimony = witness.question(source.published, whole)
        if testimony is not None and testimony.problem and not request.accept_difference:
            raise ParityError(
                f"{testimony.version} computes other vectors from {request.encoder}: "
                f"{testimony.problem}. Find the setting that one of us reads otherwise, or keep our vectors with "
                "--accept-difference, which the card will state"
            )
    if request.probes:
        on_progress("probes of your own texts")
    own = OwnTexts.of(reference, request.probes, request.max_probe_loss)
    if request.head_options != HeadOptions():
        on_progress("extend the head")
    reference, whitening = extend_head(reference, request.head_options)
    with whole_folder(request.output, overwrite=request.overwrite, marker=MANIFEST_FILE) as folder:
        if whitening is not None:
            write_json(whitening, folder / WHITENING_FILE)
        if testimony is not None:
            write_json(testimony, folder / WITNESS_FILE)
        return _fill(folder, reference, source, pairs, own, request, on_progress)


def _fill(
    folder: Path,
    reference: Reference,
    source: ResolvedEncoder,
    pairs: tuple[tuple[EngineName, Precision], ...],
    own: OwnTexts,
    request: Request,
    on_progress: OnProgress,
) -> Export:
    """Export and prove an encoder, and write all files of its bundle to an unfinished folder."""
    spec = reference.spec
    write_layout(
        folder,
        model=reference.model,
        tokenizer=reference.tokenizer,
        spec=spec,
        dense=reference.dense,
        prompts=source.prompts,
        terms=source.card.terms,
        card=source.card.story,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"mirror-runtime {__version__}",
        encoder=spec,
        fingerprint=fingerprint(spec, hash_files(folder)),
        files={},
        artifacts=(),
    )
    (folder / "onnx").mkdir()
    on_progress("export padded and packed graph")
    graphs = export_graphs(reference, folder / "onnx")
    on_progress("reference vectors")
    expected = Expected.of(reference, request.texts, request.sets)
    artifacts: list[Artifact] = []
    costs: list[ProbeCost] = []
    refused: list[Refused] = []

    def refuse(name: str, precision: Precision, error: Exception) -> None:
        requested = precision in (request.precisions or ())
        refused.append(Refused(name=name, requested=requested, reason=str(error)))

    def prove(candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            on_progress(f"prove {candidate}")
            try:
                parity = prove_artifact(folder, candidate, manifest, expected)
                found = own.costs(folder, candidate, manifest)
            except (ParityError, EngineError) as error:
                if (candidate.engine, candidate.precision) == (EngineName.ONNXRUNTIME, Precision.FP32):
                    raise
                refuse(str(candidate), candidate.precision, error)
            else:
                artifacts.append(candidate.certified(folder, parity))
                costs.extend(found)

    prove([Candidate(graphs[Layout.PADDED], *pairs[0]), *(Candidate(graphs[Layout.PACKED], *pair) for pair in pairs)])
    for precision in [precision for precision in VARIANTS if precision in (request.precisions or ())]:
        on_progress(f"write {precision.value}")
        try:
            written = list(
                write_variant(
                    folder,
                    graphs,
                    precision,
                    spec=spec,
                    calibration=request.calibration,
                    gpu=Precision.FP16 in (request.precisions or ()),
                )
            )
        except EngineError as error:
            refuse(precision.value, precision, error)
        else:
            proving = ((graph, engine) for graph in written for engine in provers(graph, precision))
            prove(Candidate(graph, engine, precision) for graph, engine in proving if installed(engine))
    _keep_proven(folder, artifacts)
    on_progress("manifest")
    _write_canaries(folder, expected, spec)
    record = own.write(folder, costs)
    manifest = dataclasses.replace(manifest, artifacts=tuple(artifacts))
    write_card(folder, manifest)
    manifest = dataclasses.replace(manifest, files=hash_files(folder))
    write_json(manifest, folder / MANIFEST_FILE)
    return Export(manifest=manifest, refused=tuple(refused), costs=record)


def _check_unusual(request: Request, spec: EncoderSpec) -> None:
    """Refuse what is made for vectors of texts alone: of a reranker, and of an encoder with vectors of tokens."""
    what, has = (
        ("pooling tokens", "no vector of a text") if spec.per_token else ("a reranker", "one score and no vectors")
    )
    if request.head_options != HeadOptions() or request.probes:
        raise InputError(f"{what} has {has}: leave out --whiten, --dim, --vector-type and --own")
    if low := {Precision.INT8, Precision.FP8} & set(request.precisions or ()):
        raise InputError(f"{what} is not quantised to {min(low).value}: choose fp32, bf16 or fp16")
    if spec.per_token and request.sets:
        raise InputError(f"{what} has {has} to compare with another's: leave out --sts")


def _pairs(requested: tuple[Precision, ...] | None) -> tuple[tuple[EngineName, Precision], ...]:
    """List the engines and precisions to prove the packed fp32 graph with; ONNX Runtime in fp32 always comes first."""
    pairs = [(EngineName.ONNXRUNTIME, Precision.FP32)]
    openvino = installed(EngineName.OPENVINO)
    if requested and Precision.BF16 in requested:
        if not openvino:
            raise MissingExtra("openvino", "openvino")
        if not has_bf16():
            raise EngineError(
                "bf16 cannot be proven on this CPU, which has neither avx512_bf16 nor amx_bf16: leave it out"
            )
    if openvino:
        pairs.append((EngineName.OPENVINO, Precision.FP32))
        if has_bf16() and requested is None:  # a request for bf16 gets a file of its own
            pairs.append((EngineName.OPENVINO, Precision.BF16))
    return tuple(pairs)


def _keep_proven(folder: Path, artifacts: Iterable[Artifact]) -> None:
    """Remove the graphs without a proven artifact, and write the additional names of the proven padded ones."""
    proven = {part for artifact in artifacts for part in graph_files(folder / artifact.path)}
    for path in set((folder / "onnx").iterdir()) - proven:
        path.unlink()
    for artifact in artifacts:
        if artifact.layout is Layout.PADDED:
            write_aliases(folder / artifact.path, artifact.precision)


def _write_canaries(folder: Path, expected: Expected, spec: EncoderSpec) -> None:
    vectors = dict(zip(expected.texts, expected.means, strict=True))
    items = zip(CANARIES, canary_items(spec, CANARIES), strict=True)
    canaries = (Canary(text=text, vector=tuple(float(f"{x:.8g}") for x in vectors[item])) for text, item in items)
    write_json(Canaries(canaries=tuple(canaries)), folder / CANARIES_FILE)
