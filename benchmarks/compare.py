"""Compare two benchmark reports, or two sets of them, and say what changed beyond the noise.

    python benchmarks/compare.py BASE HEAD [--threshold 0.07] [--output comparison.md]

BASE and HEAD are report folders, or folders of report folders: several runs of each side that took turns (A B A B) see
the drift between processes, which the rounds inside one run cannot. A change counts when it is larger than the
threshold and than what each side's own runs are apart, on average; with a single run on a side, than 35 %. Times beside
which a yardstick was measured are held against each other in its units, so that a machine that others slow down
meanwhile is no change. Exit status 1 when something got worse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.changes import CONFIDENCE, POINTS, Change, Verdict, quality_changes
from benchmarks.results import REPORT_FILE, Report, read_report
from benchmarks.summary import BOOTSTRAP_DRAWS
from benchmarks.timed import Timed, timed
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError

ALONE = 0.35
"""What a single run of a side may be off: processes of the same code were as far apart in a lone text's latency, for
the rounds inside a process share its luck with memory and what else the machine does."""

MANY = 5
"""Runs of a side whose slowest and fastest do not count for how far they are apart."""

INTERVAL = 90.0
"""Percent, for times. Chosen on quick runs of one commit, five against five, and checked on fresh ones with yardsticks:
ten comparisons without an alarm, and 15 % planted seen in every metric. Work that comes and goes beside the runs
still defeats it."""

Runs = Sequence[Sequence[float]]
"""Samples of one metric: one sequence a run; smaller is better."""


def compare(base: Sequence[Report], head: Sequence[Report], *, threshold: float, seed: int = 0) -> list[Change]:
    """Compare every metric that either side has.

    Times are compared by their medians, in yardsticks where all runs have them; the interval is a bootstrap over runs
    and, within a run, over samples.

    Args:
        base: one or several runs.
        head: likewise.
        threshold: the relative change that matters, such as 0.07.
        seed: of the bootstrap.

    Returns:
        One entry a metric: people's scores, times, then the worst cosine of each artifact.
    """
    changes = quality_changes(base, head, seed=seed)
    left, right = _times(base), _times(head)
    for metric in dict.fromkeys((*left, *right)):
        before, after = left.get(metric, ()), right.get(metric, ())
        changes.append(_change(metric, before, after, threshold, seed))
    left_cosines, right_cosines = _cosines(base), _cosines(head)
    for metric in dict.fromkeys((*left_cosines, *right_cosines)):
        changes.append(_quality(metric, left_cosines.get(metric), right_cosines.get(metric)))
    return changes


def _change(metric: str, left: Sequence[Timed], right: Sequence[Timed], threshold: float, seed: int) -> Change:
    unit = next(one.unit for one in (*left, *right))
    before, after = _median([one.samples for one in left]), _median([one.samples for one in right])
    if before is None or after is None:
        verdict = Verdict.LOST if left else Verdict.NEW
        nan = float("nan")
        return Change(
            metric=metric, unit=unit, base=before, head=after, ratio=nan, low=nan, high=nan, verdict=verdict
        )  # fmt: skip
    scaled = all(one.yardstick for one in (*left, *right))
    base, head = ([one.in_yardsticks if scaled else one.samples for one in side] for side in (left, right))
    draws = _bootstrap(head, seed) / _bootstrap(base, seed + 1)
    tail = (100 - INTERVAL) / 2
    low, high = (float(x) for x in np.percentile(draws, (tail, 100 - tail)))
    ratio = float(_typical(head) / _typical(base))
    verdict = _judge(ratio, low, high, threshold, max(threshold, (_apart(base) + _apart(head)) / 2))
    if verdict is not Verdict.SAME and min(sum(map(len, base)), sum(map(len, head))) < 2:
        verdict = Verdict.NOISY  # one sample says nothing of how samples scatter
    return Change(
        metric=metric, unit=unit, base=before, head=after, ratio=ratio, low=low, high=high, verdict=verdict
    )  # fmt: skip


def _judge(ratio: float, low: float, high: float, threshold: float, needed: float) -> Verdict:
    if ratio > 1 + needed and low > 1:
        return Verdict.WORSE
    if ratio < 1 / (1 + needed) and high < 1:
        return Verdict.BETTER
    if 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return Verdict.SAME
    return Verdict.NOISY


def _apart(runs: Runs) -> float:
    """Say how far the runs of one side are apart, slowest over fastest minus 1: a change must be larger to be one.

    Of `MANY` runs or more the slowest and the fastest do not count: one that was disturbed must not hide a change.
    """
    medians = sorted(float(np.median(run)) for run in runs)
    inner = medians[1:-1] if len(medians) >= MANY else medians
    return ALONE if len(medians) == 1 else inner[-1] / inner[0] - 1


def _quality(metric: str, base: float | None, head: float | None) -> Change:
    """Judge a worst cosine: any step away from 1 that is more than a rerun's jitter is a change of the vectors."""
    nan = float("nan")
    if base is None or head is None:
        verdict = Verdict.LOST if head is None else Verdict.NEW
        ratio = nan
    else:
        ratio = (1 - head + 1e-9) / (1 - base + 1e-9)
        moved = abs(head - base) > 1e-5
        verdict = Verdict.SAME if not moved or 0.5 <= ratio <= 2 else Verdict.WORSE if ratio > 1 else Verdict.BETTER
    return Change(metric=metric, unit="cosine", base=base, head=head, ratio=ratio, low=nan, high=nan, verdict=verdict)


