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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.environments import STAMP, existing_environment, make_environment, parse_environments
from benchmarks.workers import WorkerProcess
from mirror_runtime.bundle import (
    Canary,
    EncoderSpec,
    Layout,
    Manifest,
    Pooling,
    check_files,
    read_canaries,
    read_manifest,
)
from mirror_runtime.canaries import CanaryVerdict, compare_canaries
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError, PeerError
from mirror_runtime.host import has_bf16
from mirror_runtime.vectors import components, round_vectors

PEERS = Path(__file__).resolve().parent / "peers"
REQUIREMENTS = PEERS / "interop"

WEIGHTS_FLOOR = 0.99999
"""Of a library that runs the fp32 weights by itself."""

BF16_FLOOR = 0.9995
"""Of OpenVINO at its defaults, which computes in bf16 where the CPU has it, whatever the file holds."""

BATCH_SIZE = 4
"""Smaller than the number of texts, and several texts: padding and batching are part of the comparison."""

TIMEOUT_S = 900.0
WEIGHTS = "model.safetensors"


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


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A library as data: a new one needs a function in `peers/interop_peer.py` and an entry here.

    Attributes:
        name: of its function.
        title: as its makers write it.
        environment: names its requirements file and its folder among the environments.
        suffixes: of the padded graphs that it loads; empty if it reads the weights.
        own_pooling: it pools by itself, as `modules.json` states, instead of taking the graph's pooled output.
        lowers: it computes in bf16 where the CPU has it.
    """

    name: str
    title: str
    environment: str
    suffixes: tuple[str, ...] = ()
    own_pooling: bool = False
    lowers: bool = False


_ST5, _ST6, _FASTEMBED = "sentence_transformers_5", "sentence_transformers_6", "fastembed"

CONSUMERS = (
    Consumer(
        name="sentence_transformers_torch", title="sentence-transformers 5, PyTorch", environment=_ST5, own_pooling=True
    ),
    Consumer(
        name="sentence_transformers_onnx", title="sentence-transformers 5, ONNX", environment=_ST5, suffixes=(".onnx",),
        own_pooling=True,
    ),
    Consumer(
        name="sentence_transformers_openvino", title="sentence-transformers 5, OpenVINO", environment=_ST5,
        suffixes=(".xml",), own_pooling=True, lowers=True,
    ),
    Consumer(
        name="sentence_transformers_torch", title="sentence-transformers 6, PyTorch", environment=_ST6, own_pooling=True
    ),
    Consumer(name="optimum_onnx", title="optimum-onnx", environment=_ST5, suffixes=(".onnx",)),
    Consumer(name="fastembed", title="fastembed", environment=_FASTEMBED, suffixes=(".onnx",), own_pooling=True),
    Consumer(name="onnxruntime", title="onnxruntime", environment=_FASTEMBED, suffixes=(".onnx",)),
    Consumer(name="openvino", title="openvino", environment=_FASTEMBED, suffixes=(".onnx", ".xml"), lowers=True),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One consumer on one file.

    Attributes:
        consumer: its title.
        file: the graph, relative to the bundle; `WEIGHTS` if it reads the weights.
        verdict: how it ended.
        reason: why it did not agree.
        min_cosine: the worst canary against its stored vector; None without vectors.
        max_abs_diff: largest difference of one component; None likewise.
        floor: of the cosine.
        versions: of the packages that it ran with.
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


def default_environments() -> Path:
    """Return the folder that environments are kept in by default."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "mirror-runtime" / "environments"


def run_consumers(
    bundle: Path,
    environments: Path,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, Path] = MappingProxyType({}),
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Load a bundle unchanged in every consumer and compare the canaries' vectors.

    Args:
        bundle: the folder; nothing is written to it.
        environments: has a virtual environment for each `Consumer.environment`. A missing one is made there, 3 GB in
            all; one without our stamp is the user's own and is used as it is.
        only: beginnings of titles, in any case; empty for all.
        given: environments that the user made, by `Consumer.environment`.
        on_progress: takes a line of progress.

    Returns:
        A cell for each consumer and file.

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
    bundle, canaries, cells = bundle.resolve(), read_canaries(bundle), list[Cell]()
    pythons: dict[str, Path | str] = {}
    for consumer in chosen:
        files = list(_files(consumer, manifest))
        if reason := _not_offered(consumer, manifest, bundle) or ("" if files else _absent(consumer)):
            name = "/".join(consumer.suffixes) or WEIGHTS
            cells.append(Cell(consumer=consumer.title, file=name, verdict=Verdict.NOT_OFFERED, reason=reason))
            continue
        if (name := consumer.environment) not in pythons:
            folder = given[name] if name in given else environments / name
            pythons[name] = _python(name, folder.absolute(), on_progress, own=name in given)
        for file, floor in files:
            cell = Cell(consumer=consumer.title, file=file or WEIGHTS, verdict=Verdict.NOT_INSTALLED)
            if isinstance(python := pythons[name], str):
                cells.append(replace(cell, reason=python))
                continue
            on_progress(f"{consumer.title}: {cell.file}")
            command = (str(python), "-I", str(PEERS / "interop_peer.py"))
            attempt = replace(cell, verdict=Verdict.FAILED, floor=floor)
            cells.append(_measure(attempt, command, bundle, f"{consumer.name} {file}", canaries, manifest.encoder))
    return cells


