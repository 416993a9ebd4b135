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
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

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
"""Runs of a side from which on its slowest and fastest do not count: one that was disturbed must not hide a change."""

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

_TEMPLATE = Environment(trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
    (Path(__file__).resolve().parent / "report" / "comparison.jinja").read_text(encoding="utf-8")
)
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
    NOISY = "too noisy to tell"  # the interval exceeds the threshold on a side, and also includes 1
    LOST = "no longer measured"
    NEW = "new"


class Change(NamedTuple):
    """One metric in both reports: medians over all runs, and the ratio of HEAD's time to BASE's: above 1 is worse.

    For scores, it is BASE over HEAD.
    """

    metric: str
    unit: str
    base: float | None
    head: float | None
    ratio: float
    low: float
    high: float
    verdict: Verdict


def compare(base: Sequence[Report], head: Sequence[Report], *, threshold: float, seed: int = 0) -> list[Change]:
    """Compare every judged metric that either side, of one or several runs, has.

    Times and rates are compared by their medians, in units of the reference work where all runs have it; the interval
    is a bootstrap over runs and, within a run, over samples. Samples that pair with people's scores are compared by
    their rank correlation with them, over the same resampled pairs on both sides.
    """
    left, right = _judged(base), _judged(head)
    every = [one for report in (*base, *head) for one in report.measurements]
    people = {(one.suite, one.key[-1]): one.samples for one in every if one.party == PEOPLE}
    changes = []
    for key in dict.fromkeys((*left, *right)):
        before, after = left.get(key, []), right.get(key, [])
        was, now = before or after, after or before
        one = was[0]
        if (scores := people.get((one.suite, one.key[-1]))) is not None:
            # The first runs: the cosines of a side's runs are equal up to rounding.
            change = _compare_scores(_name(one), was[0].samples, now[0].samples, scores, seed)
        elif one.metric == EXPORT_COSINE:
            change = _compare_cosines(_name(one), was[-1].median, now[-1].median)
        else:
            change = _compare_times(was, now, threshold, seed)
        if not after:
            change = change._replace(head=None, ratio=NAN, low=NAN, high=NAN, verdict=Verdict.LOST)
        elif not before:
            change = change._replace(base=None, ratio=NAN, low=NAN, high=NAN, verdict=Verdict.NEW)
        changes.append(change)
    return changes


def _judged(reports: Sequence[Report]) -> dict[Key, list[Measurement]]:
    """Return our measurements with a direction of improvement, and the artifacts' cosines; peers are not judged."""
    found: dict[Key, list[Measurement]] = {}
    for report in reports:
        for one in report.measurements:
            theirs = one.suite == "peers" or report.library(one.party)
            if one.metric == EXPORT_COSINE or (one.better is not Better.NEITHER and not theirs):
                found.setdefault(one.key, []).append(one)
    return found


def _name(one: Measurement) -> str:
    conditions = (
        f"{value:,} {name}" if isinstance(value, (int, float)) else str(value)
        for name, value in one.conditions.items()
        if name != "sha256"
    )
    return ", ".join((one.suite, one.party, *conditions, one.metric))


def _compare_times(before: Sequence[Measurement], after: Sequence[Measurement], threshold: float, seed: int) -> Change:
    scaled = all(m.reference for m in (*before, *after))
    base, head = ([_times(m, scaled=scaled) for m in side] for side in (before, after))
    tail = (100 - INTERVAL) / 2
    low, high = map(float, np.percentile(_bootstrap(head, seed) / _bootstrap(base, seed + 1), (tail, 100 - tail)))
    ratio = _typical(head) / _typical(base)
    needed = max(threshold, (_distance(base) + _distance(head)) / 2)
    verdict = _verdict(
        worse=ratio > 1 + needed and low > 1,
        better=ratio < 1 / (1 + needed) and high < 1,
        same=1 / (1 + threshold) <= ratio <= 1 + threshold,
    )
    if verdict is not Verdict.SAME and min(sum(map(len, base)), sum(map(len, head))) < 2:
        verdict = Verdict.NOISY  # one sample shows nothing of how samples scatter
    was, now = (_typical([one.samples for one in side]) for side in (before, after))
    return Change(_name(before[0]), before[0].unit, was, now, ratio, low, high, verdict)


def _times(one: Measurement, *, scaled: bool) -> list[float]:
    """Return the samples as times, rates as their reciprocals, each over the reference of its round if `scaled`."""
    samples = np.asarray(one.samples, np.float64)
    references = one.reference if scaled else (1.0,)
    rounds = np.array_split(1 / samples if one.better is Better.HIGHER else samples, len(references))
    return [float(time) for part, reference in zip(rounds, references, strict=True) for time in part / reference]


