"""The consumers' matrix: each library, in its own environment, on each file of the bundle that it can load."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from mirror_runtime import canaries as comparing
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
from mirror_runtime.environments import STAMP, existing_environment, make_environment
from mirror_runtime.errors import InputError, PeerError
from mirror_runtime.host import has_bf16
from mirror_runtime.vectors import components, round_vectors

HERE = Path(__file__).resolve().parent

WEIGHTS_FLOOR = 0.99999
"""Of a library that runs the fp32 weights by itself."""

BF16_FLOOR = 0.9995
"""Of OpenVINO at its defaults, which computes in bf16 where the CPU has it, whatever the file holds."""

TIMEOUT_S = 900.0


class Verdict(str, Enum):
    """How a cell ended."""

    AGREES = "agrees"
    DIFFERS = "differs"
    """It loaded the bundle and its vectors are others."""
    FAILED = "failed"
    """It could not load the bundle, or not encode."""
    NOT_INSTALLED = "not installed"
    """Its environment could not be made: nothing is known of it."""
    NOT_OFFERED = "not offered"
    """The bundle holds nothing for it, or it cannot express this encoder's head."""


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A library as data: adding one needs a function in `worker.py` and a line here.

    Attributes:
        name: of its function in `worker.py`.
        title: as its makers write it.
        environment: names its requirements file here and its folder among the environments.
        suffixes: of the padded graphs it loads; empty for one that reads the weights.
        own_pooling: it pools by itself, as `modules.json` tells it, instead of taking the graph's pooled output.
        lowers: it computes in bf16 where the CPU has it.
    """

    name: str
    title: str
    environment: str
    suffixes: tuple[str, ...] = ()
    own_pooling: bool = False
    lowers: bool = False


CONSUMERS = (
    Consumer(
        name="sentence_transformers_torch",
        title="sentence-transformers 5, PyTorch",
        environment="sentence_transformers_5",
        own_pooling=True,
    ),
    Consumer(
        name="sentence_transformers_onnx",
        title="sentence-transformers 5, ONNX",
        environment="sentence_transformers_5",
        suffixes=(".onnx",),
        own_pooling=True,
    ),
    Consumer(
        name="sentence_transformers_openvino",
        title="sentence-transformers 5, OpenVINO",
        environment="sentence_transformers_5",
        suffixes=(".xml",),
        own_pooling=True,
        lowers=True,
    ),
    Consumer(
        name="sentence_transformers_torch",
        title="sentence-transformers 6, PyTorch",
        environment="sentence_transformers_6",
        own_pooling=True,
    ),
    Consumer(name="optimum_onnx", title="optimum-onnx", environment="sentence_transformers_5", suffixes=(".onnx",)),
    Consumer(name="fastembed", title="fastembed", environment="fastembed", suffixes=(".onnx",), own_pooling=True),
    Consumer(name="onnxruntime", title="onnxruntime", environment="fastembed", suffixes=(".onnx",)),
    Consumer(name="openvino", title="openvino", environment="fastembed", suffixes=(".onnx", ".xml"), lowers=True),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One consumer on one file.

    Attributes:
        consumer: its title.
        file: the graph, relative to the bundle; "model.safetensors" where it reads the weights.
        verdict: how it ended.
        reason: why, where it did not agree.
        min_cosine: the worst canary against its stored vector; None where there are no vectors.
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
    """Give the folder that environments are kept in unless the caller names one."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "mirror-runtime" / "environments"


