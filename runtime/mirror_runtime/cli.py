"""The `mirror` command: encode files, verify bundles, look at the machine, serve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.commandline import run_command, truncations_counted_elsewhere
from mirror_runtime.encoder import Encoder
from mirror_runtime.tokens import LongTexts
from mirror_runtime.triton import command as triton_command

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
) -> None:
    """Encode a corpus file: one vector a row, in order, with flat memory.

    Killed or interrupted, the same command goes on where it was and writes the same bytes. A million short sentences
    (14 tokens each) take 15 minutes at 1,100 a second and give an .npy of 1.5 GB at 384 dimensions.
    """
    from mirror_runtime.job import Progress as Done
    from mirror_runtime.job import encode_file
    from mirror_runtime.sources import Source

    console = Console(stderr=True)
    corpus = Source(path=source, column=text_column)
    started = time.perf_counter()
    with (
        truncations_counted_elsewhere(),
        Encoder.load(bundle, engine=engine, precision=precision, streams=streams, long_texts=long_texts) as encoder,
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
        dim = encoder.spec.dim
        fingerprint = encoder.manifest.fingerprint
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
            "dim": dim,
            "truncated": done.truncated,
            "failed": done.failed,
            "resumed_after": resumed[0],
            "seconds": round(seconds, 3),
            "engine": chosen,
            "fingerprint": fingerprint,
        }
    )


@app.command()
def verify(bundle: BundleArgument) -> None:
    """Check a bundle's files against their hashes, and its canaries' vectors on this machine's engines.

    Exit status: 0 when everything that can run here agrees, 1 when vectors drifted or nothing could run, 2 when the
    bundle is missing or corrupted.
    """
    from mirror_runtime.bundle import read_manifest
    from mirror_runtime.verify import verify as run

    checks = run(bundle)
    manifest = read_manifest(bundle)
    table = Table("engine", "precision", "min cosine when made", "floor", "canaries here", "verdict")
    for check in checks:
        artifact = check.artifact
        verdict = check.problem or "agrees"
        table.add_row(
            artifact.engine.value,
            artifact.precision.value,
            f"{artifact.parity.min_cosine:.6f}",
            str(artifact.parity.floor),
            "not run" if check.min_cosine is None else f"{check.min_cosine:.6f}",
            verdict if check.ran else f"not run: {verdict}",
        )
    Console(stderr=True).print(table)
    failed = [c for c in checks if c.ran and c.problem]
    ran = [c for c in checks if c.ran]
    _print_json(
        {
            "bundle": str(bundle),
            "fingerprint": manifest.fingerprint,
            "files": len(manifest.files),
            "ran": len(ran),
            "failed": len(failed),
            "not_run": len(checks) - len(ran),
        }
    )
    if failed or not ran:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what this machine can run, and name known traps. Exit status 1 when there is a problem."""
    from mirror_runtime.doctor import diagnose

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


app.command("serve")(triton_command.serve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 when a check failed, 2 on a mistake of the caller's, 130 when interrupted.
    """
    return run_command(app, argv, "mirror")


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    sys.exit(main())
