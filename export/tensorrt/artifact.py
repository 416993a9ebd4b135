"""Turn a bundle's graph into a proven TensorRT artifact, or into a folder from which a GPU container builds one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.update import add_artifacts, updating
from export.graph.trace import Graph, graph_files, signature_of
from export.proof.candidate import Candidate
from export.proof.parity import Expected, prove_artifact
from export.proof.proof_texts import parity_texts
from export.tensorrt import builder, prove_plan
from export.tensorrt.builder import BuildRequest, Profile
from export.tensorrt.checks import breaches, graph_precision, report, require_clean
from export.tensorrt.profiles import check_profiles, packed_profiles, packed_shape_set, padded_profiles
from export.tensorrt.samples import write_samples
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import (
    Artifact,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Parity,
    Precision,
    check_files,
    read_manifest,
    sha256_file,
)
from mirror_runtime.engines import load_engine
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.folders import whole_folder
from mirror_runtime.packing import TOKEN_BUDGET

FOLDER = "tensorrt"
SCRIPT_FILE = "build_engine.py"

OnProgress = Callable[[str], None]
"""Called with each line of progress."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build a plan.

    Attributes:
        precision: the graph's precision.
        layout: packed, or padded for servers that form batches themselves.
        batch_tokens: tokens of full batches; every packed shape of each gets a profile.
        level: builder optimisation level.
        workspace_gib: maximum scratch memory; None for all.
        version_compatible: the plan also loads in newer TensorRT versions.
        hardware: a key of `builder.HARDWARE`.
        timing_cache: file of kernel timings to read and extend; None for none.
    """

    precision: Precision
    layout: Layout = Layout.PACKED
    batch_tokens: tuple[int, ...] = (TOKEN_BUDGET,)
    level: int = 3
    workspace_gib: float | None = None
    version_compatible: bool = False
    hardware: str = "none"
    timing_cache: Path | None = None


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
        summary = report(bundle / path, breaches(view))
        layout, precision = _layout(view.inputs), graph_precision(view)
        reports.append({**summary, "graph": path, "layout": layout.value, "precision": precision.value})
    return reports


def choose_graph(bundle: Path, manifest: Manifest, options: Options) -> Graph:
    """Find the bundle's graph of the requested layout and precision, and check it.

    Under strong typing the file's types are the engine's: a graph of another precision never takes its place.

    Raises:
        EngineError: there is none, or it breaks a rule.
    """
    found: list[str] = []
    refused: EngineError | None = None
    for path in _graphs(manifest):
        view = GraphView.load(bundle / path)
        if _layout(view.inputs) is not options.layout:
            continue
        precision = graph_precision(view)
        found.append(f"{path} ({precision.value})")
        if precision is not options.precision:
            continue
        try:
            require_clean(view, bundle / path)
        except EngineError as error:  # another file may be suitable: int8 graphs for CPUs also quantise their tables
            refused = refused or error
        else:
            contract = signature_of(view.proto)
            return Graph(layout=options.layout, path=bundle / path, inputs=contract.inputs, outputs=contract.outputs)
    if refused is not None:
        raise refused
    raise EngineError(
        f"{bundle} has no {options.layout.value} graph in {options.precision.value}; it has "
        f"{', '.join(found) or 'none'}. Export one with export/to_onnx.py --precision {options.precision.value}, "
        "or choose another precision"
    )


def request_for(graph: Graph, spec: EncoderSpec, options: Options) -> BuildRequest:
    """Create the build request of a graph; its file names are relative to the graph's folder.

    Raises:
        EngineError: the profiles do not fit the encoder, or a setting is out of range.
    """
    profiles = _profiles(graph, spec, options)
    check_profiles(profiles, graph.inputs, spec.max_tokens)
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


def write_script(
    bundle: Path, folder: Path, options: Options, texts: tuple[str, ...] | None, *, overwrite: bool = False
) -> BuildRequest:
    """Write a folder from which a machine with only TensorRT builds and proves the plan.

    Args:
        bundle: the bundle.
        folder: the folder to write; `python build_engine.py` in it builds the plan.
        options: what to build.
        texts: some of these prove the plan there; None for the built-in ones.
        overwrite: replace such a folder.

    Raises:
        EngineError: the bundle has no such graph, or it breaks a rule.
        InputError: the folder exists or cannot be written.
    """
    manifest = read_manifest(bundle)
    graph = choose_graph(bundle, manifest, options)
    request = request_for(graph, manifest.encoder, replace(options, timing_cache=None))
    request = replace(request, timing_cache="timing.cache")
    with whole_folder(folder, overwrite=overwrite, marker=builder.REQUEST_FILE) as partial:
        for file in graph_files(graph.path):
            shutil.copy(file, partial / file.name)
        shutil.copy(builder.__file__, partial / SCRIPT_FILE)
        shutil.copy(prove_plan.__file__, partial / f"{builder.PROOF_MODULE}.py")
        write_samples(
            partial / builder.SAMPLES_FILE,
            bundle,
            Reference.load(resolve(str(bundle))),
            texts or parity_texts(),
            layout=options.layout,
            precision=options.precision,
            inputs=graph.inputs,
        )
        builder.write_request(request, partial / builder.REQUEST_FILE)
    return request


def build_plan(bundle: Path, options: Options, texts: tuple[str, ...] | None, on_progress: OnProgress) -> Artifact:
    """Build a plan on this machine's GPU, prove it there, and add it to the bundle.

    Args:
        bundle: the bundle.
        options: what to build.
        texts: texts to prove on; None for the built-in ones.
        on_progress: called with each line of progress.

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
    with updating(bundle) as staging:
        (staging / FOLDER).mkdir()
        plan = (staging / FOLDER / request.plan).absolute()
        try:
            builder.build(replace(request, plan=str(plan)), graph.path.parent, on_progress=on_progress)
        except builder.BuildError as error:
            raise EngineError(str(error)) from error
        candidate = Candidate.of(bundle, replace(graph, path=plan), EngineName.TENSORRT, options.precision)
        parity = _prove(bundle, candidate, manifest, texts, on_progress)
        path = f"{FOLDER}/{request.plan}"
        artifact = candidate.certified(bundle, parity, path=path, engine_module="tensorrt")
        add_artifacts(bundle, staging, [artifact])
    return artifact


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
    candidate = Candidate.of(bundle, graph, engine, options.precision)
    # Check that the provider is available, before minutes of reference vectors.
    load_engine(engine, options.precision, graph.path, spec=manifest.encoder).close()
    with updating(bundle) as staging:
        parity = _prove(bundle, candidate, manifest, texts, on_progress)
        artifact = candidate.certified(bundle, parity, engine_module="onnxruntime")
        add_artifacts(bundle, staging, [artifact])
    return artifact


def _prove(
    bundle: Path, candidate: Candidate, manifest: Manifest, texts: tuple[str, ...] | None, on_progress: OnProgress
) -> Parity:
    on_progress("reference vectors")
    expected = Expected.of_bundle(bundle, texts)
    on_progress(f"prove {candidate}")
    return prove_artifact(bundle, candidate, manifest, expected)


def _profiles(graph: Graph, spec: EncoderSpec, options: Options) -> tuple[Profile, ...]:
    if options.layout is Layout.PADDED:
        return padded_profiles(graph.inputs, spec.max_tokens)
    profiles: list[Profile] = []
    # The runtime's own budget is always included: it applies where no plan names another.
    for budget in sorted({TOKEN_BUDGET, *options.batch_tokens}):
        shapes = packed_profiles(graph.inputs, packed_shape_set(spec, budget))
        profiles += [profile for profile in shapes if profile not in profiles]
    return tuple(profiles)


def _graphs(manifest: Manifest) -> list[str]:
    return [path for path in manifest.files if path.endswith(".onnx")]


def _layout(inputs: Container[str]) -> Layout:
    """Return the layout of a graph: packed graphs have segments as an input."""
    return Layout.PACKED if "segment_ids" in inputs else Layout.PADDED
