"""Put mixed load on `mirror serve` for a long time: does it leak, slow down, fail, or return a wrong vector?

    python benchmarks/soak.py BUNDLE --minutes 30 --output reports/soak

Writes soak.json. The last line of standard output is one JSON object with the figures.
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
from benchmarks.soak_report import SOAK_FILE, WORDS, Observed, judge, write_report
from benchmarks.workload import bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.encoder import Encoder
from mirror_runtime.folders import whole_folder

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
"""Of texts, kinds of requests and arrivals."""

TIMEOUT_S = 10.0
"""Limit of one request. At a share of the server's capacity nothing takes nearly as long."""

SHARE = 0.5
"""Of the capacity, which is offered: the server is half idle."""

CLOSED_CALLERS = 16
"""Enough to keep the server busy while the generator checks an answer."""

CAPACITY_S = 10.0
"""Length of the closed loop that measures the capacity, or a tenth of the run if that is shorter."""

_TICK_S = 0.5


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    minutes: Annotated[float, typer.Option(min=0.05, help="Of load, without start and end of the server.")] = 30.0,
    output: Annotated[Path, typer.Option(help="Folder; an older report there is replaced.")] = Path("reports/soak"),
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    texts: Annotated[Path | None, typer.Option(help="Texts, one per line. Default: Python's docstrings.")] = None,
    window: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often figures are taken.")] = 10.0,
    max_growth: Annotated[float, typer.Option(metavar="MB", help="Per hour, of memory, in the second half.")] = 30.0,
    max_drift: Annotated[float, typer.Option(min=0, help="p99 of the last third over the first third's.")] = 1.5,
) -> None:
    """Serve BUNDLE, put load on it for some minutes, and judge the result."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    host, source = describe_host(), describe_source(ROOT)
    console, observed = Console(stderr=True, soft_wrap=True, highlight=False), Observed()
    # Entered first: a folder that cannot be written is reported before the run, not after it.
    with whole_folder(output, overwrite=True, marker=SOAK_FILE) as folder, truncations_counted_elsewhere():
        tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, read_manifest(bundle).encoder.max_tokens)
        workload = load_workload(texts, tokenizer, quick=True, seed=SEED)
        columns = (*Progress.get_default_columns(), TextColumn("[dim]{task.fields[doing]}"))
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("soak", total=60 * minutes, doing="vectors in process")
            with Encoder.load(bundle, engine=engine, precision=precision) as encoder:
                expected = ExpectedVectors.compute(encoder, bundle, workload.texts, SEED)
                party = f"{encoder.engine.name.value} {encoder.engine.precision.value}"
            progress.update(task, doing="start, then the rate")
            options = ("--engine", engine, "--precision", precision)
            soak(bundle, options, expected, 60 * minutes, window, observed, partial(progress.update, task))
        facts = dict(
            started=started, host=host, source=source, workload=workload.facts,
            versions=installed_versions((*MEASURED_WITH, "nvidia-pytriton", "tritonclient")),
            bundle=bundle.resolve().name, fingerprint=expected.fingerprint, floor=expected.floor, minutes=minutes,
            share=SHARE, window_s=window, max_growth=max_growth, max_drift=max_drift,
        )  # fmt: skip
        verdicts = judge(observed, max_growth, max_drift)
        headline = write_report(folder, party, facts, observed, verdicts)
    for verdict in verdicts:
        console.print(f"{WORDS[verdict.passed]:10} {verdict.name}: {verdict.finding}", markup=False)
    word = "interrupted: partial report" if observed.partial else "report"
    console.print(f"{word} in {output / SOAK_FILE}", markup=False)
    sys.stdout.write(json.dumps({"report": str(output / SOAK_FILE), **headline}, allow_nan=False) + "\n")
    if observed.partial or not headline["passed"]:
        raise typer.Exit(130 if observed.partial else 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 within the thresholds, 1 beyond one, 2 on a user's mistake, 130 when interrupted."""
    return run_command(application(run), argv, "benchmarks/soak.py")


def soak(
    bundle: Path, options: Sequence[str], expected: ExpectedVectors, seconds: float, window_s: float,
    observed: Observed, on_progress: Callable[..., None],
) -> None:  # fmt: skip
    """Serve a bundle, put load on it, and end it. Ctrl-C ends it early and marks `observed` as partial.

    Raises:
        ServerError: the server did not start.
        PeerError: the load generator failed.
    """
    try:
        with served_bundle(bundle, *options) as server:
            try:
                with load_process(server.addresses, expected.texts, timeout_s=TIMEOUT_S, expected=expected) as load:
                    _put_load(load, server, seconds, window_s, observed, on_progress)
            finally:
                observed.ending, observed.log, observed.restarts = server.end(), server.log, server.restarts
    except KeyboardInterrupt:  # the server has ended by now; it was killed if that happened while it started or ended
        observed.partial = True


def _put_load(
    load: Load, server: ServedBundle, seconds: float, window_s: float, observed: Observed,
    on_progress: Callable[..., None],
) -> None:  # fmt: skip
    """Measure the capacity, then offer a share of it until the time is over or the server has ended."""
    before = load.closed(callers=CLOSED_CALLERS, seconds=min(CAPACITY_S, seconds / 10), seed=SEED)
    observed.capacity = before.rate
    observed.count(before)
    if not before.rate:
        return  # there is no rate to take a share of; the verdict on errors fails
    load.begin(rate=SHARE * before.rate, seconds=seconds, seed=SEED)
    began, due = time.monotonic(), 0.0

    def clock() -> float:
        return min(time.monotonic() - began, seconds)

    try:
        while clock() < seconds and server.running:
            if clock() >= due:
                observed.add(load.take())
                observed.memory.append((clock(), server.memory()))
                due += window_s
            on_progress(completed=clock(), doing=_summary(observed))
            time.sleep(max(0.0, min(_TICK_S, due - clock(), seconds - clock())))
    finally:
        observed.load_s = clock()
        end: End = "wait" if observed.load_s >= seconds and server.running else "stop"
        observed.add(load.take(end))


def _summary(observed: Observed) -> str:
    p99 = f"p99 {observed.windows[-1].p99_ms:.0f} ms, " if observed.windows else ""
    return f"{p99}{observed.memory[-1][1].get(ALL, 0.0):.0f} MB, {observed.unexpected} unexpected"


if __name__ == "__main__":
    sys.exit(main())
