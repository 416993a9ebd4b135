"""What a comparison of reports says of one metric, and how it judges what vectors are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from benchmarks.quality_results import SetScore
from benchmarks.ranks import resample_spearman
from benchmarks.results import Report

CONFIDENCE = 99.0
"""Percent. A comparison looks at many metrics at once: at 95 % one in twenty would be a false alarm."""

POINTS = 0.5
"""Of Spearman x 100: a loss of more, whose interval does not hold 0, is one. An export's int8 may lose as much."""


class Verdict(str, Enum):
    """What a metric's ratio and its interval say."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    NOISY = "too noisy to tell"
    """The interval reaches beyond the threshold on a side, and also holds 1."""
    LOST = "not measured any more"
    NEW = "new"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric in both reports.

    Attributes:
        metric: its name, such as "throughput, openvino bf16".
        unit: of `base` and `head`.
        base: median over all runs; None where it was not measured.
        head: likewise.
        ratio: how many times as much time HEAD takes: above 1 is slower. For scores, BASE over HEAD.
        low: of the ratio's interval.
        high: likewise.
    """

    metric: str
    unit: str
    base: float | None
    head: float | None
    ratio: float
    low: float
    high: float
    verdict: Verdict


def quality_changes(base: Sequence[Report], head: Sequence[Report], *, seed: int) -> list[Change]:
    """Compare our artifacts' correlations on every set, over the same resampled pairs on both sides.

    The cosines of one side's runs are the same up to rounding: its first run speaks for it.
    """
    left, right = _scores(base), _scores(head)
    return [_judge(key, left.get(key), right.get(key), seed) for key in dict.fromkeys((*left, *right))]


_Key = tuple[str, str, str]
"""Party, set and the hash of its file: another file is another metric."""

_Scored = tuple[SetScore, tuple[float, ...]]


def _scores(reports: Sequence[Report]) -> dict[_Key, _Scored]:
    found: dict[_Key, _Scored] = {}
    for report in reports:
        for result in report.quality:
            if not result.ours:
                continue  # a peer's quality is not our regression
            for one, score in zip(report.quality_sets, result.scores, strict=True):
                found.setdefault((result.party, one.name, one.sha256), (score, one.scores))
    return found


def _judge(key: _Key, base: _Scored | None, head: _Scored | None, seed: int) -> Change:
    party, name, _ = key
    metric, unit, nan = f"quality, {party}, {name}", "Spearman x 100", float("nan")
    if base is None or head is None:
        return Change(
            metric=metric, unit=unit, ratio=nan, low=nan, high=nan,
            base=None if base is None else base[0].spearman.value,
            head=None if head is None else head[0].spearman.value,
            verdict=Verdict.LOST if head is None else Verdict.NEW,
        )  # fmt: skip
    before, after = (resample_spearman(score.cosines, scores, seed=(seed, 0)) for score, scores in (base, head))
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(100 * (after - before), (tail, 100 - tail))
    gained = head[0].spearman.value - base[0].spearman.value
    verdict = Verdict.SAME if abs(gained) <= POINTS else Verdict.NOISY
    if gained < -POINTS and high < 0:
        verdict = Verdict.WORSE
    elif gained > POINTS and low > 0:
        verdict = Verdict.BETTER
    with np.errstate(divide="ignore", invalid="ignore"):  # of a handful of pairs a resample may correlate with nothing
        ratio_low, ratio_high = np.nanpercentile(before / after, (tail, 100 - tail))
    return Change(
        metric=metric, unit=unit, base=base[0].spearman.value, head=head[0].spearman.value,
        ratio=base[0].spearman.value / head[0].spearman.value, low=float(ratio_low), high=float(ratio_high),
        verdict=verdict,
    )  # fmt: skip
