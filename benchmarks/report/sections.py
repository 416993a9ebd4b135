"""What a report shows of each suite, as data: tables with their captions and caveats, and plots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.report.record import Condition
from benchmarks.report.tables import Column, Table

CAPTIONS_FILE = Path(__file__).resolve().with_name("captions.md")

TITLES = {"latency": "Latency of one text"}
"""Of the sections that have other titles than their suites."""

PLOTS_OF: Mapping[str, tuple[str, ...]] = {
    "throughput": ("throughput", "lengths"),
    "latency": ("latency",),
    "quality": ("pareto",),
    "serving": ("serving",),
}
"""Names of `plots.PLOTS` below a suite's tables."""


CAPTIONS = {
    title: " ".join(text.split())
    for title, text in re.findall(r"^## (.+)\n\n((?:.+\n)+)", CAPTIONS_FILE.read_text(encoding="utf-8"), re.MULTILINE)
}
"""What stands below a table, by the heading in captions.md."""


def _table(
    rows: tuple[str, ...], *columns: Column, caption: str = "", where: Mapping[str, Condition] | None = None
) -> Table:
    return Table(rows, columns, CAPTIONS[caption] if caption else "", where or {})


def _of(metric: str, form: str, *figures: str) -> tuple[Column, ...]:
    """Return a column for each figure of a metric in milliseconds."""
    return tuple(Column(f"{figure} ms", metric, figure, form) for figure in figures)


def _each(form: str, *names: str, figure: str = "p50", scale: float = 1.0) -> tuple[Column, ...]:
    """Return a column for each "head: metric", or metric that is its own head."""
    pairs = (name.split(": ") for name in names)
    return tuple(Column(pair[0], pair[-1], figure, form, scale=scale) for pair in pairs)


EXPORT_COSINE = Column("worst cosine of export", "worst cosine of export", form=".6f", suite="bundle")
FP32_COSINE = Column("worst cosine to fp32", "worst cosine to fp32", "min", ".6f")
RATE = (Column("texts/s", "texts per second"), Column("slowest to fastest round", "texts per second", "range"))
ROUNDS = Column("rounds", "texts per second", "count")
ANALYZER, MEAN = {"client": "perf_analyzer"}, {"set": "mean"}
FOUR = ("p50", "p90", "p99", "p99.9")
REQUESTS = (
    *_of("time per request", ".1f", *FOUR),
    *_each(".1f", "queue ms: queue time", "compute ms: compute time", "texts per execution"),
    Column("n", "time per request", "count"),
    Column("failed", "failed requests", "sum"),
)

