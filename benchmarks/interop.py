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
from types import MappingProxyType
from typing import Annotated, NamedTuple

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.environments import find_environment, parse_environments
from benchmarks.peers.specs import FOLDER, worker_command
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
    """How a cell ended."""

    AGREES = "agrees"
    DIFFERS = "differs"
    """It loaded the bundle and its vectors are different."""
    FAILED = "failed"
    """It could not load the bundle, or not encode."""
    NOT_INSTALLED = "not installed"
    """Its environment could not be made, so nothing is known about it."""
    NOT_OFFERED = "not offered"
    """The bundle has no file for it, or it cannot express this encoder's head."""


class Consumer(NamedTuple):
    """A library as data: a new one needs a function in `peers/libraries.py` and an entry here.

    Attributes:
        title: as its makers write it.
        library: of `peers.libraries.LIBRARIES`.
        backend: of the library.
        environment: names its requirements file and its folder among the environments.
        suffixes: of the padded graphs that it loads; empty if it reads the weights.
    """

    title: str
    library: str
    backend: str
    environment: str
    suffixes: tuple[str, ...] = ()


_ST, _ST5, _FASTEMBED = "sentence_transformers", "sentence_transformers_5", "fastembed"

CONSUMERS = (
    Consumer("sentence-transformers 5, PyTorch", _ST, "torch", _ST5),
    Consumer("sentence-transformers 5, ONNX", _ST, "onnx", _ST5, (".onnx",)),
    Consumer("sentence-transformers 5, OpenVINO", _ST, "openvino", _ST5, (".xml",)),
    Consumer("sentence-transformers 6, PyTorch", _ST, "torch", "sentence_transformers_6"),
    Consumer("optimum-onnx", "optimum_onnx", "onnx", _ST5, (".onnx",)),
    Consumer("fastembed", "fastembed", "onnx", _FASTEMBED, (".onnx",)),
    Consumer("onnxruntime", "engine_loops", "onnxruntime", _FASTEMBED, (".onnx",)),
    Consumer("openvino", "engine_loops", "openvino", _FASTEMBED, (".onnx", ".xml")),
)


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
    bundle: Path,
    environments: Path,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, Path] = MappingProxyType({}),
    on_progress: Callable[[str], None] = lambda _: None,
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
    chosen = [c for c in CONSUMERS if not only or any(c.title.lower().startswith(name.lower()) for name in only)]
    if not chosen:
        titles = "; ".join(consumer.title for consumer in CONSUMERS)
        raise InputError(f"no library is named {', '.join(only)}: known are {titles}")
    cells = []
    pythons: dict[str, Path | str] = {}  # interpreters, or why there is none
    for consumer in chosen:
        name, suffixes, floors = consumer.environment, consumer.suffixes, floors_of(consumer, manifest)
        cell = Cell(consumer=consumer.title, file="/".join(suffixes) or WEIGHTS, verdict=Verdict.NOT_OFFERED)
        reason = not_offered(consumer, manifest, bundle)
        if not floors and not reason:
            cure = "run export/to_openvino.py" if suffixes == (".xml",) else "export it again"
            reason = f"the bundle has no padded {' or '.join(suffixes)} file: {cure}"
        if reason:
            cells.append(replace(cell, reason=reason))
            continue
        if name not in pythons:
            try:
                pythons[name] = find_environment(name, REQUIREMENTS, given, environments, on_progress)
            except (PeerError, OSError) as error:
                pythons[name] = str(error)
        for file, floor in floors.items():
            python = pythons[name]
            if isinstance(python, str):
                cells.append(replace(cell, file=file, verdict=Verdict.NOT_INSTALLED, reason=python))
                continue
            on_progress(f"{consumer.title}: {file}")
            cell = replace(cell, file=file, verdict=Verdict.FAILED, floor=floor)
            try:
                cells.append(_measure(cell, floor, consumer, python, bundle.resolve(), manifest))
            except (PeerError, OSError) as error:
                cells.append(replace(cell, reason=str(error)))
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
    if consumer.library in (_ST, "fastembed") and not (bundle / "modules.json").is_file():  # they pool by themselves
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
            versions = worker.ask("packages", TIMEOUT_S)["versions"]
        vectors = np.load(output, allow_pickle=False)
    # A library that pools by itself returns floats, whatever type the graphs return.
    typed = round_vectors(vectors, spec) if np.issubdtype(vectors.dtype, np.floating) else vectors
    found = compare_canaries(components(typed, spec), canaries, floor)
    return replace(
        cell,
        verdict=Verdict.AGREES if found.verdict is CanaryVerdict.AGREES else Verdict.DIFFERS,
        reason=found.problem,
        min_cosine=found.min_cosine,
        max_abs_diff=found.max_abs_diff,
        versions=versions,
    )


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    library: Annotated[
        list[str] | None, typer.Option(help="Only this library, such as 'fastembed'; may be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Use this virtual environment; may be repeated.")
    ] = None,
    env_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="MIRROR_ENVIRONMENTS",
            help="Where the other environments are kept, made by pip when missing (3 GB in all). "
            "Default: mirror-runtime/environments in the user's cache folder.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")] = False,
) -> None:
    """Load BUNDLE in other libraries and compare their vectors."""
    given = parse_environments(env or (), "--env", {consumer.environment for consumer in CONSUMERS})
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        cells = run_consumers(
            bundle, env_dir or cache / "mirror-runtime" / "environments", only=library or (), given=given,
            on_progress=lambda line: status.update(line[:100]),
        )  # fmt: skip
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
        line = {
            "bundle": str(bundle),
            "fingerprint": read_manifest(bundle).fingerprint,
            "consumers": [asdict(cell) for cell in cells],
        }
        sys.stdout.write(json.dumps(line) + "\n")
    if any(cell.failed for cell in cells):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when every library that the bundle serves agrees, 1 when one does not, 2 on a user's mistake.
    """
    lists = {"--library": None, "--env": None}
    return run_command(application(run), argv, "benchmarks/interop.py", lists=lists)


if __name__ == "__main__":
    sys.exit(main())
