"""Turn a bundle's graph into a proven TensorRT artifact, or into a folder from which a GPU container builds one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.update import add_artifacts, updating
from export.graph.trace import Graph, graph_files, signature_of
from export.precision.half_precision import HALVES
from export.proof.candidate import Candidate, padded_feed
from export.proof.floors import Floors
from export.proof.parity import Expected, prove_artifact
from export.proof.proof_texts import parity_texts
from export.tensorrt import builder, prove_plan, ragged
from export.tensorrt.builder import BuildRequest, Profile
from export.tensorrt.checks import RULES, breaches, graph_precision
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import (
    TOKENIZER_FILE,
    Artifact,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Precision,
    TensorSpec,
    check_files,
    read_manifest,
    sha256_file,
)
from mirror_runtime.engines import load_engine
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.folders import whole_folder
from mirror_runtime.gpu import this_gpu
from mirror_runtime.packing import TOKEN_BUDGET, ShapeSet, pack, runs
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer

FOLDER = "tensorrt"
SCRIPT_FILE = "build_engine.py"

SHOWN = 5
"""Breaches quoted in an error message; the others are counted."""

PADDED_BATCH = (1, 8, 32)
"""Smallest, usual and largest number of texts in a batch of a padded engine."""

FIRST_BUCKET = 32
"""Longest text of the first padded profile, in tokens; it doubles from one profile to the next."""

SAMPLES = 48
"""Texts stored for the proof on another machine, spread over the lengths of the parity texts."""

OnProgress = Callable[[str], None]
"""Called with each line of progress."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build a plan; see `BuildRequest` for what is not described here."""

    precision: Precision
    layout: Layout = Layout.PACKED
    batch_tokens: tuple[int, ...] = ()  # of full batches, besides `TOKEN_BUDGET`: their packed shapes get profiles too
    level: int = 3
    workspace_gib: float | None = None
    version_compatible: bool = False
    hardware: str = "none"
    timing_cache: Path | None = None
    ragged: bool = False  # attention over ragged texts in place of the block mask: see `ragged`


def check_bundle(bundle: Path) -> list[dict[str, object]]:
    """Check every ONNX file of a bundle against the rules.

    Returns:
        A report for each file, with its layout, precision and breaches. A plan needs one file without breaches; others
        may have them, such as an int8 file for CPUs, which also quantises its tables.

    Raises:
        BundleError: the folder is not a bundle, or is damaged.
        EngineError: a file cannot be read.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    reports = []
    for path in _graphs(manifest):
        view = GraphView.load(bundle / path)
        found: dict[str, object] = {"graph": path, "rules": list(RULES), "breaches": breaches(view)}
        layout, precision = _layout(view.inputs), graph_precision(view)
        reports.append({**found, "layout": layout.value, "precision": precision.value})
    return reports


def choose_graph(bundle: Path, manifest: Manifest, options: Options) -> Graph:
    """Find the bundle's graph of the requested layout and precision, and check it.

    Under strong typing the file's types are the engine's: a graph of another precision never takes its place.

    Raises:
        EngineError: there is none, or it breaks a rule; the message names the first breaches with their nodes.
    """
    others: list[str] = []
    refused = ""
    for path in _graphs(manifest):
        view = GraphView.load(bundle / path)
        if _layout(view.inputs) is not options.layout:
            continue
        precision = graph_precision(view)
        others.append(f"{path} ({precision.value})")
        if precision is not options.precision:
            continue
        found = breaches(view)
        if not found:
            contract = signature_of(view.proto)
            return Graph(layout=options.layout, path=bundle / path, inputs=contract.inputs, outputs=contract.outputs)
        # Another file may be suitable: int8 graphs for CPUs also quantise their tables.
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        refused = refused or f"{Path(path).name} is not suitable for TensorRT: {'; '.join(found[:SHOWN])}{more}"
    raise EngineError(
        refused
        or f"{bundle} has no {options.layout.value} graph in {options.precision.value}; it has "
        f"{', '.join(others) or 'none'}. Export one with export/to_onnx.py --precision {options.precision.value}, "
        "or choose another precision"
    )


def request_for(graph: Graph, spec: EncoderSpec, options: Options) -> BuildRequest:
    """Create the build request of a graph; its file names are relative to the graph's folder.

    Raises:
        EngineError: a setting is out of range.
    """
    if options.layout is Layout.PADDED:
        profiles = padded_profiles(graph.inputs, spec.max_tokens)
    else:
        # The runtime's own budget is always included: it applies where no plan names another.
        budgets = sorted({TOKEN_BUDGET, *options.batch_tokens})
        shapes = dict.fromkeys(shape for budget in budgets for shape in packed_shape_set(spec, budget).shapes())
        profiles = packed_profiles(graph.inputs, shapes)
    try:
        return BuildRequest(
            onnx=graph.path.name,
            onnx_sha256=sha256_file(graph.path),
            plan=f"{graph.path.stem}.plan",
            precision=options.precision.value,
            layout=options.layout.value,
            profiles=profiles,
            level=options.level,
            workspace_gib=options.workspace_gib,
            version_compatible=options.version_compatible,
            hardware=options.hardware,
            timing_cache=None if options.timing_cache is None else str(options.timing_cache.absolute()),
        )
    except builder.BuildError as error:
        raise EngineError(str(error)) from error


def packed_shape_set(spec: EncoderSpec, budget: int = TOKEN_BUDGET) -> ShapeSet:
    """Return the shapes that the runtime packs this encoder's texts into, if no plan names others."""
    return ShapeSet.up_to(spec.pad_to or spec.max_tokens, budget=budget)


