"""Compare two benchmark reports, or two sets of them, and report what changed beyond the noise.

    python benchmarks/compare.py BASE HEAD [--threshold 0.07] [--output comparison.md]

BASE and HEAD are report folders, or folders of report folders: several interleaved runs of each side (A B A B) show
the drift between processes, which the rounds inside one run cannot. A change counts when it is larger than the
threshold and than the average distance between the runs of a side; a single run counts 35 %. Times beside which a
reference was timed are compared in units of it, so that a machine that others slow down is not a change. Exit status 1
when something got worse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.report.record import PEOPLE, Better, Measurement
from benchmarks.report.statistics import resampled_medians
from benchmarks.report.storage import REPORT_FILE, Report, read_report
from benchmarks.report.tables import NONE, table_lines
from evaluation.statistics import resample_spearman, spearman
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError

ALONE = 0.35
"""Error of a single run: processes of the same code were as far apart in a single text's latency, for the rounds
inside a process share its luck with memory and with the machine's other work."""

MANY = 5
"""Runs of a side from which on its slowest and fastest do not count for the distance between runs."""

INTERVAL = 90.0
"""Percent, for times. Chosen on quick runs of one commit, five against five, and checked on fresh ones with reference
work: ten comparisons without an alarm, and 15 % planted seen in every metric. Work that comes and goes beside the runs
still defeats it."""

CONFIDENCE = 99.0
"""Percent, for quality. A comparison judges many metrics: at 95 % one in twenty would be a false alarm."""

POINTS = 0.5
"""Of Spearman x 100: a larger loss whose interval excludes 0 counts. An export's int8 may lose as much."""

RESAMPLES = 1000
JITTER = 1e-5
"""Of a worst cosine between two runs of the same artifact."""

EXPORT_COSINE = "worst cosine of export"
NAN = float("nan")

Key: TypeAlias = tuple[object, ...]
Runs: TypeAlias = Sequence[Sequence[float]]
"""Samples of one metric: one sequence per run; smaller is better."""


class Verdict(str, Enum):
    """The conclusion from a metric's ratio and its interval."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    NOISY = "too noisy to tell"
    """The interval exceeds the threshold on a side, and also includes 1."""
    LOST = "no longer measured"
    NEW = "new"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How many times as much time HEAD takes, above 1 is worse (for scores, BASE over HEAD), with the interval."""

    ratio: float = NAN
    low: float = NAN
    high: float = NAN
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Change(Judgement):
    """One metric in both reports: medians over all runs of a side, None where it was not measured."""

    metric: str
    unit: str
    base: float | None
    head: float | None


def compare(base: Sequence[Report], head: Sequence[Report], *, threshold: float, seed: int = 0) -> list[Change]:
    """Compare every judged metric that either side has: people's scores, times, then the artifacts' worst cosines.

    Times and rates are compared by their medians, in units of the reference work where all runs have it; the interval
    is a bootstrap over runs and, within a run, over samples. Samples that pair with people's scores are compared by
    their rank correlation with them, over the same resampled pairs on both sides.

    Args:
        base: one or several runs.
        head: likewise.
        threshold: the relative change that matters, such as 0.07.
        seed: of the bootstrap.
    """
    sides = [_judged(side) for side in (base, head)]
    people = {
        _pairs(one): one.samples for report in (*base, *head) for one in report.measurements if one.party == PEOPLE
    }
    found: list[tuple[int, Change]] = []
    for key in dict.fromkeys(key for side in sides for key in side):
        before, after = (side.get(key, []) for side in sides)
        one = (before or after)[0]
        judge: _Judge
        if (scores := people.get(_pairs(one))) is not None:
            place, unit, judge = 0, "Spearman x 100", _Scores(scores, seed)
        elif one.metric == EXPORT_COSINE:
            place, unit, judge = 2, "cosine", _Cosines()
        else:
            place, unit, judge = 1, one.unit, _Times(threshold, seed)
        if before and after:
            judged = judge.compare(before, after)
        else:
            judged = Judgement(verdict=Verdict.LOST if before else Verdict.NEW)
        values = [judge.value(side) if side else None for side in (before, after)]
def _judged(reports: Sequence[Report]) -> dict[Key, list[Measurement]]:
    """Return our measurements with a direction of improvement, and the artifacts' cosines; peers are not judged."""
    found: dict[Key, list[Measurement]] = {}
    for report in reports:
        for one in report.measurements:
            judged = one.better is not Better.NEITHER and one.suite != "peers" and not report.is_peer(one.party)
            if judged or one.metric == EXPORT_COSINE:
                found.setdefault(one.key, []).append(one)
    return found


