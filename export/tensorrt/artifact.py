"""A bundle's graph to a proven TensorRT artifact, or to a folder that a bare GPU container builds it from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.update import add_artifacts, updating
from export.graph.trace import parts
from export.proof.parity import Candidate, Expected, prove_artifact
from export.proof.proof_texts import parity_texts
from export.tensorrt import builder, prove_plan
from export.tensorrt.builder import BuildRequest, Profile
from export.tensorrt.checks import breaches, graph_precision, report, require_clean
from export.tensorrt.profiles import check_profiles, packed_ladder, packed_profiles, padded_profiles
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
    TensorSpec,
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

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build.

    Attributes:
        precision: what the graph must hold.
        layout: packed, or padded for servers that batch by themselves.
        batch_tokens: tokens of full batches; every packed shape of each gets a profile.
        level: builder optimisation level.
        workspace_gib: most scratch memory; None for all.
        version_compatible: load in newer TensorRT versions too.
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


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The graph that an engine is built of.

    Attributes:
        path: relative to the bundle.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def check_bundle(bundle: Path) -> list[dict[str, object]]:
    """Hold every ONNX file of a bundle against the rules.

    Returns:
        A report for each file, with its layout, precision and breaches. A plan needs one without breaches: an int8
        file for CPUs, which also quantises its tables, may lie beside it.

    Raises:
        BundleError: the folder is no bundle, or is damaged.
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


def choose_graph(bundle: Path, manifest: Manifest, options: Options) -> Chosen:
    """Find the bundle's graph that holds the layout and precision asked for, and check it.

    Under strong typing the file's types are the engine's: a graph of another precision is never taken instead.

    Raises:
        EngineError: there is none, or it breaks a rule.
    """
    found: list[str] = []
    refused: EngineError | None = None
    for path in _graphs(manifest):
        inputs, outputs = _signature(bundle / path)
        if _layout({tensor.name for tensor in inputs}) is not options.layout:
            continue
        view = GraphView.load(bundle / path)
        holds = graph_precision(view)
        found.append(f"{path} ({holds.value})")
        if holds is not options.precision:
            continue
        try:
            require_clean(view, bundle / path)
            return Chosen(path=path, inputs=inputs, outputs=outputs)
        except EngineError as error:  # another file may be fit: int8 graphs for CPUs also quantise their tables
            refused = refused or error
    if refused is not None:
        raise refused
    raise EngineError(
        f"{bundle} has no {options.layout.value} graph in {options.precision.value}; it has "
        f"{', '.join(found) or 'none'}. Export one with export/to_onnx.py --precision {options.precision.value}, "
        "or ask for another precision"
    )