def packed_profiles(inputs: Sequence[TensorSpec], shapes: Iterable[tuple[int, int]]) -> tuple[Profile, ...]:
    """Return a static profile (min = opt = max) for each shape that packing can produce."""

    def sizes(tensor: TensorSpec, shape: tuple[int, int]) -> tuple[int, ...]:
        return shape if len(tensor.shape) == 2 else (runs(shape) + 1,)

    return tuple({tensor.name: (sizes(tensor, shape),) * 3 for tensor in inputs} for shape in shapes)


def padded_profiles(inputs: Sequence[TensorSpec], max_tokens: int) -> tuple[Profile, ...]:
    """Return a profile for each bucket of lengths up to `max_tokens`; together they cover every length once.

    TensorRT chooses kernels for a bucket's longest length: clients that pad to it get the measured speed.
    """
    few, usual, many = PADDED_BATCH
    profiles: list[Profile] = []
    shortest, longest = 1, FIRST_BUCKET
    while shortest <= max_tokens:
        longest = min(longest, max_tokens)
        shapes = ((few, shortest), (usual, longest), (many, longest))
        profiles.append({tensor.name: shapes for tensor in inputs})
        shortest, longest = longest + 1, 2 * longest
    return tuple(profiles)


def write_script(
    bundle: Path, folder: Path, options: Options, texts: tuple[str, ...] | None, *, overwrite: bool = False
) -> BuildRequest:
    """Write a folder from which a machine with only TensorRT builds and proves the plan.

    `python build_engine.py` in the folder builds it; some of the texts (None: the built-in ones) prove it there.

    Raises:
        EngineError: the bundle has no such graph, or it breaks a rule.
        InputError: the folder exists or cannot be written.
    """
    manifest = read_manifest(bundle)
    graph = choose_graph(bundle, manifest, options)
    request = replace(request_for(graph, manifest.encoder, options), timing_cache="timing.cache")
    with whole_folder(folder, overwrite=overwrite, marker=builder.REQUEST_FILE) as partial:
        for file in graph_files(graph.path):
            shutil.copy(file, partial / file.name)
        shutil.copy(builder.__file__, partial / SCRIPT_FILE)
        shutil.copy(prove_plan.__file__, partial / f"{builder.PROOF_MODULE}.py")
        reference = Reference.load(resolve(str(bundle)))
        write_samples(
            partial / builder.SAMPLES_FILE, bundle, reference, graph, texts or parity_texts(), options.precision
        )
        builder.write_request(request, partial / builder.REQUEST_FILE)
    return request


