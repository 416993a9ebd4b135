"""Build a TensorRT plan from a bundle: `python export/to_tensorrt.py BUNDLE --precision fp16`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from export.bundle.card import summary
from export.proof.proof_texts import read_texts
from export.tensorrt.builder import HARDWARE, trtexec_line
from mirror_runtime.bundle import EngineName, Layout, Precision, read_manifest
from mirror_runtime.cli.options import BundleArgument, ProofTextsOption
from mirror_runtime.cli.run import application, print_json, run_command, timestamped_lines
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import TOKEN_BUDGET


class Target(str, Enum):
    """What runs the graph on the GPU."""

    TENSORRT = EngineName.TENSORRT.value
    ONNXRUNTIME_CUDA = EngineName.ONNXRUNTIME_CUDA.value
    ONNXRUNTIME_TENSORRT = EngineName.ONNXRUNTIME_TENSORRT.value


def run(
    bundle: BundleArgument,
    precision: Annotated[
        Precision, typer.Option(help="Precision of the bundle's graph to use: TensorRT computes in the file's types.")
    ] = Precision.FP16,
    engine: Annotated[
        Target,
        typer.Option(help="tensorrt builds a plan; the others prove the ONNX file on that provider."),
    ] = Target.TENSORRT,
    padded: Annotated[
        bool, typer.Option("--padded", help="Use the padded graph, with a profile for each bucket of lengths.")
    ] = False,
    ragged: Annotated[
        bool,
        typer.Option("--ragged", help="Attention over ragged texts instead of a block mask; TensorRT 11.1 or newer."),
    ] = False,
    batch_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=16,
            help=f"Tokens of full batches to build for in addition to {TOKEN_BUDGET}, such as 8192 for a large GPU.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="0 builds fastest; 5 tries everything, for hours.")] = 3,
    workspace: Annotated[
        float | None, typer.Option(help="GiB of scratch memory, such as 4. Default: all.", show_default=False)
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Loads in newer TensorRT versions too; may be slower."),
    ] = False,
    hardware_compatible: Annotated[
        str,
        typer.Option(help=f"Other GPUs on which the plan runs: {', '.join(HARDWARE)}. All but none may be slower."),
    ] = "none",
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of kernel timings to read and extend: the next build is faster.", show_default=False),
    ] = None,
    parity_texts: ProofTextsOption = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check whether plans can be built. Needs neither a GPU nor TensorRT."),
    ] = False,
    script: Annotated[
        Path | None,
        typer.Option(help="Only write a folder from which a machine with only TensorRT builds the plan."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of --script.")] = False,
) -> None:
    """Build a TensorRT plan on this machine's GPU, prove its vectors there, and add it to the bundle.

    The precision is that of the ONNX file, in TensorRT 10 and 11 alike: export the bundle with it first. A plan runs on
    the kind of GPU and the TensorRT version that built it. For a target with only NVIDIA's container, use --script.
    """
    console = Console(stderr=True, highlight=False)
    if check and script is not None:
        raise InputError("--check and --script exclude each other")
    if ragged and (padded or script is not None or engine is not Target.TENSORRT):
        raise InputError("--ragged is for packed plans that are built on this machine")
    if read_manifest(bundle).encoder.scores_pairs:
        raise EngineError(f"{bundle} is a reranker, which is proven on CPUs only: serve it as it is")
    layout = Layout.PADDED if padded else Layout.PACKED
    if check:
        _check(bundle, layout)
        return
    from export.tensorrt.artifact import SCRIPT_FILE, Options, build_plan, prove_provider, write_script

    options = Options(
        precision=precision,
        layout=layout,
        batch_tokens=tuple(batch_tokens or ()),
        level=level,
        workspace_gib=workspace,
        version_compatible=version_compatible,
        hardware=hardware_compatible,
        timing_cache=timing_cache,
        ragged=ragged,
    )
    texts = read_texts(parity_texts) if parity_texts else None
    if script is not None:
        request = write_script(bundle, script, options, texts, overwrite=overwrite)
        console.print(f"wrote {script}: copy it to the GPU machine, and run there", markup=False)
        console.print(f"  python {SCRIPT_FILE}", markup=False)
        console.print("or build with trtexec, which writes no sidecar file:", markup=False)
        console.print(f"  {trtexec_line(request)}", markup=False, soft_wrap=True)
        print_json(
            {"folder": str(script), "onnx": request.onnx, "plan": request.plan, "profiles": len(request.profiles)}
        )
        return
    if engine is not Target.TENSORRT and padded:
        raise InputError(f"--padded is for plans: engine {engine.value} runs packed graphs")
    began, on_progress = time.perf_counter(), timestamped_lines(console)
    if engine is Target.TENSORRT:
        artifact = build_plan(bundle, options, texts, on_progress)
    else:
        artifact = prove_provider(bundle, EngineName(engine.value), options, texts, on_progress)
    print_json({"bundle": str(bundle), **summary(artifact), "seconds": round(time.perf_counter() - began, 1)})


def _check(bundle: Path, layout: Layout) -> None:
    """Print a report of every graph; raise if no graph of the layout is suitable in one of its precisions."""
    from export.tensorrt.artifact import check_bundle  # imports torch, which --help does not wait for

    reports = check_bundle(bundle)
    print_json({"bundle": str(bundle), "graphs": reports})
    relevant = [entry for entry in reports if entry["layout"] == layout.value]
    suitable = {entry["precision"] for entry in relevant if not entry["breaches"]}
    broken = [str(entry["graph"]) for entry in relevant if entry["precision"] not in suitable]
    if broken:
        raise EngineError(f"not suitable for TensorRT: {', '.join(broken)}; the breaches are listed above")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "to_tensorrt.py")


if __name__ == "__main__":
    sys.exit(main())