def _files(consumer: Consumer, manifest: Manifest) -> Iterator[tuple[str, float]]:
    """List the files that a consumer loads, each with the floor of its cosine."""
    if not consumer.suffixes:
        yield "", WEIGHTS_FLOOR
        return
    lowered = BF16_FLOOR if consumer.lowers and has_bf16() else 1.0
    floors: dict[str, float] = {}
    for artifact in manifest.artifacts:
        if artifact.layout is Layout.PADDED and Path(artifact.path).suffix in consumer.suffixes:
            floors[artifact.path] = min(artifact.parity.floor, floors.get(artifact.path, lowered))
    yield from floors.items()


def _absent(consumer: Consumer) -> str:
    cure = "run export/to_openvino.py" if consumer.suffixes == (".xml",) else "export it again"
    return f"the bundle has no padded {' or '.join(consumer.suffixes)} file: {cure}"


def _not_offered(consumer: Consumer, manifest: Manifest, bundle: Path) -> str:
    """Return why a consumer cannot express the encoder; "" if it can."""
    spec = manifest.encoder
    if not (spec.template or "{text}").endswith("{text}"):
        return f"the template {spec.template!r} has words after the text, where other libraries truncate long texts"
    if consumer.own_pooling and not (bundle / "modules.json").is_file():
        return "the bundle has no modules.json, as sentence-transformers cannot express its head"
    if consumer.name == "fastembed" and (spec.pooling not in (Pooling.MEAN, Pooling.CLS) or spec.dense):
        return "fastembed supports only mean and cls pooling"
    return ""


def _python(name: str, folder: Path, on_progress: Callable[[str], None], *, own: bool) -> Path | str:
    """Return an environment's interpreter, or why there is none."""
    try:
        if own or (folder.is_dir() and not (folder / STAMP).is_file()):
            return existing_environment(folder)
        return make_environment(REQUIREMENTS / f"{name}.txt", folder, on_progress)
    except (PeerError, OSError) as error:
        return str(error)


def _measure(
    cell: Cell, command: Sequence[str], bundle: Path, backend: str, canaries: Sequence[Canary], spec: EncoderSpec
) -> Cell:
    """Complete a cell with the vectors that a consumer's own process computes."""
    assert cell.floor is not None
    texts = [canary.text for canary in canaries]
    with tempfile.TemporaryDirectory(prefix="mirror-consumer-") as folder:
        scratch = Path(folder)
        listed, output = scratch / "texts.json", scratch / "vectors.npy"
        listed.write_text(json.dumps(texts), encoding="utf-8")
        try:
            # What another release left in a hub's cache is not read.
            with WorkerProcess(command, scratch / "log", environment={"HF_HOME": folder}, folder=scratch) as worker:
                loaded = worker.ask("load", TIMEOUT_S, model=str(bundle), backend=backend, texts=str(listed))
                worker.ask("dump", TIMEOUT_S, batch_size=BATCH_SIZE, output=str(output))
        except OSError as error:
            return replace(cell, reason=f"{command[0]} cannot be started: {error.strerror}")
        except PeerError as error:
            return replace(cell, reason=str(error))
        vectors = np.load(output, allow_pickle=False)
    # A library that pools by itself returns floats, whatever type the graphs return.
    typed = round_vectors(vectors, spec) if np.issubdtype(vectors.dtype, np.floating) else vectors
    compared = compare_canaries(components(typed, spec), canaries, cell.floor)
    return replace(
        cell,
        verdict=Verdict.AGREES if compared.verdict is CanaryVerdict.AGREES else Verdict.DIFFERS,
        reason=compared.problem,
        min_cosine=compared.min_cosine,
        max_abs_diff=compared.max_abs_diff,
        versions=loaded["versions"],
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
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        cells = run_consumers(
            bundle,
            env_dir or default_environments(),
            only=library or (),
            given=given,
            on_progress=lambda line: status.update(line[:100]),
        )
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
