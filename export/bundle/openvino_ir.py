"""A bundle's graphs in OpenVINO's own format, proven and entered in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import EvaluationSet
from export.bundle.update import add_artifacts, updating
from export.graph.trace import GRAPH_FILES, Graph, parts
from export.precision.half_precision import write_half
from export.precision.variants import VARIANTS
from export.proof.parity import Candidate, Expected, prove_artifact
from export.proof.proof_texts import parity_texts
from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision, check_files, read_manifest
from mirror_runtime.engines.openvino_core import shared_core
from mirror_runtime.errors import InputError
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
"""Names in the bundle's folder `openvino`; the weights lie beside each as `.bin`."""


def add_ir(
    bundle: Path,
    precisions: Sequence[Precision] | None = None,
    *,
    texts: Sequence[str] | None = None,
    sets: Sequence[EvaluationSet] = (),
    on_stage: Callable[[str], None] = lambda _: None,
) -> tuple[Artifact, ...]:
    """Write a bundle's graphs as OpenVINO IR, prove them, and enter them in the manifest, which is written last.

    A packed IR takes the place of the ONNX file that OpenVINO ran in that precision before.

    Args:
        bundle: the bundle; where anything fails it stays as it was.
        precisions: fp32 (padded), bf16 (packed), int8 (both); None writes what the bundle holds and this CPU runs.
        texts: what to prove on; None takes the built-in ones.
        sets: scored pairs on which no artifact may lose quality.
        on_stage: called with the name of each stage as it begins.

    Returns:
        The new artifacts.

    Raises:
        MissingExtra: openvino is not installed.
        InputError: the bundle holds no graph of a precision that was asked for, or cannot be written.
        EngineError: OpenVINO cannot convert or run a graph here.
        ParityError: vectors differ from the reference.
    """
    require("openvino", "openvino")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = _precisions(manifest, precisions)
    with updating(bundle) as made:
        (made / FOLDER).mkdir()
        written = [(p, graph) for p in chosen for graph in _write(bundle, manifest, p, made / FOLDER, on_stage)]
        on_stage("reference vectors")
        expected = Expected.of(Reference.load(resolve(str(bundle))), texts or parity_texts(), sets)
        artifacts = []
        for precision, graph in written:
            candidate = Candidate.of(bundle, graph, EngineName.OPENVINO, precision)
            on_stage(f"prove {candidate}")
            parity = prove_artifact(bundle, candidate, manifest, expected)
            artifacts.append(
                candidate.certified(
                    parity,
                    path=f"{FOLDER}/{graph.path.name}",
                    size=sum(file.stat().st_size for file in parts(graph.path)),
                    toolchain={name: version(name) for name in ("torch", "transformers", "onnx", "openvino")},
                )
            )
        add_artifacts(bundle, made, artifacts)
    return tuple(artifacts)


def convert(graph: Path, path: Path) -> None:
    """Write an ONNX file as OpenVINO IR, with its numbers as they are.

    Args:
        graph: the ONNX file.
        path: the `.xml` to write; the weights go to the `.bin` beside it.

    Raises:
        MissingExtra: openvino is not installed.
        InputError: OpenVINO cannot read the graph.
    """
    openvino = require("openvino", "openvino")
    try:
        model = shared_core().read_model(graph)
    except RuntimeError as error:
        raise InputError(f"openvino cannot read {graph.name}: {error}") from error
    openvino.save_model(model, path, compress_to_fp16=False)


def _precisions(manifest: Manifest, asked: Sequence[Precision] | None) -> tuple[Precision, ...]:
    if asked is None:
        int8 = (Precision.INT8,) if _onnx(Precision.INT8, Layout.PACKED) in manifest.files else ()
        return (Precision.FP32, *((Precision.BF16,) if has_bf16() else ()), *int8)
    unknown = [precision.value for precision in asked if precision not in FILES]
    if unknown:
        raise InputError(f"{', '.join(unknown)} is not written as OpenVINO IR: choose fp32, bf16 or int8")
    return tuple(dict.fromkeys(asked))


def _write(
    bundle: Path, manifest: Manifest, precision: Precision, folder: Path, on_stage: Callable[[str], None]
) -> Iterator[Graph]:
    for layout, name in FILES[precision].items():
        on_stage(f"write {name}")
        signed = next(a for a in manifest.artifacts if a.layout is layout)  # all of one layout have one signature
        with TemporaryDirectory() as scratch:
            source = bundle / _onnx(precision, layout)
            if precision is Precision.BF16 and not source.is_file():
                fp32 = Graph(
                    layout=layout,
                    path=bundle / _onnx(Precision.FP32, layout),
                    inputs=signed.inputs,
                    outputs=signed.outputs,
                )
                source = write_half(fp32, Path(scratch) / source.name, precision).path
            if not source.is_file():
                raise InputError(
                    f"{bundle} has no {layout.value} graph in {precision.value}: export it with "
                    f"export/to_onnx.py --precision {precision.value}"
                )
            convert(source, folder / name)
        yield Graph(layout=layout, path=folder / name, inputs=signed.inputs, outputs=signed.outputs)


def _onnx(precision: Precision, layout: Layout) -> str:
    """Name the ONNX file that an IR is made from."""
    files = GRAPH_FILES if precision is Precision.FP32 else VARIANTS[precision].files
    return f"onnx/{files[layout]}"
