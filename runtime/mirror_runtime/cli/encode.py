"""The command `mirror encode`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mirror_runtime.cli.options import (
    BundleArgument,
    ColumnOption,
    EngineOption,
    InvariantOption,
    LongTextsOption,
    PrecisionOption,
    StreamsOption,
)
from mirror_runtime.cli.run import print_json, truncations_counted_elsewhere
from mirror_runtime.corpus.corpus import BadTexts, Corpus, open_corpus
from mirror_runtime.corpus.files import Format
from mirror_runtime.encoder import Encoder
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts


class EnginePool(str, Enum):
    """Where the encoder runs."""

    LOCAL = "local"
    RAY = "ray"


def encode(
    bundle: BundleArgument,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            help="Files, folders or patterns: .parquet, or .txt (one text a line), .csv, .tsv, .jsonl, .json, these "
            "also with .gz or .zst; - is standard input.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=".npy, .parquet, or for a vector store: .faiss (index), .lance (LanceDB table), .qdrant and .sql "
            "(pgvector), which are files to load.",
            show_default=False,
        ),
    ],
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    streams: StreamsOption = None,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
    column: ColumnOption = "text",
    keep: Annotated[
        str | None, typer.Option(help="Columns to write beside the vectors, such as id,title.", metavar="NAMES")
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="Of standard input, or of files whose names do not tell it.")
    ] = None,
    bad_texts: Annotated[
        BadTexts, typer.Option(help="Rows that are not text: stop at the first, write zero vectors, or skip them.")
    ] = BadTexts.STOP,
    plan: Annotated[
        Path | None, typer.Option(help="Follow this file of mirror plan. Default: the one in the cache.")
    ] = None,
    engine_pool: Annotated[
        EnginePool,
        typer.Option(
            help="local: in this process. ray: OUT becomes a folder of Parquet files, made by --workers Ray processes. "
            "Ray listens on the machine's own address, not on loopback: keep it behind a firewall."
        ),
    ] = EnginePool.LOCAL,
    workers: Annotated[
        int, typer.Option(min=1, help="Ray processes. Each uses all cores that it may, so use one per machine.")
    ] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, such as auto. Default: start one here.")
    ] = None,
    invariant: InvariantOption = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print who chose the engine, and where the time went.")
    ] = False,
) -> None:
    """Encode a corpus: one vector a row, in order, with flat memory.

    If the command is killed or interrupted, run it again: it resumes and writes the same bytes. A million short
    sentences (14 tokens each) take 15 minutes at 1,100 a second and produce a 1.5 GB .npy file at 384 dimensions.
    """
    names = [name.strip() for name in (keep or "").split(",") if name.strip()]
    corpus = open_corpus(source, column, keep=names, declared=format_)
    load_options = {
        "engine": engine,
        "precision": precision,
        "streams": streams,
        "long_texts": long_texts.value,
        "plan": AUTO if plan is None else str(plan),
        "invariant": invariant,
    }
    print_json(
        _encode_with_ray(bundle, corpus, output, load_options, bad_texts, workers, ray_address)
        if engine_pool is EnginePool.RAY
        else _encode_here(bundle, corpus, output, load_options, bad_texts, verbose)
    )


def _encode_here(
    bundle: Path, corpus: Corpus, output: Path, load_options: Mapping[str, Any], bad_texts: BadTexts, verbose: bool
) -> dict[str, object]:
    """Encode in this process and return the report."""
    from mirror_runtime.corpus.encode_file import EncodeProgress, encode_file

    console = Console(stderr=True)
    started = time.perf_counter()
    with (
        truncations_counted_elsewhere(),
        Encoder.load(bundle, **load_options) as encoder,
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

        def on_progress(progress: EncodeProgress) -> None:
            if not resumed:
                resumed.append(progress.texts)
                if progress.texts:
                    console.print(f"resuming after {progress.texts:,} texts of an earlier run")
            bar.update(task, completed=progress.position, texts=progress.texts)

        done = encode_file(
            encoder, corpus, output, long_texts=load_options["long_texts"], bad_texts=bad_texts, on_progress=on_progress
        )
        seconds = time.perf_counter() - started
        if verbose:
            _print_timings(console, encoder, seconds)
    if done.truncated:
        console.print(
            f"{done.truncated:,} of {done.texts:,} texts were truncated; --long-texts chunk keeps all of a text"
        )
    if done.failed:
        what = "are left out" if bad_texts is BadTexts.SKIP else "have zero vectors"
        console.print(f"{done.failed:,} of {done.texts:,} rows could not be encoded and {what}")
    return {
        "output": str(output),
        "texts": done.texts,
        "dim": encoder.spec.dim,
        "vector_type": encoder.spec.vector_type.value,
        "truncated": done.truncated,
        "failed": done.failed,
        "resumed_after": resumed[0],
        "seconds": round(seconds, 3),
        "engine": chosen,
        "chosen_by": encoder.decision.source.value,
        "fingerprint": encoder.manifest.fingerprint,
    }


def _encode_with_ray(
    bundle: Path,
    corpus: Corpus,
    output: Path,
    load_options: Mapping[str, Any],
    bad_texts: BadTexts,
    workers: int,
    ray_address: str | None,
) -> dict[str, object]:
    """Encode with a pool of Ray workers and return the report."""
    from mirror_runtime.corpus.encode_ray import encode_with_ray

    started = time.perf_counter()
    columns = (TextColumn("encoding with Ray"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=max(1, corpus.size))
        done = encode_with_ray(
            bundle,
            corpus,
            output,
            workers=workers,
            load_options=load_options,
            bad_texts=bad_texts,
            address=ray_address,
            on_progress=lambda progress: bar.update(task, completed=progress.position),
        )
    return {
        "output": str(output),
        "texts": done.texts,
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _print_timings(console: Console, encoder: Encoder, seconds: float) -> None:
    """Print where the time of this run went. Its stages overlap, and the engine's is summed over its streams."""
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
