"""The `mirror` command: encode files, verify bundles, look at the machine, serve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mirror_runtime.bundle import EngineName, Precision, read_manifest
from mirror_runtime.cli import deploy as deploy_command
from mirror_runtime.cli import gateway as gateway_command
from mirror_runtime.cli import plan as plan_command
from mirror_runtime.cli import serve as triton_command
from mirror_runtime.cli.run import run_command, truncations_counted_elsewhere
from mirror_runtime.consumers.matrix import Cell, default_environments, run_consumers
from mirror_runtime.corpus.files import CorpusFile
from mirror_runtime.encoder import Encoder
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.verify import Check
from mirror_runtime.verify import verify as check_bundle

app = typer.Typer(
    help="Text to vectors you can prove: run the bundles that export/to_onnx.py writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EngineOption = Annotated[
    str,
    typer.Option(
        help=f"auto, {', '.join(e.value for e in EngineName if e is not EngineName.FAKE)}. What is named runs or fails."
    ),
]
PrecisionOption = Annotated[str, typer.Option(help=f"auto, {', '.join(p.value for p in Precision)}.")]
StreamsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Batches in flight. Default: the engine's choice, on 8 cores 8 for openvino, 1 for onnxruntime."
    ),
]
BundleArgument = Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)]


class BadTexts(str, Enum):
    """What `mirror encode` does with a row that cannot be encoded."""

    STOP = "stop"
    ZERO = "zero"


class EnginePool(str, Enum):
    """Where `mirror encode` computes."""

    LOCAL = "local"
    RAY = "ray"


@app.command()
def encode(
    bundle: BundleArgument,
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help=".txt (one text a line), .jsonl or .parquet.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".npy or .parquet.", show_default=False)],
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    streams: StreamsOption = None,
    long_texts: Annotated[
        LongTexts,
        typer.Option(
            help="For texts over the encoder's limit. With 256: a text of 600 tokens gives 1 cut vector, "
            "an error, or the mean of 3 chunks' vectors."
        ),
    ] = LongTexts.TRUNCATE,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    bad_texts: Annotated[
        BadTexts,
        typer.Option(help="Rows that are no text: stop at the first, or give them zero vectors and count them."),
    ] = BadTexts.STOP,
    plan: Annotated[
        Path | None,
        typer.Option(help="A file of mirror plan to follow. Default: the one in the cache.", show_default=False),
    ] = None,
    engine_pool: Annotated[
        EnginePool,
        typer.Option(
            help="local: in this process. ray: OUT becomes a folder of Parquet files, made by --workers Ray processes. "
            "Ray listens on the machine's own address, not on loopback: keep it behind a firewall."
        ),
    ] = EnginePool.LOCAL,
    workers: Annotated[
        int, typer.Option(min=1, help="Ray processes; each uses all cores it may, so one a machine is right.")
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, such as auto. Default: start one here.", show_default=False),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also say who chose the engine, and where the time went.")
    ] = False,
) -> None:
    """Encode a corpus file: one vector a row, in order, with flat memory.

    Killed or interrupted, the same command goes on where it was and writes the same bytes. A million short sentences
    (14 tokens each) take 15 minutes at 1,100 a second and give an .npy of 1.5 GB at 384 dimensions.
    """
    from mirror_runtime.corpus.encode_file import Progress as Done
    from mirror_runtime.corpus.encode_file import encode_file

    if engine_pool is EnginePool.RAY:
        options = {
            "engine": engine,
            "precision": precision,
            "streams": streams,
            "long_texts": long_texts.value,
            "plan": "auto" if plan is None else str(plan),
        }
        _encode_with_ray(
            bundle, CorpusFile(path=source, column=text_column), output, workers, options, bad_texts, ray_address
        )
        return
    console = Console(stderr=True)
    corpus = CorpusFile(path=source, column=text_column)
    started = time.perf_counter()
    with (
        truncations_counted_elsewhere(),
        Encoder.load(
            bundle,
            engine=engine,
            precision=precision,
            streams=streams,
            long_texts=long_texts,
            plan="auto" if plan is None else plan,
        ) as encoder,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[texts]:,} texts"),
            TimeRemainingColumn(),
            console=console,
        ) as bar,
    ):
        chosen = f"{encoder.engine.name.value} {encoder.engine.precision.value}, {encoder.engine.streams} streams"
        task = bar.add_task(f"encoding ({chosen})", total=max(1, corpus.size), texts=0)
        resumed: list[int] = []

        def report(done: Done) -> None:
            if not resumed:
                resumed.append(done.texts)
                if done.texts:
                    console.print(f"going on after {done.texts:,} texts of an earlier run")
            bar.update(task, completed=done.position, texts=done.texts)

        done = encode_file(
            encoder, corpus, output, long_texts=long_texts.value, zero_bad=bad_texts is BadTexts.ZERO, report=report
        )
        seconds = time.perf_counter() - started
        spec = encoder.spec
        fingerprint = encoder.manifest.fingerprint
        if verbose:
            _print_timings(console, encoder, seconds)
    if done.truncated:
        console.print(
            f"{done.truncated:,} of {done.texts:,} texts were truncated; --long-texts chunk keeps all of a text"
        )
    if done.failed:
        console.print(f"{done.failed:,} of {done.texts:,} rows could not be encoded and have zero vectors")
    _print_json(
        {
            "output": str(output),
            "texts": done.texts,
            "dim": spec.dim,
            "vector_type": spec.vector_type.value,
            "truncated": done.truncated,
            "failed": done.failed,
            "resumed_after": resumed[0],
            "seconds": round(seconds, 3),
            "engine": chosen,
            "chosen_by": encoder.decision.source.value,
            "fingerprint": fingerprint,
        }
    )


def _encode_with_ray(
    bundle: Path,
    corpus: CorpusFile,
    output: Path,
    workers: int,
    options: Mapping[str, object],
    bad_texts: BadTexts,
    address: str | None,
) -> None:
    from mirror_runtime.corpus.encode_ray import encode_with_ray

    console = Console(stderr=True)
    started = time.perf_counter()
    with Progress(TextColumn("encoding with Ray"), BarColumn(), TaskProgressColumn(), console=console) as bar:
        task = bar.add_task("", total=max(1, corpus.size))
        done = encode_with_ray(
            bundle,
            corpus,
            output,
            workers=workers,
            options=options,
            zero_bad=bad_texts is BadTexts.ZERO,
            address=address,
            report=lambda now: bar.update(task, completed=now.position),
        )
    seconds = round(time.perf_counter() - started, 3)
    _print_json({"output": str(output), "texts": done.texts, "workers": workers, "seconds": seconds})


def _print_timings(console: Console, encoder: Encoder, seconds: float) -> None:
    """Say where the time of this run went; its stages overlap, and the engine's is summed over its streams."""
    stats = encoder.stats
    console.print(f"chosen by {encoder.decision.source.value}; rows of {encoder.rows}")
    console.print(
        f"{stats.tokens:,} tokens in {seconds:.1f} s, {stats.tokens / max(seconds, 1e-9):,.0f} a second; "
        f"rows {100 * stats.fill:.1f} % full; {stats.executions:,} batches"
    )
    console.print(
        f"tokenise {stats.tokenize_s:.2f} s, pack {stats.pack_s:.2f} s, infer {stats.infer_s:.2f} s "
        f"on {encoder.engine.streams} streams, unpack {stats.unpack_s:.2f} s"
    )