def _median(runs: Runs) -> float | None:
    return _typical(runs) if runs else None


def _typical(runs: Runs) -> float:
    return float(np.median([np.median(run) for run in runs]))


def _bootstrap(runs: Runs, seed: int) -> NDArray[np.float64]:
    """Draw medians over runs of medians within runs: float64 [BOOTSTRAP_DRAWS]."""
    random = np.random.default_rng(seed)
    within = np.stack(
        [np.median(random.choice(np.asarray(run), (BOOTSTRAP_DRAWS, len(run))), axis=1) for run in runs], axis=1
    )
    chosen = random.integers(0, len(runs), within.shape)
    draws: NDArray[np.float64] = np.median(np.take_along_axis(within, chosen, axis=1), axis=1)
    return draws


def _times(reports: Sequence[Report]) -> dict[str, list[Timed]]:
    found: dict[str, list[Timed]] = {}
    for report in reports:
        for one in timed(report):
            found.setdefault(one.metric, []).append(one)
    return found


def _cosines(reports: Sequence[Report]) -> dict[str, float]:
    found: dict[str, float] = {}
    for report in reports:
        for point in (*(r.point for r in report.throughput), *(r.point for r in report.latency)):
            found[f"worst cosine, {point.name}"] = point.parity.min_cosine
    return found


def read_side(folder: Path) -> list[Report]:
    """Read a report folder, or every report folder inside a folder, by name.

    Raises:
        InputError: there is none, or one is partial or malformed.
    """
    folders = (
        [folder] if (folder / REPORT_FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/{REPORT_FILE}"))
    )
    if not folders:
        raise InputError(
            f"{folder} holds no {REPORT_FILE}, nor do its folders: run benchmarks/run.py --output {folder}"
        )
    reports = [read_report(path) for path in folders]
    for path, report in zip(folders, reports, strict=True):
        if report.partial:
            raise InputError(f"{path} is a partial report of an interrupted run: measure again")
    return reports


def warnings(base: Sequence[Report], head: Sequence[Report]) -> list[str]:
    """Name the conditions that differ between the sides and make their figures incomparable."""
    checks: Mapping[str, Callable[[Report], object]] = {
        "machines": lambda r: (r.host.cpu_model, r.host.cores_usable),
        "workloads": lambda r: r.workload.texts_sha256,
        "vector spaces": lambda r: r.subject.fingerprint,
        "settings": lambda r: (r.settings.quick, r.settings.suites),
    }
    found = []
    for what, of in checks.items():
        values = {str(of(report)) for report in (*base, *head)}
        if len(values) > 1:
            found.append(f"The {what} differ: {' / '.join(sorted(values))}")
    return found


def render(changes: Sequence[Change], notes: Sequence[str], *, runs: tuple[int, int], threshold: float) -> str:
    """Render a comparison as Markdown for a pull request's comment, changes first."""
    order = list(Verdict)
    rows = [
        f"| {c.metric} | {_figure(c.base)} | {_figure(c.head)} | {c.unit} | {_figure(c.ratio)} | "
        f"{_figure(c.low)} to {_figure(c.high)} | {c.verdict.value} |"
        for c in sorted(changes, key=lambda c: order.index(c.verdict))
    ]
    worse = [c for c in changes if c.verdict in (Verdict.WORSE, Verdict.LOST)]
    verdict = f"**{len(worse)} of {len(changes)} metrics got worse.**" if worse else "**Nothing got worse.**"
    lines = [
        "## Benchmark comparison",
        "",
        verdict,
        *(f"\n> {note}" for note in notes),
        "",
        "| metric | base | head | unit | ratio | interval | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"{runs[0]} base and {runs[1]} head runs. A ratio above 1 is worse. Those of latency and throughput are of "
        "times over a yardstick, bare matrix products that were timed beside them, where every run has one. A verdict "
        f"needs a change of more than {100 * threshold:.0f} %, and of more than the runs of a side are apart, on "
        f"average (a single run counts {100 * ALONE:.0f} %), whose {INTERVAL:.0f} % interval does not hold 1; for "
        f"quality, of more than {POINTS} points of Spearman whose paired {CONFIDENCE:.0f} % interval does not hold 0.",
    ]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.6g}"


def run(
    base: Annotated[Path, typer.Argument(help="Report folder, or folder of report folders.", show_default=False)],
    head: Annotated[Path, typer.Argument(help="Likewise, of the change.", show_default=False)],
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Relative change that matters: 0.07 lets 100 ms become 107 ms.")
    ] = 0.07,
    output: Annotated[Path | None, typer.Option(help="Also write the Markdown to this file.")] = None,
) -> None:
    """Say what changed between BASE and HEAD beyond the noise; exit status 1 if something got worse."""
    before, after = read_side(base), read_side(head)
    changes = compare(before, after, threshold=threshold)
    if not changes:
        raise InputError("the reports share no metric: run the same suites on both sides")
    text = render(changes, warnings(before, after), runs=(len(before), len(after)), threshold=threshold)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
    counts = {verdict.value: sum(c.verdict is verdict for c in changes) for verdict in Verdict}
    sys.stdout.write(json.dumps({key: count for key, count in counts.items() if count}) + "\n")
    if any(c.verdict in (Verdict.WORSE, Verdict.LOST) for c in changes):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when nothing got worse, 1 when something did, 2 on a mistake of the caller's.
    """
    return run_command(application(run), argv, "benchmarks/compare.py")


if __name__ == "__main__":
    sys.exit(main())