def request_for(bundle: Path, chosen: Chosen, spec: EncoderSpec, options: Options) -> BuildRequest:
    """Say what to build: file names are relative to a folder that holds the graph.

    Raises:
        EngineError: the profiles do not fit the encoder, or a setting is out of range.
    """
    profiles = _profiles(chosen, spec, options)
    check_profiles(profiles, chosen.inputs, spec.max_tokens)
    graph = bundle / chosen.path
    try:
        return BuildRequest(
            onnx=graph.name,
            onnx_sha256=sha256_file(graph),
            plan=f"{graph.stem}.plan",
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
    """Write a folder from which a machine with nothing but TensorRT builds and proves the plan.

    Args:
        bundle: the bundle.
        folder: to write; `python build_engine.py` in it does the rest.
        options: what to build.
        texts: some of these prove it there; None takes the built-in ones.
        overwrite: replace such a folder.

    Raises:
        EngineError: the bundle has no such graph, or it breaks a rule.
        InputError: the folder exists or cannot be written.
    """
    manifest = read_manifest(bundle)
    chosen = choose_graph(bundle, manifest, options)
    local = replace(options, timing_cache=None)
    request = replace(request_for(bundle, chosen, manifest.encoder, local), timing_cache="timing.cache")
    graph = bundle / chosen.path
    with whole_folder(folder, overwrite=overwrite, marker=builder.REQUEST_FILE) as partial:
        for part in parts(graph):
            shutil.copy(part, partial / part.name)
        shutil.copy(builder.__file__, partial / SCRIPT_FILE)
        shutil.copy(prove_plan.__file__, partial / f"{builder.PROOF_MODULE}.py")
        write_samples(
            partial / builder.SAMPLES_FILE,
            bundle,
            Reference.load(resolve(str(bundle))),
            texts or parity_texts(),
            layout=options.layout,
            precision=options.precision,
            inputs=chosen.inputs,
        )
        builder.write_request(request, partial / builder.REQUEST_FILE)
    return request


def build_plan(bundle: Path, options: Options, texts: tuple[str, ...] | None, say: Say) -> Artifact:
    """Build a plan on this machine's GPU, prove it there, and add it to the bundle.

    Args:
        bundle: the bundle.
        options: what to build.
        texts: what to prove on; None takes the built-in ones.
        say: takes a line of progress.

    Raises:
        MissingExtra: tensorrt or cuda.bindings is not installed.
        EngineError: no GPU, no such graph, or TensorRT cannot build it.
        ParityError: the plan's vectors are not the reference's; the bundle stays as it was.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = choose_graph(bundle, manifest, options)
    require("tensorrt", "tensorrt")
    require("cuda.bindings.runtime", "tensorrt")
    request = request_for(bundle, chosen, manifest.encoder, options)
    with updating(bundle) as made:
        (made / FOLDER).mkdir()
        plan = (made / FOLDER / request.plan).absolute()
        try:
            builder.build(replace(request, plan=str(plan)), (bundle / chosen.path).parent, say=say)
        except builder.BuildError as error:
            raise EngineError(str(error)) from error
        candidate = Candidate(
            path=plan.relative_to(bundle.absolute()).as_posix(),
            layout=options.layout,
            engine=EngineName.TENSORRT,
            precision=options.precision,
            inputs=chosen.inputs,
            outputs=chosen.outputs,
        )
        parity = _prove(bundle, candidate, manifest, texts, say)
        artifact = _artifact(candidate, f"{FOLDER}/{request.plan}", plan.stat().st_size, parity, "tensorrt")
        add_artifacts(bundle, made, [artifact])
    return artifact


def prove_provider(
    bundle: Path, engine: EngineName, options: Options, texts: tuple[str, ...] | None, say: Say
) -> Artifact:
    """Prove a packed graph through one of ONNX Runtime's GPU providers here, and add that artifact to the bundle.

    Raises:
        MissingExtra: onnxruntime is not installed.
        EngineError: the provider does not come up, or the bundle has no such graph.
        ParityError: the vectors are not the reference's; the bundle stays as it was.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = choose_graph(bundle, manifest, options)
    candidate = Candidate(
        path=chosen.path,
        layout=options.layout,
        engine=engine,
        precision=options.precision,
        inputs=chosen.inputs,
        outputs=chosen.outputs,
    )
    # Before minutes of reference vectors: whether the provider is there at all.
    load_engine(engine, options.precision, bundle / chosen.path, spec=manifest.encoder).close()
    with updating(bundle) as made:
        parity = _prove(bundle, candidate, manifest, texts, say)
        size = sum(part.stat().st_size for part in parts(bundle / chosen.path))
        artifact = _artifact(candidate, chosen.path, size, parity, "onnxruntime")
        add_artifacts(bundle, made, [artifact])
    return artifact


def _prove(bundle: Path, candidate: Candidate, manifest: Manifest, texts: tuple[str, ...] | None, say: Say) -> Parity:
    say("reference vectors")
    expected = Expected.of(Reference.load(resolve(str(bundle))), texts or parity_texts())
    say(f"prove {candidate}")
    return prove_artifact(bundle, candidate, manifest, expected)


def _artifact(candidate: Candidate, path: str, size: int, parity: Parity, module: str) -> Artifact:
    return candidate.certified(
        parity,
        path=path,
        size=size,
        # The module's own word: containers bring TensorRT without a Python package's metadata.
        toolchain={
            **{name: version(name) for name in ("torch", "transformers", "onnx")},
            module: str(require(module, module).__version__),
        },
    )


def _profiles(chosen: Chosen, spec: EncoderSpec, options: Options) -> tuple[Profile, ...]:
    if options.layout is Layout.PADDED:
        return padded_profiles(chosen.inputs, spec.max_tokens)
    profiles: list[Profile] = []
    # The runtime's own budget always: it is what runs where no plan says otherwise.
    for budget in sorted({TOKEN_BUDGET, *options.batch_tokens}):
        shapes = packed_profiles(chosen.inputs, packed_ladder(spec, budget))
        profiles += [profile for profile in shapes if profile not in profiles]
    return tuple(profiles)


def _graphs(manifest: Manifest) -> list[str]:
    return [path for path in manifest.files if path.endswith(".onnx")]


def _signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise EngineError(f"{path} cannot be read as ONNX: {error}. Export it again") from error
    weights = {tensor.name for tensor in graph.initializer}
    sides = [value for value in graph.input if value.name not in weights], list(graph.output)
    inputs, outputs = (tuple(map(_tensor_spec, side)) for side in sides)
    return inputs, outputs


def _layout(inputs: Container[str]) -> Layout:
    """Tell a packed graph, which reads segments, from a padded one."""
    return Layout.PACKED if "segment_ids" in inputs else Layout.PADDED


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape=shape)