def _pairs(one: Measurement) -> Key:
    """Return what people's scores and the cosines of the same pairs have in common."""
    return one.suite, tuple(sorted(one.conditions.items()))


def _name(one: Measurement) -> str:
    conditions = (
        f"{value:,} {name}" if isinstance(value, (int, float)) else str(value)
        for name, value in one.conditions.items()
        if name != "sha256"
    )
    return ", ".join((one.suite, one.party, *conditions, one.metric))


def _compare_times(
    before: Sequence[Measurement], after: Sequence[Measurement], threshold: float, seed: int
) -> tuple[float, float, float, Verdict]:
    scaled = all(m.reference for m in (*before, *after))
    base, head = ([_times(m, scaled=scaled) for m in side] for side in (before, after))
    draws = _bootstrap(head, seed) / _bootstrap(base, seed + 1)
    tail = (100 - INTERVAL) / 2
    low, high = (float(x) for x in np.percentile(draws, (tail, 100 - tail)))
    ratio = _typical(head) / _typical(base)
    verdict = _verdict(ratio, low, high, threshold, max(threshold, (_distance(base) + _distance(head)) / 2))
    if verdict is not Verdict.SAME and min(sum(map(len, base)), sum(map(len, head))) < 2:
        verdict = Verdict.NOISY  # one sample shows nothing of how samples scatter
    return ratio, low, high, verdict


def _times(one: Measurement, *, scaled: bool) -> list[float]:
    """Return the samples as times, rates as their reciprocals, each over the reference of its round if `scaled`."""
    samples = np.asarray(one.samples, np.float64)
    times = 1 / samples if one.better is Better.HIGHER else samples
    if not scaled:
        return [float(time) for time in times]
    rounds = zip(np.array_split(times, len(one.reference)), one.reference, strict=True)
    return [float(time) for part, reference in rounds for time in part / reference]


def _verdict(ratio: float, low: float, high: float, threshold: float, needed: float) -> Verdict:
    if ratio > 1 + needed and low > 1:
        return Verdict.WORSE
    if ratio < 1 / (1 + needed) and high < 1:
        return Verdict.BETTER
    if 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return Verdict.SAME
    return Verdict.NOISY


def _distance(runs: Runs) -> float:
    """Return how far the runs of one side are apart, slowest over fastest minus 1: a change must exceed it.

    Of `MANY` runs or more the slowest and the fastest do not count: one that was disturbed must not hide a change.
    """
    medians = sorted(float(np.median(run)) for run in runs)
    inner = medians[1:-1] if len(medians) >= MANY else medians
    return ALONE if len(medians) == 1 else inner[-1] / inner[0] - 1


def _typical(runs: Runs) -> float:
    return float(np.median([np.median(run) for run in runs]))


def _bootstrap(runs: Runs, seed: int) -> NDArray[np.float64]:
    """Draw medians over runs of medians within runs: float64 [BOOTSTRAP_DRAWS]."""
    random = np.random.default_rng(seed)
    within = np.stack([resampled_medians(run, random) for run in runs], axis=1)
    chosen = random.integers(0, len(runs), within.shape)
    draws: NDArray[np.float64] = np.median(np.take_along_axis(within, chosen, axis=1), axis=1)
    return draws


def _compare_cosines(base: float, head: float) -> tuple[float, Verdict]:
    """Judge a worst cosine: a step away from 1 beyond a rerun's jitter is a change of the vectors."""
    ratio = (1 - head + 1e-9) / (1 - base + 1e-9)
    same = abs(head - base) <= JITTER or 0.5 <= ratio <= 2
    return ratio, Verdict.SAME if same else Verdict.WORSE if ratio > 1 else Verdict.BETTER


def _spearman(side: Sequence[Measurement], scores: Sequence[float]) -> float | None:
    """Return the rank correlation of a side's first run: the cosines of its runs are equal up to rounding."""
    return 100 * spearman(side[0].samples, scores) if side else None