TABLES: Mapping[str, tuple[Table, ...]] = {
    "ceilings": (
        _table(
            ("party", "threads", "best shape", "MFLOP per token"),
            Column("GFLOP/s", "matrix products", "max"),
            caption="ceilings: matrix products",
        ),
        _table(
            ("threads", "array MiB", "last cache MiB"),
            *_each(".1f", "GB/s read: memory read", "GB/s copied: memory copied", figure="max"),
            caption="ceilings: memory",
        ),
    ),
    "throughput": (
        _table(
            ("party",),
            *RATE,
            Column("tokens/s", "tokens per second"),
            *_each("percent", "of ceiling: share of ceiling", "row fill"),
            Column("streams", "streams"),
            *_each(
                "percent", "tokenise: tokenize share", *(f"{one}: {one} share" for one in ("pack", "infer", "unpack"))
            ),
            ROUNDS,
            EXPORT_COSINE,
            FP32_COSINE,
            caption="throughput: workload",
        ),
        _table(
            ("tokens", "texts"),
            Column("{value}, tokens/s", "tokens per second", spread="party"),
            caption="throughput: lengths",
        ),
    ),
    "latency": (
        _table(
            ("party", "tokens"),
            *_of("time per text", ".2f", *FOUR),
            Column("floor ms", "floor", form=".2f"),
            Column("of floor", "floor", form="percent", over="time per text"),
            Column("n", "time per text", "count"),
            EXPORT_COSINE,
            caption="latency: texts",
        ),
    ),
    "quality": (
        _table(
            ("party",),
            Column("{value}", "Spearman x 100", "interval", ".2f", spread="set"),
            Column("difference to fp32", "Spearman x 100, difference to fp32", "signed interval", ".2f", where=MEAN),
            Column("top-10 overlap", "top-10 overlap with fp32", form="percent"),
            Column("texts searched", "texts searched"),
            caption="quality: scores",
        ),
    ),
    "serving": (
        _table(("party", "beside"), Column("texts/s in process", "texts per second"), where={"server": "in process"}),
        _table(
            ("party", "server", "callers", "texts per request"),
            RATE[0],
            *REQUESTS,
            Column("perf_analyzer texts/s", "texts per second", where=ANALYZER),
            *(Column(f"{one} ms", f"{one} of requests", form=".1f", where=ANALYZER) for one in ("p50", "p99")),
            caption="serving: closed",
            where={"loop": "closed"},
        ),
        _table(
            ("party", "share"),
            *_each(",.0f", "offered per second", "answered per second"),
            *REQUESTS,
            Column("unsent", "unsent requests"),
            Column("kept up", "kept up", "yes"),
            caption="serving: open",
            where={"loop": "open"},
        ),
        _table(
            ("party", "texts per request", "tokens"),
            *_each(",.0f", "maximum texts/s: maximum texts per second", "offered texts/s: offered texts per second"),
            Column("answered texts/s", "texts per second"),
            Column("of maximum", "texts per second", form="percent", over="maximum texts per second"),
            Column("calm p99 ms", "calm time per request", "p99", ".1f"),
            Column("accepted", "time per request", "count"),
            *_of("time per request", ".1f", "p50", "p99"),
            Column("refused", "refused requests"),
            *_of("time per refusal", ".1f", "p50", "p99"),
            Column("failed", "failed requests"),
            Column("sent late p99 ms", "sending lag", "p99", ".1f"),
            *_each(",.0f", "MiB before: memory before", "MiB after: memory after", scale=2**-20),
            Column("recovered after s", "recovery", form=".2f"),
            caption="serving: overload",
            where={"loop": "overload"},
        ),
    ),
    "startup": (
        _table(
            ("party",),
            Column("median s", "time to the first vector", form=".2f"),
            Column("fastest to slowest", "time to the first vector", "range", ".2f"),
            Column("n", "time to the first vector", "count"),
            *_each(",.0f", "MB at the first vector: memory at the first vector", "MB at most: peak memory", scale=1e-6),
            Column("texts", "texts for the peak"),
            Column("MB installed", "installed packages", scale=1e-6),
            EXPORT_COSINE,
            caption="startup: starts",
        ),
    ),
    "peers": (
        _table(
            ("party", "version", "computes in", "batch size"),
            # The cosine to fp32 has none of the rate's conditions.
            *RATE,
            ROUNDS,
            EXPORT_COSINE,
            replace(FP32_COSINE, suite="peers"),
            caption="peers: rates",
        ),
        _table(
            ("party", "tokens"),
            *_of("time per text", ".2f", "p50", "p90", "p99"),
            Column("n", "time per text", "count"),
            caption="peers: single texts",
        ),
        _table(
            ("party",),
            Column("{value}, times as fast", "our rate over its rate", "interval", ".2f", spread="ours"),
            Column("worst cosine to {value}", "cosine to ours", "min", ".6f", spread="ours"),
            caption="peers: ratios",
        ),
    ),
    "training": (
        _table(
            ("party",),
            Column("median s", "time to the saved folder", form=".1f"),
            Column("fastest to slowest", "time to the saved folder", "range", ".1f"),
            Column("{value}", "Spearman x 100", form=".2f", spread="set"),
            Column("mean, lowest to highest", "Spearman x 100", "range", ".2f", where=MEAN),
            Column("seeds", "seed", "count"),
            Column("texts", "texts"),
            caption="training: recipes",
        ),
    ),
}
