"""Load a bundle unchanged in other libraries and compare their vectors: each library in an environment of its own.

    python benchmarks/interop.py BUNDLE --library fastembed --json

Exit status: 0 when every library that the bundle serves agrees, 1 when one differs, fails or cannot be installed, 2
on a user's mistake.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.environments import find_environment, parse_environments
from benchmarks.peers.specs import CONSUMERS, FOLDER, Consumer, worker_command
from benchmarks.workers import WorkerProcess
from mirror_runtime.bundle import Layout, Manifest, Pooling, check_files, read_canaries, read_manifest
from mirror_runtime.canaries import CanaryVerdict, compare_canaries
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError, PeerError
from mirror_runtime.host import has_bf16
from mirror_runtime.vectors import components, round_vectors

REQUIREMENTS = FOLDER / "interop"
WEIGHTS = "model.safetensors"

WEIGHTS_FLOOR = 0.99999
"""Of a library that runs the fp32 weights by itself."""

BF16_FLOOR = 0.9995
"""Of OpenVINO at its defaults, which computes in bf16 where the CPU has it, whatever the file holds."""

BATCH_SIZE = 4
"""Smaller than the number of texts, and several texts: padding and batching are part of the comparison."""

TIMEOUT_S = 900.0


class Verdict(str, Enum):
    """How a cell ended: of what is not installed nothing is known, for what is not offered the bundle has no file."""

    AGREES = "agrees"
    DIFFERS = "differs"
    FAILED = "failed"
    NOT_INSTALLED = "not installed"
    NOT_OFFERED = "not offered"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One consumer, by its title, on one file of the bundle, and the worst canary against its stored vector.

    The figures are None without vectors; `reason` is why it did not agree.
    """

    consumer: str
    file: str
    verdict: Verdict
    reason: str = ""
    min_cosine: float | None = None
    max_abs_diff: float | None = None
    floor: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether this is neither agreement nor something that the bundle does not offer."""
        return self.verdict not in (Verdict.AGREES, Verdict.NOT_OFFERED)


def run_consumers(
    bundle: Path, environments: Path, only: Sequence[str], given: Mapping[str, Path], on_progress: Callable[[str], None]
) -> list[Cell]:
    """Load a bundle unchanged in every consumer and compare the canaries' vectors, a cell for each file.

    Nothing is written to the bundle. A virtual environment that is neither `given` by the user nor in the folder of
    environments is made there, 3 GB in all. `only` has beginnings of titles, in any case; empty means all.

    Raises:
        BundleError: the folder is not a bundle or is corrupted.
        InputError: `only` matches no consumer.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = [c for c in CONSUMERS if not only or c.title.lower().startswith(tuple(name.lower() for name in only))]
    if not chosen:
        titles = "; ".join(consumer.title for consumer in CONSUMERS)
        raise InputError(f"no library is named {', '.join(only)}: known are {titles}")
    cells = []
    pythons: dict[str, Path | str] = {}  # interpreters, or why there is none
    for consumer in chosen:
        name, floors, reason = (
            consumer.environment,
            floors_of(consumer, manifest),
            not_offered(consumer, manifest, bundle),
        )
        file = "/".join(consumer.suffixes) or WEIGHTS
        if not floors or reason:
            cure = "run export/to_openvino.py" if file == ".xml" else "export it again"
            reason = reason or f"the bundle has no padded {file} file: {cure}"
            cells.append(Cell(consumer=consumer.title, file=file, verdict=Verdict.NOT_OFFERED, reason=reason))
            continue
        if name not in pythons:
            try:
                pythons[name] = find_environment(name, REQUIREMENTS, given, environments, on_progress)
            except (PeerError, OSError) as error:
                pythons[name] = str(error)
        for file, floor in floors.items():
            on_progress(f"{consumer.title}: {file}")
            python, cell = pythons[name], Cell(consumer=consumer.title, file=file, verdict=Verdict.FAILED, floor=floor)
            if isinstance(python, str):
                cell = replace(cell, verdict=Verdict.NOT_INSTALLED, reason=python)
            else:
                try:
                    cell = _measure(cell, floor, consumer, python, bundle.resolve(), manifest)
                except (PeerError, OSError) as error:
                    cell = replace(cell, reason=str(error))
            cells.append(cell)
    return cells


