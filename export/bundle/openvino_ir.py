"""Convert a bundle's graphs to OpenVINO's own format, prove them, and add them to the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from evaluation.sets import EvaluationSet
from export.bundle.update import add_artifacts, updating
from export.graph.trace import GRAPH_FILES, Graph
from export.precision.half_precision import write_half
from export.precision.variants import VARIANTS
from export.proof.candidate import Candidate
from export.proof.parity import Expected, prove_artifact
from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision, check_files, read_manifest
from mirror_runtime.engines.openvino_core import shared_core
from mirror_runtime.errors import InputError, one_line
from mirror_runtime.extras import require
from mirror_runtime.host import has_bf16

FOLDER = "openvino"

FILES: Mapping[Precision, Mapping[Layout, str]] = {
    # sentence-transformers and optimum-intel look for the padded names.
    Precision.FP32: {Layout.PADDED: "openvino_model.xml"},
    Precision.BF16: {Layout.PACKED: "openvino_model_packed_bf16.xml"},
    Precision.INT8: {
        Layout.PADDED: "openvino_model_qint8_quantized.xml",
        Layout.PACKED: "openvino_model_packed_int8.xml",
    },
}
"""File names in the bundle's folder `openvino`; the weights are in a `.bin` file beside each."""


def add_ir(
    bundle: Path,
    precisions: Sequence[Precision] | None = None,
    *,
    texts: Sequence[str] | None = None,
    sets: Sequence[EvaluationSet] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> tuple[Artifact, ...]:
    """Write a bundle's graphs as OpenVINO IR, prove them, and add them to the manifest, which is written last.

    A packed IR replaces the ONNX file that OpenVINO ran in that precision before.

    Args:
        bundle: the bundle; it does not change if anything fails.
        precisions: fp32 (padded), bf16 (packed), int8 (both); None for all that the bundle has and this CPU supports.
        texts: texts to prove on; None for the built-in ones.
        sets: scored pairs on which no artifact may lose quality.
        on_progress: called with the name of each stage as it begins.

    Raises:
        MissingExtra: openvino is not installed.
        InputError: the bundle has no graph of a requested precision, or cannot be written.
        EngineError: OpenVINO cannot convert or run a graph here.
        ParityError: vectors differ from the reference.
    """
    require("openvino", "openvino")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = _precisions(manifest, precisions)
    with updating(bundle) as staging:
        (staging / FOLDER).mkdir()
        written = [(p, graph) for p in chosen for graph in _write(bundle, manifest, p, staging / FOLDER, on_progress)]
        on_progress("reference vectors")
        expected = Expected.of_bundle(bundle, texts, sets)
        artifacts = []
        for precision, graph in written:
            candidate = Candidate(graph, EngineName.OPENVINO, precision)
            on_progress(f"prove {candidate}")
            parity = prove_artifact(bundle, candidate, manifest, expected)
            artifacts.append(candidate.certified(bundle, parity, path=f"{FOLDER}/{graph.path.name}"))
        add_artifacts(bundle, staging, artifacts)
    return tuple(artifacts)


def _convert(graph: Path, path: Path) -> None:
    """Write an ONNX file as OpenVINO IR without changing its numbers; the weights go to a `.bin` file beside it."""
    openvino = require("openvino", "openvino")
    try:
        model = shared_core().read_model(graph)
    except RuntimeError as error:
        raise InputError(f"openvino cannot read {graph.name}: {error}") from error
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise InputError(
            f"openvino cannot write {path}: {one_line(error)}. Is the disk full, or a limit on file sizes (ulimit -f)?"
        ) from error


def _precisions(manifest: Manifest, requested: Sequence[Precision] | None) -> tuple[Precision, ...]:
    if requested is None:
        int8 = (Precision.INT8,) if _onnx(Precision.INT8, Layout.PACKED) in manifest.files else ()
        return (Precision.FP32, *((Precision.BF16,) if has_bf16() else ()), *int8)
    unknown = [precision.value for precision in requested if precision not in FILES]
    if unknown:
        raise InputError(f"{', '.join(unknown)} is not written as OpenVINO IR: choose fp32, bf16 or int8")
    return tuple(dict.fromkeys(requested))


def _write(
    bundle: Path, manifest: Manifest, precision: Precision, folder: Path, on_progress: Callable[[str], None]
) -> Iterator[Graph]:
    """Convert a bundle's graphs of one precision into `folder`."""
    for layout, name in FILES[precision].items():
        on_progress(f"write {name}")
        template = next(a for a in manifest.artifacts if a.layout is layout)  # one signature for each layout
        graph = Graph(layout=layout, path=folder / name, inputs=template.inputs, outputs=template.outputs)
        with TemporaryDirectory() as scratch:
            source = bundle / _onnx(precision, layout)
            if precision is Precision.BF16 and not source.is_file():
                fp32 = replace(graph, path=bundle / _onnx(Precision.FP32, layout))
                source = write_half(fp32, Path(scratch) / source.name, precision).path
            if not source.is_file():
                raise InputError(
                    f"{bundle} has no {layout.value} graph in {precision.value}: export it with "
                    f"export/to_onnx.py --precision {precision.value}"
                )
            _convert(source, folder / name)
        yield graph


def _onnx(precision: Precision, layout: Layout) -> str:
    files = GRAPH_FILES if precision is Precision.FP32 else VARIANTS[precision].files
    return f"onnx/{files[layout]}"
