"""What a report shows of each suite, as data: tables with their captions and caveats, and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.report.record import Condition
from benchmarks.report.tables import Column, Table

TITLES = {"latency": "Latency of one text"}
"""Of the sections that have other titles than their suites."""

PLOTS_OF: Mapping[str, tuple[str, ...]] = {
    "throughput": ("throughput", "agreement", "lengths"),
    "latency": ("latency", "latency_cdf"),
    "quality": ("pareto",),
    "serving": ("serving",),
    "training": ("training",),
}
"""Names of `plots.PLOTS` below a suite's tables."""

PARITY_NOTE = """Worst cosine of export is the worst text's similarity to the PyTorch reference when the artifact was
exported; worst cosine to fp32 is the worst text's similarity to the bundle's own fp32 vectors, over this workload."""


def _table(
    rows: tuple[str, ...], *columns: Column, text: str = "", where: Mapping[str, Condition] | None = None
) -> Table:
    return Table(rows, columns, " ".join(text.split()), where or {})


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
            text="""Bare chained matrix products in the engine's own library on all usable cores: no encoder on this
            library can be faster. The rate is that of the fastest repetition. A token's cost counts the layers' matrix
            products only: attention scores, embeddings, norms and activations are left out. **A share of the ceiling
            above 100 % means that other work slowed the machine while the ceiling was measured.**""",
        ),
        _table(
            ("threads", "array MiB", "last cache MiB"),
            *_each(".1f", "GB/s read: memory read", "GB/s copied: memory copied", figure="max"),
            text="""Memory, all usable cores at once, each on its own part of an array. Copied counts read and written
            bytes together. The rate is that of the fastest repetition.""",
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
            text=f"""The whole workload in one `encode` call, tokenising included; medians over interleaved rounds.
            Tokens and the share of the ceiling count useful tokens, not padding. The stages' shares are of wall time:
            they overlap, and infer is summed over the streams. {PARITY_NOTE}""",
        ),
        _table(
            ("tokens", "texts"),
            Column("{value}, tokens/s", "tokens per second", spread="party"),
            text="Different texts of exactly one length in one call; medians over interleaved rounds.",
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
            text="""One text a call, in process, warm, tokenising included, no server and no other load. The floor is
            what the text's matrix products take at the ceiling's rate on all cores, or what reading their weights takes
            from memory, as far as they exceed the last cache: the longer of the two. A text's share of it is floor over
            p50: 100 % is out of reach, and a short text has too few rows to fill the cores. With fewer than 1,000
            samples p99 rests on a few of them, and p99.9 on one.""",
        ),
    ),
    "quality": (
        _table(
            ("party",),
            Column("{value}", "Spearman x 100", "interval", ".2f", spread="set"),
            Column("difference to fp32", "Spearman x 100, difference to fp32", "signed interval", ".2f", where=MEAN),
            Column("top-10 overlap", "top-10 overlap with fp32", form="percent"),
            Column("texts searched", "texts searched"),
            text="""Spearman x 100 of the vectors' cosines with people's scores, all pairs of a set together, with 95 %
            bootstrap intervals over pairs; the mean gives each set the same weight. The difference is that of the mean
            to the bundle's own fp32, over the same resampled pairs. The overlap is the share of a text's ten nearest
            texts that are its ten nearest in fp32, too. Sentence and word similarity only: no retrieval set with
            people's judgements.""",
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
            text="""Server, callers and this program share the machine's cores, over loopback: no network and no second
            machine. A closed loop's callers send their next request when the last one is answered; its rates are
            medians over rounds interleaved with passes in process. Queue and compute are means per request of Triton's
            own statistics; of a model that passes requests on to its own threads they cover the hand-over only. Our
            callers are Python and take more of the cores than perf_analyzer's: where the two differ, its rates are
            nearer to what callers on other machines would get. p99.9 rests on one request in a thousand.""",
            where={"loop": "closed"},
        ),
        _table(
            ("party", "share"),
            *_each(",.0f", "offered per second", "answered per second"),
            *REQUESTS,
            Column("unsent", "unsent requests"),
            Column("kept up", "kept up", "yes"),
            text="""Single texts that arrive at random (Poisson), at a share of the rate of the closed loop with 32
            callers. A time counts from the moment a request was due, so that waiting behind a slow one counts. The last
            rate is the first that was too much, or the highest tried.""",
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
            text="""Overload: requests arrive at random at twice the maximum, which a closed loop of the same requests
            had just reached. The server accepts `tokens` tokens at once and refuses more; no request is retried. It has
            recovered when a fresh request is answered within the p99 of such requests one after another. Memory is that
            of all of the server's processes.""",
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
            text="""From process start to the first vector, each in a fresh process, files in the page cache. Where a
            peer converts a model, the conversion was saved before and is not counted. Memory is the process's peak
            resident set, shared files included: at the first vector, and after that many texts of the workload;
            medians. Installed are the packages that the party needs, without Python itself and pip.""",
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
            text=f"""The same weights and texts in the same run, ours and theirs interleaved. Each peer runs in its own
            environment and process at its defaults but for the batch size, which is the best of a sweep beforehand.
            {PARITY_NOTE}""",
        ),
        _table(
            ("party", "tokens"),
            *_of("time per text", ".2f", "p50", "p90", "p99"),
            Column("n", "time per text", "count"),
            text="""One text a call, warm, tokenising included, each party's own process timing its own calls,
            interleaved. Ours run with the streams that throughput needs; `mirror plan --for latency` finds what a
            single text needs.""",
        ),
        _table(
            ("party",),
            Column("{value}, times as fast", "our rate over its rate", "interval", ".2f", spread="ours"),
            Column("worst cosine to {value}", "cosine to ours", "min", ".6f", spread="ours"),
            text="""How many times as many texts per second ours encodes: ratios of median rates, with 95 % bootstrap
            intervals over the rounds. They show how rounds scattered, not what all of them had in common.""",
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
            text="""Seconds are from process start to the saved folder. Scores are Spearman x 100, medians over the
            seeds, all pairs of a set together.""",
        ),
    ),
}
