"""Bundle to TensorRT plan: `python export/to_tensorrt.py BUNDLE --precision fp16`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from export.bundle.words import summary
from export.proof.proof_texts import read_texts
from export.tensorrt.artifact import SCRIPT_FILE, Options, build_plan, check_bundle, prove_provider, write_script
from export.tensorrt.builder import trtexec_line
from mirror_runtime.bundle import EngineName, Layout, Precision
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import TOKEN_BUDGET


class Target(str, Enum):
    """What runs the graph on the GPU."""

    TENSORRT = EngineName.TENSORRT.value
    ONNXRUNTIME_CUDA = EngineName.ONNXRUNTIME_CUDA.value
    ONNXRUNTIME_TENSORRT = EngineName.ONNXRUNTIME_TENSORRT.value


class Hardware(str, Enum):
    """Keys of `export.tensorrt.builder.HARDWARE`."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE", show_default=False)],
    precision: Annotated[
        Precision, typer.Option(help="What the bundle's graph must hold: TensorRT computes in the file's own types.")
    ] = Precision.FP16,
    engine: Annotated[
        Target, typer.Option(help="tensorrt builds a plan; the others prove the ONNX file on that provider.")
    ] = Target.TENSORRT,
    padded: Annotated[
        bool, typer.Option("--padded", help="Of the padded graph, with a profile for each bucket of lengths.")
    ] = False,
    batch_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=16,
            help=f"Tokens of full batches to build for besides {TOKEN_BUDGET}, such as 8192 for a large GPU.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="0 builds fastest; 5 tries everything, for hours.")] = 3,
    workspace: Annotated[
        float | None, typer.Option(help="GiB of scratch memory, such as 4. Default: all there is.", show_default=False)
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Loads in newer TensorRT versions too; may be slower.")
    ] = False,
    hardware_compatible: Annotated[
        Hardware, typer.Option(help="On which other GPUs the plan runs; anything but none may be slower.")
    ] = Hardware.NONE,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of kernel timings to read and extend: the next build is faster.", show_default=False),
    ] = None,
    parity_texts: Annotated[
        Path | None, typer.Option(help="Prove on these texts, one a line. Default: over 500 built-in ones.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check whether plans can be built: needs neither GPU nor TensorRT."),
    ] = False,
    script: Annotated[
        Path | None,
        typer.Option(help="Only write a folder that builds the plan on a machine with nothing but TensorRT."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of --script.")] = False,
) -> None:
    """Build a TensorRT plan on this machine's GPU, prove its vectors there, and add it to the bundle.

    The precision is that of the ONNX file, in TensorRT 10 and 11 alike: export the bundle with it first. A plan runs on
    the GPU and the TensorRT that built it. Where the target has only NVIDIA's container, take --script.
    """
    console = Console(stderr=True, highlight=False)
    if sum((check, script is not None)) > 1:
        raise InputError("--check and --script are two things to do: give one")
    layout = Layout.PADDED if padded else Layout.PACKED
    if check:
        _check(bundle, layout)
        return
    options = Options(
        precision=precision,
        layout=layout,
        batch_tokens=tuple(batch_tokens or ()),
        level=level,
        workspace_gib=workspace,
        version_compatible=version_compatible,
        hardware=hardware_compatible.value,
        timing_cache=timing_cache,
    )
    texts = read_texts(parity_texts) if parity_texts else None
    if script is not None:
        request = write_script(bundle, script, options, texts, overwrite=overwrite)
        console.print(f"wrote {script}: copy it to the GPU machine and run", markup=False)
        console.print(f"  python {SCRIPT_FILE}", markup=False)
        console.print("or, without a sidecar:", markup=False)
        console.print(f"  {trtexec_line(request)}", markup=False, soft_wrap=True)
        _report({"folder": str(script), "onnx": request.onnx, "plan": request.plan, "profiles": len(request.profiles)})
        return
    if engine is not Target.TENSORRT and padded:
        raise InputError(f"--padded is for plans: engine {engine.value} runs packed graphs")
    began = time.perf_counter()

    def show(stage: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {stage}")

    if engine is Target.TENSORRT:
        artifact = build_plan(bundle, options, texts, show)
    else:
        artifact = prove_provider(bundle, EngineName(engine.value), options, texts, show)
    _report({"bundle": str(bundle), **summary(artifact), "seconds": round(time.perf_counter() - began, 1)})


def _check(bundle: Path, layout: Layout) -> None:
    """Print a report of every graph; a precision of which no graph of the layout can be built is an error."""
    reports = check_bundle(bundle)
    _report({"bundle": str(bundle), "graphs": reports})
    asked = [entry for entry in reports if entry["layout"] == layout.value]
    fit = {entry["precision"] for entry in asked if not entry["breaches"]}
    broken = [str(entry["graph"]) for entry in asked if entry["precision"] not in fit]
    if broken:
        raise EngineError(f"not fit for TensorRT: {', '.join(broken)}; the breaches are listed above")


def _report(content: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "to_tensorrt.py")


if __name__ == "__main__":
    sys.exit(main())
