"""What a report says to people: sections of tables with their conditions and caveats beside them, ceilings first.

`benchmarks.markdown` and `benchmarks.webpage` write these down; neither adds a figure of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Point, Report
from benchmarks.summary import median

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; an empty head is a list of names and values."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A drawing, by the name it has in `benchmarks.plots`."""

    name: str
    caption: str


Block = str | Table | Plot
"""Text with `code` and **emphasis**, a table or a drawing."""


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


def sections(report: Report) -> list[Section]:
    """Give the sections of a report that it has content for, conditions and ceilings first."""
    parts = (_conditions, _ceilings, _throughput, _latency, _startup, _peers, _training, _failures)
    return [section for part in parts if (section := part(report)) is not None]


def status(report: Report) -> str:
    """Give the sentence that must be read before any figure; empty for a complete report."""
    if not report.partial:
        return ""
    return (
        "**Partial: the run was interrupted.** What is here was measured, some of it in fewer rounds than asked for; "
        "what is missing was not."
    )


def _conditions(report: Report) -> Section | None:
    host, work, subject, source = report.host, report.workload, report.subject, report.source
    commit = NONE if source.commit is None else source.commit[:12] + (" with local changes" if source.dirty else "")
    rows = [
        ("Machine", f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable"),
        ("CPU features", ", ".join(host.cpu_flags) or NONE),
        ("Memory", f"{host.memory_bytes / 2**30:.1f} GiB"),
        ("System", f"{host.os}, Python {host.python}"),
        ("Load average before", f"{host.load_1min_start:.2f} (1 min)"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Commit", commit),
        (
            "Bundle",
            f"{subject.name}, fingerprint `{subject.fingerprint}`, from {subject.base_model}, "
            f"{subject.dim} dimensions, up to {subject.max_tokens} tokens",
        ),
        (
            "Workload",
            f"{work.texts} texts ({work.source}); tokens: mean {work.tokens_mean:.1f}, p50 {work.tokens_p50:.0f}, "
            f"p90 {work.tokens_p90:.0f}, max {work.tokens_max}; {work.truncated} truncated; sha256 "
            f"`{work.texts_sha256[:16]}`",
        ),
        (
            "Run",
            f"{report.started}, {report.wall_s:.0f} s, suites {', '.join(s.value for s in report.settings.suites)}, "
            f"{report.settings.rounds} rounds, seed {report.settings.seed}{', quick' * report.settings.quick}",
        ),
    ]
    text = "Every party runs with its default threads, which may use all usable cores."
    if host.load_1min_start > 0.5:
        text += (
            f" **The machine was busy before the first measurement (load average {host.load_1min_start:.2f}): "
            "compare parties within this report, and trust no absolute figure.**"
        )
    if report.settings.quick:
        text += " A quick run has few samples: use it to see that all works, not to decide."
    return Section("Conditions", (Table((), rows), text))


def _ceilings(report: Report) -> Section | None:
    if not report.ceilings:
        return None
    flop = report.subject.flop_per_token
    cost = NONE if flop is None else f"{flop / 1e6:.2f}"
    rows = [
        (
            f"{c.engine.value} {c.precision.value}",
            f"{c.gflop_per_s:,.0f}",
            f"{c.gflop_per_s / c.threads:,.0f}",
            NONE if flop is None else f"{c.gflop_per_s * 1e9 / flop:,.0f}",
            f"[{c.rows}, {c.inner}] x [{c.inner}, {c.outer}]",
        )
        for c in report.ceilings
    ]
    head = ("engine, precision", "GFLOP/s", "per core", "tokens/s at that rate", "best shape")
    text = (
        "Bare chained matrix products in the engine's own library on all usable cores: no encoder on "
        "this library can be faster. The rate is that of the fastest repetition. "
        f"One token costs {cost} MFLOP, counting the layers' matrix products alone: attention scores, embeddings, "
        "norms and activations are left out."
    )
    return Section("Ceilings", (Table(head, rows), text))


def _throughput(report: Report) -> Section | None:
    if not report.throughput:
        return None
    rows = [
        (
            r.point.name,
            f"{r.texts_per_s:,.0f}",
            f"{r.texts_per_s_min:,.0f} to {r.texts_per_s_max:,.0f}",
            f"{r.tokens_per_s:,.0f}",
            _percent(r.ceiling_share),
            _percent(r.row_fill),
            str(r.streams),
            f"{_percent(r.tokenize_share)} / {_percent(r.pack_share)} / {_percent(r.infer_share)} / "
            f"{_percent(r.unpack_share)}",
            str(len(r.samples_s)),
            _parity(r.point),
        )
        for r in report.throughput
    ]
    above = ""
    if any(r.ceiling_share is not None and r.ceiling_share > 1 for r in report.throughput):
        above = (
            " **A share above 100 % means that something else held the machine back while the ceiling was measured: "
            "measure again on a quiet machine.**"
        )
    head = (
        "engine, precision",
        "texts/s",
        "min to max",
        "tokens/s",
        "of ceiling",
        "row fill",
        "streams",
        "tokenise / pack / infer / unpack",
        "rounds",
        "min cosine",
    )
    text = (
        "The whole workload in one `encode` call, tokenising included; medians over rounds that took turns. "
        "Tokens and the share of the ceiling count useful tokens, not padding. The stages' shares are of wall time: "
        "they overlap, and infer is summed over the streams. " + _PARITY + above
    )
    return Section("Throughput", (Table(head, rows), text, Plot("throughput", "Texts a second")))


def _latency(report: Report) -> Section | None:
    if not report.latency:
        return None
    rows = [
        (
            r.point.name,
            str(r.tokens),
            f"{r.p50_ms:.2f}",
            f"{r.p90_ms:.2f}",
            f"{r.p99_ms:.2f}",
            str(len(r.samples_ms)),
            _parity(r.point),
        )
        for r in report.latency
    ]
    few = any(len(r.samples_ms) < 300 for r in report.latency)
    head = ("engine, precision", "tokens", "p50 ms", "p90 ms", "p99 ms", "n", "min cosine")
    text = (
        "One text a call, in process, warm, tokenising included, no server and nobody else asking. "
        + ("With fewer than 300 samples p99 rests on one to three of them. " if few else "")
        + _PARITY
    )
    plots = (
        Plot("latency", "Latency of one text against its length"),
        Plot("latency_cdf", "How latencies are distributed"),
    )
    return Section("Latency of one text", (Table(head, rows), text, *plots))


def _startup(report: Report) -> Section | None:
    if not report.startup:
        return None
    rows = [
        (
            r.party,
            f"{r.median_s:.2f}",
            f"{min(r.samples_s):.2f} to {max(r.samples_s):.2f}",
            str(len(r.samples_s)),
            NONE if r.min_cosine is None else _cosine(r.min_cosine),
        )
        for r in report.startup
    ]
    text = (
        "From process start to the first vector, each in a fresh process, files in the page cache. "
        "Where a peer converts a model, the conversion was saved before and is not counted."
    )
    return Section("Startup", (Table(("party", "median s", "min to max", "n", "min cosine"), rows), text))


def _peers(report: Report) -> Section | None:
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
            _parity(r.point),
        )
        for r in report.ours_beside_peers
    ]
    theirs = [
        (
            f"{r.name} ({r.versions.get(r.peer, NONE)})",
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
    if report.comparisons:
        rows = [
            (
                c.point.name,
                c.peer,
                f"{c.ratio:.2f}",
                f"{c.ratio_low:.2f} to {c.ratio_high:.2f}",
                _cosine(c.min_cosine),
                _cosine(c.mean_cosine),
            )
            for c in report.comparisons
        ]
        columns = ("ours", "peer", "times as fast", "95 % interval", "min cosine, theirs to ours", "mean cosine")
        blocks += [
            Table(columns, rows),
            "Ratios of median rates. The interval is a bootstrap over the rounds: it shows how "
            "they scattered, not what all of them had in common.",
        ]
    return Section("Peers", (*blocks, Plot("quality", "Speed against agreement with the reference")))


def _training(report: Report) -> Section | None:
    if not report.training:
        return None
    first = report.training[0]
    sets = list(first.runs[0].spearman)
    rows = [
        (
            r.party,
            f"{r.median_s:.1f}",
            *(_median_and_spread([run.spearman[name] for run in r.runs]) for name in sets),
            _median_and_spread([run.mean for run in r.runs]),
            ", ".join(str(run.seed) for run in r.runs),
        )
        for r in report.training
    ]
    fastest = min(report.training, key=lambda r: r.median_s)
    ratios = "; ".join(
        f"{r.party} takes {r.median_s / fastest.median_s:.1f} times as long as {fastest.party}"
        for r in report.training
        if r is not fastest
    )
    text = (
        f"{first.base} tuned on {first.corpus} ({first.texts:,} texts), pooling {first.pooling}. Seconds are "
        "from process start to the saved folder. Scores are Spearman x 100: median over the seeds (lowest to highest), "
        f"all pairs of a set together. {ratios}."
    )
    head = ("party", "median s", *sets, "mean", "seeds")
    return Section("Training", (Table(head, rows), text, Plot("training", "Seconds of tuning against the mean score")))


def _median_and_spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _failures(report: Report) -> Section | None:
    if not report.failures:
        return None
    rows = [(f.suite, f.party, f.reason.replace("\n", " ")) for f in report.failures]
    return Section("Not measured", (Table(("suite", "party", "reason"), rows),))


_PARITY = "Min cosine is the worst text's similarity to the reference when the artifact was exported (manifest)."


def _parity(point: Point) -> str:
    return _cosine(point.parity.min_cosine)


def _cosine(value: float) -> str:
    return f"{value:.6f}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"