def _distance(runs: Runs) -> float:
    """Return how far the runs of one side are apart, slowest over fastest minus 1: a change must exceed it."""
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


def _compare_cosines(metric: str, base: float, head: float) -> Change:
    """Judge a worst cosine: a step away from 1 beyond a rerun's jitter is a change of the vectors."""
    ratio = (1 - head + 1e-9) / (1 - base + 1e-9)
    same = abs(head - base) <= JITTER or 0.5 <= ratio <= 2
    verdict = _verdict(worse=ratio > 1 and not same, better=ratio < 1 and not same, same=same)
    return Change(metric, "cosine", base, head, ratio, NAN, NAN, verdict)


def _compare_scores(
    metric: str, before: Sequence[float], after: Sequence[float], scores: Sequence[float], seed: int
) -> Change:
    """Compare rank correlations over the same resampled pairs."""
    base, head = (100 * spearman(samples, scores) for samples in (before, after))
    old, new = (
        resample_spearman(samples, scores, RESAMPLES, np.random.default_rng([seed, 0])) for samples in (before, after)
    )
    percentiles = ((100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2)
    low, high = np.nanpercentile(new - old, percentiles)
    gain = head - base
    verdict = _verdict(worse=gain < -POINTS and high < 0, better=gain > POINTS and low > 0, same=abs(gain) <= POINTS)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of a handful of pairs may correlate with nothing
        ratio_low, ratio_high = map(float, np.nanpercentile(old / new, percentiles))
    return Change(metric, "Spearman x 100", base, head, base / head, ratio_low, ratio_high, verdict)


def _verdict(*, worse: bool, better: bool, same: bool) -> Verdict:
    return Verdict.WORSE if worse else Verdict.BETTER if better else Verdict.SAME if same else Verdict.NOISY


def read_side(folder: Path) -> list[Report]:
    """Read a report folder, or every report folder inside a folder, by name; none, or a partial one, is an error."""
    inside = sorted(file.parent for file in folder.glob(f"*/{REPORT_FILE}"))
    folders = [folder] if (folder / REPORT_FILE).is_file() else inside
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
    checks = {
        "machines": attrgetter("host.cpu_model", "host.cores_usable"),
        "workloads": attrgetter("workload.texts_sha256"),
        "vector spaces": attrgetter("subject.fingerprint"),
        "settings": attrgetter("settings.quick", "settings.suites"),
    }
    found = {what: sorted({str(of(report.facts)) for report in (*base, *head)}) for what, of in checks.items()}
    return [f"The {what} differ: {' / '.join(values)}" for what, values in found.items() if len(values) > 1]


def render(changes: Sequence[Change], notes: Sequence[str], *, runs: tuple[int, int], threshold: float) -> str:
    """Render a comparison as Markdown for a pull request's comment, changes first."""
    order = list(Verdict)
    rows = []
    for one in sorted(changes, key=lambda change: order.index(change.verdict)):
        base, head, ratio, low, high = map(_figure, (one.base, one.head, one.ratio, one.low, one.high))
        rows.append((one.metric, base, head, one.unit, ratio, f"{low} to {high}", one.verdict.value))
    return _TEMPLATE.render(
        worse=sum(change.verdict in (Verdict.WORSE, Verdict.LOST) for change in changes), changes=len(changes),
        notes=notes, table=table_lines(("metric", "base", "head", "unit", "ratio", "interval", "verdict"), rows),
        runs=runs, threshold=f"{100 * threshold:.0f}", alone=f"{100 * ALONE:.0f}", interval=f"{INTERVAL:.0f}",
        confidence=f"{CONFIDENCE:.0f}", points=POINTS,
    )  # fmt: skip


def _figure(value: float | None) -> str:
    return NONE if value is None or np.isnan(value) else f"{value:.6g}"


def run(
    base: Annotated[Path, typer.Argument(help="Report folder, or folder of report folders.", show_default=False)],
    head: Annotated[Path, typer.Argument(help="Likewise, of the change.", show_default=False)],
    threshold: Annotated[float, typer.Option(min=0.0, help="Change that matters: 0.07 lets 100 become 107 ms.")] = 0.07,
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
    sys.stderr.write(f"{text}\n")
    sys.stdout.write(json.dumps(Counter(change.verdict.value for change in changes)) + "\n")
    if any(change.verdict in (Verdict.WORSE, Verdict.LOST) for change in changes):
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when nothing got worse, 1 when something did, 2 on a user error."""
    return run_command(application(run), argv, "benchmarks/compare.py")


if __name__ == "__main__":
    sys.exit(main())