def floors_of(consumer: Consumer, manifest: Manifest) -> dict[str, float]:
    """Return the files that a consumer loads, each with the floor of its cosine."""
    if not consumer.suffixes:
        return {WEIGHTS: WEIGHTS_FLOOR}
    lowered = BF16_FLOOR if consumer.backend == "openvino" and has_bf16() else 1.0
    floors: dict[str, float] = {}
    for artifact in manifest.artifacts:
        if artifact.layout is Layout.PADDED and Path(artifact.path).suffix in consumer.suffixes:
            floors[artifact.path] = min(artifact.parity.floor, floors.get(artifact.path, lowered))
    return floors


def not_offered(consumer: Consumer, manifest: Manifest, bundle: Path) -> str:
    """Return why a consumer cannot express the encoder; "" if it can."""
    spec = manifest.encoder
    if not (spec.template or "{text}").endswith("{text}"):
        return f"the template {spec.template!r} has words after the text, where other libraries truncate long texts"
    if (
        consumer.library in ("sentence_transformers", "fastembed") and not (bundle / "modules.json").is_file()
    ):  # they pool by themselves
        return "the bundle has no modules.json, as sentence-transformers cannot express its head"
    if consumer.library == "fastembed" and (spec.pooling not in (Pooling.MEAN, Pooling.CLS) or spec.dense):
        return "fastembed supports only mean and cls pooling"
    return ""


def _measure(cell: Cell, floor: float, consumer: Consumer, python: Path, bundle: Path, manifest: Manifest) -> Cell:
    """Complete a cell with the vectors that a consumer's own process computes."""
    canaries, spec = read_canaries(bundle), manifest.encoder
    backend, command = consumer.backend, worker_command(python, consumer.library)
    if consumer.suffixes:
        backend += f" {cell.file}"
    with tempfile.TemporaryDirectory(prefix="mirror-consumer-") as folder:
        scratch = Path(folder)
        texts, output = [canary.text for canary in canaries], scratch / "vectors.npy"
        # What another release left in a hub's cache is not read.
        with WorkerProcess(command, scratch / "log", environment={"HF_HOME": folder}, folder=scratch) as worker:
            worker.ask("load", TIMEOUT_S, model=str(bundle), backend=backend, texts=texts)
            worker.ask("dump", TIMEOUT_S, batch_size=BATCH_SIZE, output=str(output), texts=texts)
            versions = worker.ask("versions", TIMEOUT_S)["versions"]
        vectors = np.load(output, allow_pickle=False)
    # A library that pools by itself returns floats, whatever type the graphs return.
    typed = round_vectors(vectors, spec) if np.issubdtype(vectors.dtype, np.floating) else vectors
    found = compare_canaries(components(typed, spec), canaries, floor)
    verdict = Verdict.AGREES if found.verdict is CanaryVerdict.AGREES else Verdict.DIFFERS
    cell = replace(cell, verdict=verdict, reason=found.problem, versions=versions)
    return replace(cell, min_cosine=found.min_cosine, max_abs_diff=found.max_abs_diff)


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    library: Annotated[list[str] | None, typer.Option(help="Only this one, such as 'fastembed'; repeatable.")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="Your own environment; repeatable.")] = None,
    env_dir: Annotated[
        Path | None,
        typer.Option(envvar="MIRROR_ENVIRONMENTS", help="Where the others are made (3 GB). Default: the user's cache."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")] = False,
) -> None:
    """Load BUNDLE in other libraries and compare their vectors."""
    given = parse_environments(env or (), "--env", {consumer.environment for consumer in CONSUMERS})
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    console = Console(stderr=True, highlight=False)
    folder = env_dir or cache / "mirror-runtime" / "environments"
    with console.status("") as status:
        cells = run_consumers(bundle, folder, library or (), given, lambda line: status.update(line[:100]))
    table = Table("library", "loads", "cosine", "floor", "verdict", padding=(0, 0))
    for cell in cells:
        cosine = "" if cell.min_cosine is None else f"{cell.min_cosine:.6f}"
        floor = "" if cell.floor is None else str(cell.floor)
        table.add_row(cell.consumer, Path(cell.file).name, cosine, floor, cell.verdict.value)
    console.print(table)
    for cell in cells:
        if cell.reason:
            console.print(f"{cell.consumer}, {cell.file}: {cell.reason}", soft_wrap=True, markup=False)
    if as_json:
        fingerprint, consumers = read_manifest(bundle).fingerprint, [asdict(cell) for cell in cells]
        line = {"bundle": str(bundle), "fingerprint": fingerprint, "consumers": consumers}
        sys.stdout.write(json.dumps(line) + "\n")
    if any(cell.failed for cell in cells):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    lists = {"--library": None, "--env": None}
    return run_command(application(run), argv, "benchmarks/interop.py", lists=lists)


if __name__ == "__main__":
    sys.exit(main())
