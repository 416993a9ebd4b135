"""Put mixed load on `mirror serve` for a long time: does it leak, slow down, fail, or give a wrong vector?

    python benchmarks/soak.py BUNDLE --minutes 30 --output reports/soak

Writes soak.json, soak.md and soak.png. The last line of standard output is one JSON object with the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.host import MEASURED_WITH, describe_host, describe_source, installed_versions
from benchmarks.soak_report import MARKDOWN_FILE, headline, write_files
from benchmarks.soak_results import SOAK_FILE, Settings, Thresholds
from benchmarks.soak_run import Seen, build_report, prepare, soak
from benchmarks.workload import bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.folders import whole_folder

ROOT = Path(__file__).resolve().parents[1]


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    minutes: Annotated[float, typer.Option(min=0.05, help="Of load; start and end of the server come on top.")] = 30.0,
    output: Annotated[Path, typer.Option(help="Folder of the report; an older one there is replaced.")] = Path(
        "reports/soak"
    ),
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of the rate measured at first: 0.5 leaves the server half idle.")
    ] = 0.5,
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line. Default: docstrings of the standard library.")
    ] = None,
    window: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often figures are taken.")] = 10.0,
    max_growth: Annotated[
        float, typer.Option(metavar="MB", help="An hour, of resident memory, over the second half of the run.")
    ] = 30.0,
    max_drift: Annotated[
        float, typer.Option(min=0, help="p99 of the last third over the first third's: 1.5 allows half as much again.")
    ] = 1.5,
    max_unexpected: Annotated[int, typer.Option(min=0, help="Requests that may end as none may.")] = 0,
    seed: Annotated[int, typer.Option(help="Of texts, kinds of requests and moments of arrival.")] = 0,
) -> None:
    """Serve BUNDLE, put load on it for some minutes, and judge what was seen."""
    settings = Settings(
        engine=engine,
        precision=precision,
        minutes=minutes,
        share=share,
        window_s=window,
        seed=seed,
        thresholds=Thresholds(growth_mb_per_hour=max_growth, drift=max_drift, unexpected=max_unexpected),
    )
    started, host = datetime.now(timezone.utc).isoformat(timespec="seconds"), describe_host()
    versions, source = installed_versions((*MEASURED_WITH, "nvidia-pytriton", "tritonclient")), describe_source(ROOT)
    console, seen = Console(stderr=True, soft_wrap=True, highlight=False), Seen()
    # Entered first: a folder that cannot be written is told before the run, not after it.
    with whole_folder(output, overwrite=True, marker=SOAK_FILE) as folder, truncations_counted_elsewhere():
        manifest = read_manifest(bundle)
        tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
        workload = load_workload(texts, tokenizer, quick=True, seed=seed)
        with _progress(console) as progress:
            task = progress.add_task("soak", total=60 * minutes, doing="vectors in process")
            served = prepare(bundle, workload, settings)
            progress.update(task, doing="start, then the rate")
            soak(bundle, served, settings, seen, lambda at, doing: progress.update(task, completed=at, doing=doing))
        report = build_report(
            served, workload, settings, seen, started=started, host=host, versions=versions, source=source
        )
        write_files(report, folder)
    for verdict in report.verdicts:
        console.print(f"{_WORDS[verdict.passed]:10} {verdict.name}: {verdict.says}", markup=False)
    console.print(
        f"{'interrupted: partial report' if seen.partial else 'report'} in {output / MARKDOWN_FILE}", markup=False
    )
    sys.stdout.write(headline(report, output) + "\n")
    if seen.partial or not report.passed:
        raise typer.Exit(130 if seen.partial else 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 within the thresholds, 1 beyond one, 2 on a mistake of the caller's, 130 when interrupted.
    """
    return run_command(application(run), argv, "benchmarks/soak.py")


_WORDS = {True: "passed", False: "FAILED", None: "not judged"}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[doing]}"),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