def _compare_scores(
    before: Sequence[float], after: Sequence[float], scores: Sequence[float], seed: int
) -> tuple[float, float, float, Verdict]:
    """Compare rank correlations over the same resampled pairs."""
    base, head = (spearman(samples, scores) for samples in (before, after))
    old, new = (
        resample_spearman(samples, scores, RESAMPLES, np.random.default_rng([seed, 0])) for samples in (before, after)
    )
    percentiles = ((100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2)
    low, high = np.nanpercentile(new - old, percentiles)
    gain = 100 * (head - base)
    verdict = Verdict.SAME if abs(gain) <= POINTS else Verdict.NOISY
    if gain < -POINTS and high < 0:
        verdict = Verdict.WORSE
    elif gain > POINTS and low > 0:
        verdict = Verdict.BETTER
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of a handful of pairs may correlate with nothing
        ratio_low, ratio_high = np.nanpercentile(old / new, percentiles)
    return base / head, float(ratio_low), float(ratio_high), verdict


def read_side(folder: Path) -> list[Report]:
    """Read a report folder, or every report folder inside a folder, by name.

    Raises:
        InputError: there are none, or one is partial or malformed.
    """
    folders = (
        [folder] if (folder / REPORT_FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/{REPORT_FILE}"))
    )
    if not folders:
        raise InputError(
            f"neither {folder} nor a folder in it has a {REPORT_FILE}: run benchmarks/run.py --output {folder}"
        )
    reports = [read_report(path) for path in folders]
    for path, report in zip(folders, reports, strict=True):
        if report.facts.partial:
            raise InputError(f"{path} is a partial report of an interrupted run: measure again")
    return reports


def warnings(base: Sequence[Report], head: Sequence[Report]) -> list[str]:
    """Name the conditions that differ between the sides and make their figures incomparable."""
    checks: Mapping[str, Callable[[Report], object]] = {
        "machines": lambda r: (r.facts.host.cpu_model, r.facts.host.cores_usable),
        "workloads": lambda r: r.facts.workload.texts_sha256,
        "vector spaces": lambda r: r.facts.subject.fingerprint,
        "settings": lambda r: (r.facts.settings.quick, r.facts.settings.suites),
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
        (
            change.metric, _figure(change.base), _figure(change.head), change.unit, _figure(change.ratio),
            f"{_figure(change.low)} to {_figure(change.high)}", change.verdict.value,
        )
        for change in sorted(changes, key=lambda change: order.index(change.verdict))
    ]  # fmt: skip
    worse = [change for change in changes if change.verdict in (Verdict.WORSE, Verdict.LOST)]
    lines = [
        "## Benchmark comparison",
        "",
        f"**{len(worse)} of {len(changes)} metrics got worse.**" if worse else "**Nothing got worse.**",
        *(f"\n> {note}" for note in notes),
        "",
        table_lines(("metric", "base", "head", "unit", "ratio", "interval", "verdict"), rows),
        "",
        f"{runs[0]} base and {runs[1]} head runs. A ratio above 1 is worse; rates are compared as times. Latency and "
        "throughput are compared in units of reference work, bare matrix products timed beside them, where every run "
        f"has it. A verdict needs a change of more than {100 * threshold:.0f} %, and of more than the average distance "
        f"between the runs of a side (a single run counts {100 * ALONE:.0f} %), whose {INTERVAL:.0f} % interval "
        f"excludes 1; for quality, of more than {POINTS} points of Spearman whose paired {CONFIDENCE:.0f} % interval "
        "excludes 0.",
    ]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return NONE if value is None or np.isnan(value) else f"{value:.6g}"


def run(
    base: Annotated[Path, typer.Argument(help="Report folder, or folder of report folders.", show_default=False)],
    head: Annotated[Path, typer.Argument(help="Likewise, of the change.", show_default=False)],
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Relative change that matters: 0.07 lets 100 ms become 107 ms.")
    ] = 0.07,
    output: Annotated[Path | None, typer.Option(help="Also write the Markdown to this file.")] = None,
) -> None:
    """Report what changed between BASE and HEAD beyond the noise; exit status 1 if something got worse."""
    before, after = read_side(base), read_side(head)
    changes = compare(before, after, threshold=threshold)
    if not changes:
        raise InputError("the reports share no metric: run the same suites on both sides")
    text = render(changes, warnings(before, after), runs=(len(before), len(after)), threshold=threshold)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
    counts = {verdict.value: sum(change.verdict is verdict for change in changes) for verdict in Verdict}
    sys.stdout.write(json.dumps({key: count for key, count in counts.items() if count}) + "\n")
    if any(change.verdict in (Verdict.WORSE, Verdict.LOST) for change in changes):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when nothing got worse, 1 when something did, 2 on a user error.
    """
    return run_command(application(run), argv, "benchmarks/compare.py")


if __name__ == "__main__":
    sys.exit(main())