@app.command()
def verify(
    bundle: BundleArgument,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="The vector space that is wanted, such as the one an index was made with: another one is an error.",
            show_default=False,
        ),
    ] = None,
    consumers: Annotated[
        bool,
        typer.Option(
            "--consumers",
            help="Also load the bundle in sentence-transformers, optimum-onnx, fastembed, onnxruntime and openvino, "
            "each in an environment of its own, and compare their vectors.",
        ),
    ] = False,
    environments: Annotated[
        Path | None,
        typer.Option(
            envvar="MIRROR_ENVIRONMENTS",
            help="Where those environments are kept, made by pip when missing (3 GB in all). "
            "Default: mirror-runtime/environments in the user's cache folder.",
            show_default=False,
        ),
    ] = None,
    consumer: Annotated[
        list[str] | None,
        typer.Option(help="Only this consumer, such as 'fastembed'; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Check a bundle's files against their hashes, and its canaries' vectors on this machine's engines.

    Exit status: 0 when everything that can run here agrees, 1 when vectors drifted, nothing could run or a consumer
    disagrees or cannot be installed, 2 when the bundle is missing, corrupted or another model than it should be.
    """
    with truncations_counted_elsewhere():  # a canary is too long on purpose
        checks = check_bundle(bundle, expected_fingerprint=fingerprint)
    manifest = read_manifest(bundle)
    console = Console(stderr=True, highlight=False)
    console.print(_checks_table(checks))
    cells = _consumers(bundle, environments, consumer or (), console) if consumers or consumer else ()
    ran = [check for check in checks if check.ran]
    failed = [check for check in ran if not check.agrees]
    disagreeing = [cell for cell in cells if cell.failed]
    _print_json(
        {
            "bundle": str(bundle),
            "fingerprint": manifest.fingerprint,
            "files": len(manifest.files),
            "ran": len(ran),
            "failed": len(failed),
            "not_run": len(checks) - len(ran),
            "artifacts": [
                {
                    "path": check.artifact.path,
                    "engine": check.artifact.engine.value,
                    "precision": check.artifact.precision.value,
                    "verdict": check.comparison.verdict.value if check.comparison else "not run",
                    "min_cosine": check.comparison.min_cosine if check.comparison else None,
                    "floor": check.artifact.parity.floor,
                    "problem": check.problem,
                }
                for check in checks
            ],
            "consumers": [asdict(cell) for cell in cells],
        }
    )
    if failed or not ran or disagreeing:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what this machine can run, and name known traps. Exit status 1 when there is a problem."""
    from mirror_runtime.cli.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        _print_json(asdict(diagnosis))
    else:
        console = Console()
        for title, facts in (
            ("machine", diagnosis.machine),
            ("packages", {k: v or "not installed" for k, v in diagnosis.packages.items()}),
            ("can run", diagnosis.abilities),
        ):
            table = Table(title=title, show_header=False, title_justify="left", box=None)
            for name, value in facts.items():
                table.add_row(f"  {name}", value)
            console.print(table)
        for problem in diagnosis.problems:
            console.print(f"[red]problem:[/] {problem}")
        if not diagnosis.problems:
            console.print("no problems found")
    if diagnosis.problems:
        raise typer.Exit(1)


app.command("plan")(plan_command.plan)
app.command("serve")(triton_command.serve)
app.command("gateway")(gateway_command.gateway)
app.command("deploy")(deploy_command.deploy)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 when a check failed, 2 on a mistake of the caller's, 130 when interrupted.
    """
    return run_command(app, argv, "mirror")


def _checks_table(checks: Sequence[Check]) -> Table:
    table = Table("runs", "loads", "when made", "here", "floor", "verdict", padding=(0, 0))
    for check in checks:
        artifact = check.artifact
        cosine = check.comparison.min_cosine if check.comparison else None
        table.add_row(
            f"{artifact.engine.value} {artifact.precision.value}",
            Path(artifact.path).name,
            f"{artifact.parity.min_cosine:.6f}",
            "" if cosine is None else f"{cosine:.6f}",
            str(artifact.parity.floor),
            (check.problem or "agrees") if check.ran else f"not run: {check.problem}",
        )
    return table


def _consumers(bundle: Path, environments: Path | None, only: Sequence[str], console: Console) -> tuple[Cell, ...]:
    """Run the consumers' matrix, with a line of progress below the rows that are known."""
    folder = environments or default_environments()
    with console.status(f"environments in {folder}") as status:
        cells = tuple(run_consumers(bundle, folder, only=only, say=lambda line: status.update(line[:100])))
    table = Table("consumer", "loads", "cosine", "floor", "verdict", padding=(0, 0))
    for cell in cells:
        table.add_row(
            cell.consumer,
            Path(cell.file).name,
            "" if cell.min_cosine is None else f"{cell.min_cosine:.6f}",
            "" if cell.floor is None else str(cell.floor),
            cell.verdict.value,
        )
    console.print(table)
    for cell in cells:
        if cell.reason:
            console.print(f"{cell.consumer}, {cell.file}: {cell.reason}", soft_wrap=True, markup=False)
    return cells


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    sys.exit(main())
