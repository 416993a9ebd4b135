"""The sections on what vectors are worth, and on others: quality, peers, training."""

from __future__ import annotations

from benchmarks.blocks import (
    NONE,
    Block,
    Plot,
    Section,
    Table,
    cosine_text,
    estimate_text,
    median_and_spread,
    percent,
)
from benchmarks.results import Report
from benchmarks.sections_speed import parity
from mirror_runtime.bundle import Precision


def quality(report: Report) -> Section | None:
    """Show what each party's vectors are worth, by people's scores and beside the bundle's own fp32."""
    if not report.quality:
        return None
    names = [f"{one.name} ({len(one.scores):,} pairs)" for one in report.quality_sets]
    rows = [
        (
            result.party,
            *(estimate_text(score.spearman) for score in result.scores),
            estimate_text(result.mean),
            estimate_text(result.mean_delta, signed=True),
            percent(result.top10_overlap),
        )
        for result in report.quality
    ]
    baseline = next((result.baseline for result in report.quality if result.baseline is not None), None)
    beside = (
        "No fp32 artifact could be run to compare with."
        if baseline is None
        else f"Deltas and top-10 overlap are to {baseline}, over the same resampled pairs: their intervals are paired. "
        "The overlap is the share of a text's ten nearest texts that are its ten nearest there, too, among "
        f"{report.quality[0].texts:,} distinct texts of the sets."
    )
    text = (
        "Spearman x 100 of the vectors' cosines with people's scores, all pairs of a set together, with 95 % bootstrap "
        f"intervals over pairs; the mean gives each set the same weight. {beside}"
    )
    head = ("party", *names, "mean", "delta of the mean", "top-10 overlap")
    plots = (Plot("pareto", "Speed against quality"),)
    return Section("Quality", (Table(head, rows), text, *plots))


def peers(report: Report) -> Section | None:
    """Show other libraries on the same weights and texts."""
    if not report.peers and not report.comparisons:
        return None
    ours = [
        (
            f"mirror_runtime {r.point.name}",
            r.point.precision.value,
            NONE,
            f"{r.texts_per_s:,.0f}",
            f"{r.texts_per_s_min:,.0f} to {r.texts_per_s_max:,.0f}",
            str(len(r.samples_s)),
            parity(r.point),
        )
        for r in report.ours_beside_peers
    ]
    theirs = [
        (
            f"{r.name} ({r.version})",
            r.precision,
            str(r.batch_size),
            f"{r.texts_per_s:,.0f}",
            f"{r.texts_per_s_min:,.0f} to {r.texts_per_s_max:,.0f}",
            str(len(r.samples_s)),
            NONE,
        )
        for r in report.peers
    ]
    head = ("party", "computes in", "batch size", "texts/s", "min to max", "rounds", "min cosine of export")
    sizes = ", ".join(str(size) for size in sorted({s.batch_size for r in report.peers for s in r.sweep})) or NONE
    text = (
        "The same weights and texts in the same run, ours and theirs in turn. Each peer runs in its own "
        "environment and process at its defaults but for the batch size, which is the best of "
        f"{sizes} in a sweep beforehand."
    )
    blocks: list[Block] = [Table(head, ours + theirs), text]
    if report.single_texts:
        blocks += [_single_texts(report), _SINGLE_NOTE]
    if report.comparisons:
        blocks += [_ratios(report), _RATIOS_NOTE]
    return Section("Peers", tuple(blocks))


_RATIOS_NOTE = (
    "How many times as many texts a second ours encodes: ratios of median rates. The interval is a bootstrap over the "
    "rounds: it shows how they scattered, not what all of them had in common. Cosines are a peer's vectors to ours in "
    "fp32 over the workload, or to those of ours that they are nearest to."
)


_SINGLE_NOTE = (
    "One text a call, warm, tokenising included, each party's own process timing its own calls, in turns. Ours run "
    "with the streams that throughput wants; `mirror plan --for latency` finds what a single text wants."
)


def _single_texts(report: Report) -> Table:
    rows = [
        (
            f"mirror_runtime {r.party}" if r.ours else r.party,
            str(r.tokens),
            f"{r.p50_ms:.2f}",
            f"{r.p90_ms:.2f}",
            f"{r.p99_ms:.2f}",
            str(len(r.samples_ms)),
        )
        for r in report.single_texts
    ]
    return Table(("one text at a time", "tokens", "p50 ms", "p90 ms", "p99 ms", "n"), rows)


def _ratios(report: Report) -> Table:
    """Lay peers against our artifacts: a row a peer."""
    found = {(c.point.name, c.peer): c for c in report.comparisons}
    points, names = (tuple(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    rows = []
    for peer in names:
        beside = [found.get((point, peer)) for point in points]
        known = [c for c in beside if c is not None]
        exact = [c for c in known if c.point.precision is Precision.FP32] or known
        nearest = max(exact, key=lambda c: c.min_cosine)
        cells = (NONE if c is None else f"{c.ratio:.2f} ({c.ratio_low:.2f} to {c.ratio_high:.2f})" for c in beside)
        rows.append((peer, *cells, cosine_text(nearest.min_cosine), cosine_text(nearest.mean_cosine)))
    head = ("peer", *(f"{point}, times as fast (95 %)" for point in points), "min cosine to ours", "mean cosine")
    return Table(head, rows)


def training(report: Report) -> Section | None:
    """Show recipes on the same corpus."""
    if not report.training:
        return None
    first = report.training[0]
    sets = list(first.runs[0].spearman)
    rows = [
        (
            r.party,
            f"{r.median_s:.1f}",
            *(median_and_spread([run.spearman[name] for run in r.runs]) for name in sets),
            median_and_spread([run.mean for run in r.runs]),
            ", ".join(str(run.seed) for run in r.runs),
        )
        for r in report.training
    ]
    fastest = min(report.training, key=lambda r: r.median_s)
    ratios = "".join(
        f" {r.party} takes {r.median_s / fastest.median_s:.1f} times as long as {fastest.party}."
        for r in report.training
        if r is not fastest
    )
    text = (
        f"{first.base} tuned on {first.corpus} ({first.texts:,} texts), pooling {first.pooling}. Seconds are "
        "from process start to the saved folder. Scores are Spearman x 100: median over the seeds (lowest to highest), "
        f"all pairs of a set together.{ratios}"
    )
    head = ("party", "median s", *sets, "mean", "seeds")
    return Section("Training", (Table(head, rows), text, Plot("training", "Seconds of tuning against the mean score")))
