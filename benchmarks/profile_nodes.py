"""Show where OpenVINO spends a batch's time, node by node: `python benchmarks/profile_nodes.py BUNDLE`.

One core runs one batch after another. A node's time is the average of all runs but the first. The rate of products
stands beside that of the ceiling's chain of bare products, with as many rows. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine.products import Sizes, compile_openvino, seconds_of
from benchmarks.plan import packed_variants, read_shape
from mirror_runtime.bundle import EngineName, Manifest, Precision, read_manifest
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.engines.openvino_core import read_graph, shared_core
from mirror_runtime.errors import InputError
from mirror_runtime.host import has_bf16
from mirror_runtime.selection import choose

SHAPES = ("16x64", "32x32", "4x256", "1x16")
TOKENS_A_TEXT = 16
SHOWN = 0.003
"""Kinds of nodes with a smaller share of the time are not shown."""


class Group(NamedTuple):
    """Nodes of one kind: how many, their time in microseconds, and the operations of matrix products with weights."""

    kind: str
    nodes: int
    microseconds: float
    flop: int


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="Of the bundle, on OpenVINO. Default: all that run here.", show_default=False),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"Rows x tokens of a row. Default: {', '.join(SHAPES)}.", show_default=False),
    ] = None,
    runs: Annotated[int, typer.Option(min=2, help="Of each batch.")] = 20,
) -> None:
    """Print one table for each precision and shape."""
    console, found = Console(stderr=True, highlight=False), []
    encoder = read_shape(bundle)
    manifest = read_manifest(bundle)
    for one in precision or _precisions(manifest):
        artifact = choose(manifest, "openvino", one.value)[2]
        assert artifact is not None  # only the fake engine has none
        model = read_graph(bundle / artifact.path, None)
        for rows, length in map(_sizes, shape or SHAPES):
            groups, milliseconds = profile(model, one, rows, length, runs)
            sizes = Sizes(rows * length, encoder.hidden, encoder.intermediate) if encoder else None
            ceiling = _ceiling(one, sizes, runs) if sizes else None
            title = f"{one.value}, {rows} x {length}: {milliseconds:.2f} ms; bare products {ceiling or 0:.0f} GFLOP/s"
            console.print(_table(groups, title))
            facts = {"precision": one.value, "rows": rows, "tokens": length, "ms": milliseconds, "ceiling": ceiling}
            found.append({**facts, "nodes": [group._asdict() for group in groups]})
    print_json({"bundle": str(bundle), "profiles": found})


def profile(model: Any, precision: Precision, rows: int, length: int, runs: int) -> tuple[list[Group], float]:
    """Run one shape of a packed graph on one core.

    Returns:
        The nodes by type and kernel, the slowest first, and the milliseconds of a run.
    """
    shaped = model.clone()
    shaped.reshape({value.get_any_name(): [rows, length] for value in shaped.inputs})
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERF_COUNT": True}
    if precision is Precision.BF16 and not has_bf16():
        raise InputError("this CPU has no bf16 instructions: profile fp32 or int8")
    hint = "bf16" if precision is not Precision.FP32 and has_bf16() else "f32"
    compiled = shared_core().compile_model(shaped, "CPU", settings | {"INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()
    places = np.arange(length)
    for name, values in {
        "input_ids": np.random.default_rng(0).integers(1000, 20_000, (rows, length)),
        "position_ids": places % TOKENS_A_TEXT,
        "segment_ids": places // TOKENS_A_TEXT + 1,
    }.items():
        request.get_tensor(name).data[...] = values
    request.infer()
    first = {node.node_name: node.real_time.total_seconds() for node in request.profiling_info}
    seconds = seconds_of(request.infer, runs)
    took = {  # OpenVINO's counters are averages over all runs
        node.node_name: 1e6 * ((runs + 1) * node.real_time.total_seconds() - first[node.node_name]) / runs
        for node in request.profiling_info
    }
    kinds = {node.node_name: f"{node.node_type} {node.exec_type}" for node in request.profiling_info}
    flop = {node.get_friendly_name(): _flop(node) for node in compiled.get_runtime_model().get_ordered_ops()}
    return _grouped((kinds[name], time, flop.get(name, 0)) for name, time in took.items()), 1e3 * sum(seconds) / runs


def _precisions(manifest: Manifest) -> list[Precision]:
    """Return the precisions of a bundle's packed artifacts for OpenVINO that this CPU runs."""
    packed = (variant for variant in packed_variants(manifest) if variant.engine is EngineName.OPENVINO)
    found = [one.precision for one in packed if one.precision is not Precision.BF16 or has_bf16()]
    if not found:
        raise InputError("the bundle has no packed artifact for OpenVINO that runs here: export one")
    return found


def _flop(node: Any) -> int:
    """Return the operations of a product with weights; 0 for other nodes."""
    if not str(node.get_rt_info()["layerType"].astype(str)).startswith("FullyConnected"):
        return 0
    return int(2 * np.prod(node.get_output_shape(0)) * node.get_input_shape(0)[-1])


def _grouped(nodes: Iterable[tuple[str, float, int]]) -> list[Group]:
    groups: dict[str, Group] = {}
    for kind, took, flop in nodes:
        if took > 0:
            old = groups.get(kind, Group(kind, 0, 0.0, 0))
            groups[kind] = Group(kind, old.nodes + 1, old.microseconds + took, old.flop + flop)
    return sorted(groups.values(), key=lambda group: -group.microseconds)


def _ceiling(precision: Precision, sizes: Sizes, runs: int) -> float:
    request = compile_openvino(precision, sizes, threads=1, streams=1).create_infer_request()
    return sizes.flop / min(seconds_of(request.infer, runs)) / 1e9


def _table(groups: Sequence[Group], title: str) -> Table:
    table = Table("share", "ms", "nodes", "GFLOP/s", "type and kernel", title=title, title_justify="left")
    total = sum(group.microseconds for group in groups)
    for kind, nodes, took, flop in groups:
        if took >= SHOWN * total:
            rate = f"{flop / took / 1e3:.0f}" if flop else ""
            table.add_row(f"{took / total:.1%}", f"{took / 1e3:.2f}", str(nodes), rate, kind)
    return table


def _sizes(shape: str) -> tuple[int, int]:
    rows, _, length = shape.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) and int(length)):
        raise InputError(f"--shape {shape}: give rows and tokens, such as 16x64")
    return int(rows), int(length)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "profile_nodes.py", lists={"--precision": None, "--shape": None})


if __name__ == "__main__":
    sys.exit(main())