def run_consumers(
    bundle: Path,
    environments: Path,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Cell]:
    """Load a bundle unchanged in every consumer and compare the canaries' vectors.

    Args:
        bundle: the folder; nothing is written to it.
        environments: holds a virtual environment for each `Consumer.environment`. One that is missing is made there,
            several GB in all; one without our stamp is the caller's own and is used as it is.
        only: titles of consumers start with one of these, in any case of letters; empty for all.
        say: takes a line of progress.

    Yields:
        A cell for each consumer and file, as soon as it is known.

    Raises:
        BundleError: the folder is no bundle or is corrupted.
        InputError: `only` names no consumer.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    chosen = [c for c in CONSUMERS if not only or any(c.title.lower().startswith(name.lower()) for name in only)]
    if not chosen:
        raise InputError(f"no consumer is named {', '.join(only)}: there are {'; '.join(c.title for c in CONSUMERS)}")
    return _run(bundle.resolve(), manifest, environments.absolute(), chosen, say)


def _run(
    bundle: Path, manifest: Manifest, environments: Path, chosen: Sequence[Consumer], say: Callable[[str], None]
) -> Iterator[Cell]:
    canaries = read_canaries(bundle)
    pythons: dict[str, Path | str] = {}
    for consumer in chosen:
        files = list(_files(consumer, manifest))
        reason = _not_offered(consumer, manifest, bundle) or ("" if files else _absent(consumer))
        if reason:
            name = "/".join(consumer.suffixes) or "model.safetensors"
            yield Cell(consumer=consumer.title, file=name, verdict=Verdict.NOT_OFFERED, reason=reason)
            continue
        if consumer.environment not in pythons:
            pythons[consumer.environment] = _python(environments, consumer.environment, say)
        python = pythons[consumer.environment]
        for file, floor in files:
            shown = file or "model.safetensors"
            if isinstance(python, str):
                yield Cell(consumer=consumer.title, file=shown, verdict=Verdict.NOT_INSTALLED, reason=python)
            else:
                say(f"{consumer.title}: {shown}")
                yield _cell(consumer, bundle, file, floor, python, canaries, manifest.encoder)


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
    """Say why a consumer cannot express the encoder; "" where it can."""
    spec = manifest.encoder
    if not (spec.template or "{text}").endswith("{text}"):
        return f"the template {spec.template!r} goes on behind the text, where other libraries cut long ones"
    if consumer.own_pooling and not (bundle / "modules.json").is_file():
        return "the bundle has no modules.json, since sentence-transformers cannot express its head"
    if consumer.name == "fastembed" and (spec.pooling not in (Pooling.MEAN, Pooling.CLS) or spec.dense):
        return "fastembed pools with mean or cls alone"
    return ""


def _python(environments: Path, name: str, say: Callable[[str], None]) -> Path | str:
    """Give an environment's interpreter, or why there is none."""
    folder = environments / name
    try:
        if folder.is_dir() and not (folder / STAMP).is_file():
            return existing_environment(folder)
        return make_environment(HERE / f"{name}.txt", folder, say)
    except (PeerError, OSError) as error:
        return str(error)


def _cell(
    consumer: Consumer,
    bundle: Path,
    file: str,
    floor: float,
    python: Path,
    canaries: Sequence[Canary],
    spec: EncoderSpec,
) -> Cell:
    cell = Cell(consumer=consumer.title, file=file or "model.safetensors", verdict=Verdict.FAILED, floor=floor)
    with tempfile.TemporaryDirectory(prefix="mirror-consumer-") as scratch:
        texts, output = Path(scratch) / "texts.json", Path(scratch) / "vectors.npy"
        texts.write_text(json.dumps([canary.text for canary in canaries]), encoding="utf-8")
        worker = [str(python), "-I", str(HERE / "worker.py"), consumer.name]
        try:
            done = subprocess.run(
                [*worker, str(bundle), file, str(texts), str(output)],
                capture_output=True,
                text=True,
                errors="replace",
                # No hub is asked for anything, and what another release left in a cache is not read.
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": scratch},
                cwd=scratch,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return replace(cell, reason=f"it took more than {TIMEOUT_S:.0f} seconds")
        except OSError as error:
            return replace(cell, reason=f"{python} cannot be started: {error.strerror}")
        answer = _answer(done)
        if "error" in answer:
            return replace(cell, reason=answer["error"])
        vectors = np.load(output, allow_pickle=False)
    # A library that pools by itself gives floats, whatever the graphs give.
    typed = round_vectors(vectors, spec) if np.issubdtype(vectors.dtype, np.floating) else vectors
    compared = comparing.compare(components(typed, spec), canaries, floor)
    return replace(
        cell,
        verdict=Verdict.AGREES if compared.verdict is comparing.Verdict.AGREES else Verdict.DIFFERS,
        reason=compared.problem,
        min_cosine=compared.min_cosine,
        max_abs_diff=compared.max_abs_diff,
        versions=answer["versions"],
    )


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Read a worker's last line; one that died without it is described by its own last words."""
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        return answer
    words = done.stderr.strip().splitlines() or ["it said nothing"]
    return {"error": f"ended with status {done.returncode}: {words[-1]}"}