def write_samples(
    path: Path, bundle: Path, reference: Reference, graph: Graph, texts: Sequence[str], precision: Precision
) -> None:
    """Store batches of some texts, spread over all lengths, with the reference's vectors and their floor.

    `prove_plan.py` reads them on a machine without this project.
    """
    spec, packed = reference.spec, graph.layout is Layout.PACKED
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chosen = [texts[order[i * len(order) // SAMPLES]] for i in range(SAMPLES)] if len(order) > SAMPLES else list(texts)
    tokenizer = Tokenizer(
        bundle / TOKENIZER_FILE,
        spec.max_tokens,
        LongTexts.TRUNCATE,
        template=spec.template,
        pad_to=spec.pad_to if packed else None,  # the padded graph pads by itself
    )
    tokenized = tokenizer(chosen)
    # Texts with equal tokens share one piece: the first of them stands for it.
    vectors = reference.encode(chosen)[np.unique(tokenized.part_piece, return_index=True)[1]]
    stored: dict[str, NDArray[np.generic] | float | str] = {
        "floor": Floors.of(precision, spec).reference,
        "output": "embedding" if packed else "sentence_embedding",
    }
    batches = list(_packed(tokenized, packed_shape_set(spec)) if packed else _padded(tokenized))
    for index, (feed, slots, pieces) in enumerate(batches):
        stored |= {f"{index}/input/{tensor.name}": feed[tensor.name] for tensor in graph.inputs}
        stored |= {f"{index}/slots": slots, f"{index}/vectors": vectors[pieces]}
    np.savez_compressed(path, batches=len(batches), **stored)


Batch = tuple[dict[str, NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]
"""A graph's inputs, each text's position in the flattened output, and the texts' indices."""


def _packed(tokenized: Tokenized, shape_set: ShapeSet) -> Iterator[Batch]:
    for batch in pack(tokenized.ids, tokenized.lengths, shape_set, unpadded_lengths=tokenized.unpadded_lengths):
        rows = batch.rows
        feed = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "segment_ids": rows.segment_ids}
        yield feed, batch.slots, batch.pieces


def _padded(tokenized: Tokenized) -> Iterator[Batch]:
    usual = PADDED_BATCH[1]
    for texts in np.array_split(np.argsort(tokenized.lengths, kind="stable"), -(-tokenized.lengths.size // usual)):
        yield padded_feed(tokenized, texts), np.arange(texts.size), texts


def build_plan(bundle: Path, options: Options, texts: tuple[str, ...] | None, on_progress: OnProgress) -> Artifact:
    """Build a plan on this machine's GPU, prove it there on texts (None: the built-in ones), and add it to the bundle.

    Raises:
        MissingExtra: tensorrt or cuda.bindings is not installed.
        EngineError: there is no GPU, no such graph, or TensorRT cannot build it.
        ParityError: the plan's vectors are not the reference's; the bundle does not change.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    graph = choose_graph(bundle, manifest, options)
    require("tensorrt", "tensorrt")
    require("cuda.bindings.runtime", "tensorrt")
    request = request_for(graph, manifest.encoder, options)
    with updating(bundle) as staging, TemporaryDirectory() as scratch:
        if options.ragged:
            installed = _check_version(ragged.OLDEST)
            half = HALVES.get(options.precision) if installed >= ragged.ADDS_IN_FP32 else None
            graph = ragged.write_ragged(
                graph, Path(scratch) / f"{graph.path.stem}_ragged.onnx", half, manifest.encoder.pooling
            )
            request = request_for(graph, manifest.encoder, options)
        (staging / FOLDER).mkdir()
        plan = (staging / FOLDER / request.plan).absolute()
        try:
            builder.build(replace(request, plan=str(plan)), graph.path.parent, on_progress=on_progress)
        except builder.BuildError as error:
            raise EngineError(str(error)) from error
        candidate = Candidate(replace(graph, path=plan), EngineName.TENSORRT, options.precision)
        path = f"{FOLDER}/{request.plan}"
        return _prove_and_add(bundle, staging, candidate, manifest, texts, on_progress, "tensorrt", path)


def prove_provider(
    bundle: Path, engine: EngineName, options: Options, texts: tuple[str, ...] | None, on_progress: OnProgress
) -> Artifact:
    """Prove a packed graph with one of ONNX Runtime's GPU providers on this machine, and add it to the bundle.

    Raises:
        MissingExtra: onnxruntime is not installed.
        EngineError: the provider does not start, or the bundle has no such graph.
        ParityError: the vectors are not the reference's; the bundle does not change.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    graph = choose_graph(bundle, manifest, options)
    # Check that the provider is available, before minutes of reference vectors.
    load_engine(engine, options.precision, graph.path, spec=manifest.encoder).close()
    with updating(bundle) as staging:
        candidate = Candidate(graph, engine, options.precision)
        return _prove_and_add(bundle, staging, candidate, manifest, texts, on_progress, "onnxruntime")


def _prove_and_add(
    bundle: Path,
    staging: Path,
    candidate: Candidate,
    manifest: Manifest,
    texts: tuple[str, ...] | None,
    on_progress: OnProgress,
    module: str,
    path: str | None = None,
) -> Artifact:
    on_progress("reference vectors")
    expected = Expected.of_bundle(bundle, texts)
    on_progress(f"prove {candidate}")
    parity = prove_artifact(bundle, candidate, manifest, expected)
    artifact = candidate.certified(bundle, parity, path=path, engine_module=module, gpu=str(this_gpu()))
    add_artifacts(bundle, staging, [artifact])
    return artifact


def _check_version(oldest: tuple[int, int]) -> tuple[int, ...]:
    """Return the version of TensorRT; an `EngineError` where it is older."""
    found = str(require("tensorrt", "tensorrt").__version__)
    numbers = tuple(map(int, found.split(".")[:2]))
    if numbers < oldest:
        raise EngineError(f"--ragged needs TensorRT {'.'.join(map(str, oldest))}, and {found} is installed")
    return numbers


def _graphs(manifest: Manifest) -> list[str]:
    return [path for path in manifest.files if path.endswith(".onnx")]


def _layout(inputs: Container[str]) -> Layout:
    """Return the layout of a graph: packed graphs have segments as an input."""
    return Layout.PACKED if "segment_ids" in inputs else Layout.PADDED
