"""Put mixed load on `mirror serve` for a long time: does it leak, slow down, fail, or return a wrong vector?

    python benchmarks/soak.py BUNDLE --minutes 30 --output reports/soak

Writes soak.json, soak.md and soak.png. The last line of standard output is one JSON object with the figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from benchmarks.load.generator import End, Load, load_process
from benchmarks.load.requests import ExpectedVectors
from benchmarks.load.servers import ALL, ServedBundle, served_bundle
from benchmarks.machine.host import MEASURED_WITH, describe_host, describe_source, installed_versions
from benchmarks.report.statistics import percentile
from benchmarks.soak_report import MARKDOWN_FILE, SOAK_FILE, WORDS, Observed, Settings, judge, write_files
from benchmarks.workload import bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.encoder import Encoder
from mirror_runtime.folders import whole_folder

ROOT = Path(__file__).resolve().parents[1]

TIMEOUT_S = 10.0
"""Limit of one request. At a share of the server's capacity nothing takes nearly as long."""

CLOSED_CALLERS = 16
"""Enough to keep the server busy while the generator checks an answer."""

CAPACITY_S = 10.0
"""Length of the closed loop that measures the capacity, or a tenth of the run if that is shorter."""

_TICK_S = 0.5


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    minutes: Annotated[float, typer.Option(min=0.05, help="Of load, without start and end of the server.")] = 30.0,
    output: Annotated[Path, typer.Option(help="Folder of the report; an older one there is replaced.")] = Path(
        "reports/soak"
    ),
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of the rate measured first: 0.5 leaves the server half idle.")
    ] = 0.5,
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one per line. Default: docstrings of the standard library.")
    ] = None,
    window: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often figures are taken.")] = 10.0,
    max_growth: Annotated[
        float, typer.Option(metavar="MB", help="Per hour, of resident memory, over the second half of the run.")
    ] = 30.0,
    max_drift: Annotated[
        float, typer.Option(min=0, help="p99 of the last third over the first third's: 1.5 allows half as much again.")
    ] = 1.5,
    max_unexpected: Annotated[int, typer.Option(min=0, help="Requests that may end as none should.")] = 0,
    seed: Annotated[int, typer.Option(help="Of texts, kinds of requests and arrivals.")] = 0,
) -> None:
    """Serve BUNDLE, put load on it for some minutes, and judge the result."""
    settings = Settings(
        engine=engine, precision=precision, minutes=minutes, share=share, window_s=window, max_growth=max_growth,
        max_drift=max_drift, max_unexpected=max_unexpected, seed=seed,
    )  # fmt: skip
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = installed_versions((*MEASURED_WITH, "nvidia-pytriton", "tritonclient"))
    host, source = describe_host(), describe_source(ROOT)
    console, observed = Console(stderr=True, soft_wrap=True, highlight=False), Observed()
    # Entered first: a folder that cannot be written is reported before the run, not after it.
    with whole_folder(output, overwrite=True, marker=SOAK_FILE) as folder, truncations_counted_elsewhere():
        manifest = read_manifest(bundle)
        tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
        workload = load_workload(texts, tokenizer, quick=True, seed=seed)
        columns = (*Progress.get_default_columns(), TextColumn("[dim]{task.fields[doing]}"))
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("soak", total=60 * minutes, doing="vectors in process")
            with Encoder.load(bundle, engine=engine, precision=precision) as encoder:
                expected = ExpectedVectors.compute(encoder, bundle, workload.texts, seed)
                party = f"{encoder.engine.name.value} {encoder.engine.precision.value}"
            progress.update(task, doing="start, then the rate")
            soak(bundle, expected, settings, observed, partial(progress.update, task))
        facts = dict(
            started=started, host=host, source=source, versions=versions, workload=workload.facts,
            bundle=bundle.resolve().name, fingerprint=expected.fingerprint, floor=expected.floor,
            canaries=expected.canaries,
        )  # fmt: skip
        headline = write_files(folder, party, settings, facts, observed)
    for verdict in judge(observed, settings):
        console.print(f"{WORDS[verdict.passed]:10} {verdict.name}: {verdict.finding}", markup=False)
    word = "interrupted: partial report" if observed.partial else "report"
    console.print(f"{word} in {output / MARKDOWN_FILE}", markup=False)
    sys.stdout.write(json.dumps({"report": str(output / SOAK_FILE), **headline}, allow_nan=False) + "\n")
    if observed.partial or not headline["passed"]:
        raise typer.Exit(130 if observed.partial else 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 within the thresholds, 1 beyond one, 2 on a user's mistake, 130 when interrupted.
    """
    return run_command(application(run), argv, "benchmarks/soak.py")


def soak(
    bundle: Path, expected: ExpectedVectors, settings: Settings, observed: Observed, on_progress: Callable[..., None]
) -> None:
    """Serve a bundle, put load on it, and end it. Ctrl-C ends it early and marks `observed` as partial.

    Raises:
        ServerError: the server did not start.
        PeerError: the load generator failed.
    """
    try:
        with served_bundle(bundle, "--engine", settings.engine, "--precision", settings.precision) as server:
            try:
                with load_process(server.addresses, expected.texts, timeout_s=TIMEOUT_S, expected=expected) as load:
                    _put_load(load, server, settings, observed, on_progress)
            finally:
                observed.ending, observed.log, observed.restarts = server.end(), server.log, server.restarts
    except KeyboardInterrupt:  # the server has ended by now; it was killed if that happened while it started or ended
        observed.partial = True


def _put_load(
    load: Load, server: ServedBundle, settings: Settings, observed: Observed, on_progress: Callable[..., None]
) -> None:
    """Measure the capacity, then offer a share of it until the time is over or the server has ended."""
    seconds = 60 * settings.minutes
    observed.before = load.closed(callers=CLOSED_CALLERS, seconds=min(CAPACITY_S, seconds / 10), seed=settings.seed)
    if not observed.before.rate:
        return  # there is no rate to take a share of; the verdict on errors fails
    load.begin(rate=settings.share * observed.before.rate, seconds=seconds, seed=settings.seed)
    began = time.monotonic()

    def clock() -> float:
        return min(time.monotonic() - began, seconds)

    def add(end: End = "") -> None:
        if (window := load.take(end)).requests:
            observed.windows.append(window)

    try:
        observed.memory.append((clock(), server.memory()))
        due = settings.window_s
        while clock() < seconds and server.running:
            time.sleep(max(0.0, min(_TICK_S, due - clock(), seconds - clock())))
            if clock() >= due:
                add()
                observed.memory.append((clock(), server.memory()))
                due += settings.window_s
            on_progress(completed=clock(), doing=_summary(observed))
    finally:
        observed.load_s = clock()
        add("wait" if observed.load_s >= seconds and server.running else "stop")


def _summary(observed: Observed) -> str:
    times = observed.windows[-1].times_ms if observed.windows else ()
    p99 = f"p99 {percentile(times, 99):.0f} ms, " if times else ""
    return f"{p99}{observed.memory[-1][1].get(ALL, 0.0):.0f} MB, {observed.unexpected} unexpected"


if __name__ == "__main__":
    sys.exit(main())
