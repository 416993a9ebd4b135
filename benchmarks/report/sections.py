"""What a report shows of each suite, as data: tables with their captions and caveats, and plots."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from benchmarks.report.tables import Column, Table

EXPORT_COSINE = Column("worst cosine of export", "worst cosine of export", suite="bundle", form=".6f")
FP32_COSINE = Column("worst cosine to fp32", "worst cosine to fp32", figure="min", form=".6f")

PARITY_NOTE = (
    "Worst cosine of export is the worst text's similarity to the PyTorch reference when the artifact was exported; "
    "worst cosine to fp32 is the worst text's similarity to the bundle's own fp32 vectors, over this workload."
)


@dataclass(frozen=True)
class Section:
    """The part of a report about one suite; it is shown where one of its tables has rows.

    Attributes:
        text: above the tables.
        plots: names of `plots.PLOTS`, each drawn where the report has its figures.
    """

    title: str
    suite: str
    _: KW_ONLY
    tables: tuple[Table, ...]
    text: str = ""
    plots: tuple[str, ...] = ()


def _times(metric: str, form: str, figures: tuple[str, ...] = ("p50", "p90", "p99", "p99.9")) -> tuple[Column, ...]:
    return tuple(Column(f"{figure} ms", metric, figure=figure, form=form) for figure in figures)


def _megabytes(head: str, metric: str) -> Column:
    return Column(head, metric, scale=1e-6)


_RATE = (Column("texts/s", "texts per second"), Column("slowest to fastest round", "texts per second", figure="range"))
_SERVER_TIMES = (
    Column("queue ms", "queue time", form=".1f"),
    Column("compute ms", "compute time", form=".1f"),
    Column("texts per execution", "texts per execution", form=".1f"),
)
_N_FAILED = (Column("n", "time per request", figure="count"), Column("failed", "failed requests", figure="sum"))
_ANALYZER = {"client": "perf_analyzer"}

CEILINGS = Section(
    "Ceilings",
    "ceilings",
    tables=(
        Table(
            rows=("party", "threads", "best shape", "MFLOP per token"),
            columns=(Column("GFLOP/s", "matrix products", figure="max"),),
            text=(
                "Bare chained matrix products in the engine's own library on all usable cores: no encoder on this "
                "library can be faster. The rate is that of the fastest repetition. A token's cost counts the layers' "
                "matrix products only: attention scores, embeddings, norms and activations are left out. **A share of "
                "the ceiling above 100 % means that other work slowed the machine while the ceiling was measured.**"
            ),
        ),
        Table(
            rows=("threads", "array MiB", "last cache MiB"),
            columns=(
                Column("GB/s read", "memory read", figure="max", form=".1f"),
                Column("GB/s copied", "memory copied", figure="max", form=".1f"),
            ),
            text=(
                "Memory, all usable cores at once, each on its own part of an array. Copied counts read and written "
                "bytes together. The rate is that of the fastest repetition."
            ),
        ),
    ),
)

THROUGHPUT = Section(
    "Throughput",
    "throughput",
    tables=(
        Table(
            rows=("party",),
            columns=(
                *_RATE,
                Column("tokens/s", "tokens per second"),
                Column("of ceiling", "share of ceiling", form="percent"),
                Column("row fill", "row fill", form="percent"),
                Column("streams", "streams"),
                *(
                    Column(head, f"{stage} share", form="percent")
                    for head, stage in (
                        ("tokenise", "tokenize"),
                        ("pack", "pack"),
                        ("infer", "infer"),
                        ("unpack", "unpack"),
                    )
                ),
                Column("rounds", "texts per second", figure="count"),
                EXPORT_COSINE,
                FP32_COSINE,
            ),
            text=(
                "The whole workload in one `encode` call, tokenising included; medians over interleaved rounds. Tokens "
                "and the share of the ceiling count useful tokens, not padding. The stages' shares are of wall time: "
                "they overlap, and infer is summed over the streams. " + PARITY_NOTE
            ),
        ),
        Table(
            rows=("tokens", "texts"),
            columns=(Column("{value}, tokens/s", "tokens per second", spread="party"),),
            text="Different texts of exactly one length in one call; medians over interleaved rounds.",
        ),
    ),
    plots=("throughput", "agreement", "lengths"),
)

LATENCY = Section(
    "Latency of one text",
    "latency",
    tables=(
        Table(
            rows=("party", "tokens"),
            columns=(
                *_times("time per text", ".2f"),
                Column("floor ms", "floor", form=".2f"),
                Column("of floor", "floor", over="time per text", form="percent"),
                Column("n", "time per text", figure="count"),
                EXPORT_COSINE,
            ),
            text=(
                "One text a call, in process, warm, tokenising included, no server and no other load. The floor is "
                "what the text's matrix products take at the ceiling's rate on all cores, or what reading their "
                "weights takes from memory, as far as they exceed the last cache: the longer of the two. A text's "
                "share of it is floor over p50: 100 % is out of reach, and a short text has too few rows to fill the "
                "cores. With fewer than 1,000 samples p99 rests on a few of them, and p99.9 on one."
            ),
        ),
    ),
    plots=("latency", "latency_cdf"),
)

QUALITY = Section(
    "Quality",
    "quality",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column("{value}", "Spearman x 100", figure="interval", form=".2f", spread="set"),
                Column(
                    "difference to fp32",
                    "Spearman x 100, difference to fp32",
                    figure="signed interval",
                    form=".2f",
                    where={"set": "mean"},
                ),
                Column("top-10 overlap", "top-10 overlap with fp32", form="percent"),
                Column("texts searched", "texts searched"),
            ),
            text=(
                "Spearman x 100 of the vectors' cosines with people's scores, all pairs of a set together, with 95 % "
                "bootstrap intervals over pairs; the mean gives each set the same weight. The difference is that of "
                "the mean to the bundle's own fp32, over the same resampled pairs. The overlap is the share of a "
                "text's ten nearest texts that are its ten nearest in fp32, too. Sentence and word similarity only: no "
                "retrieval set with people's judgements."
            ),
        ),
    ),
    plots=("pareto",),
)

SERVING = Section(
    "Serving",
    "serving",
    text=(
        "Server, callers and this program share the machine's cores, over loopback: no network and no second machine. "
        "A closed loop's callers send their next request when the last one is answered; its rates are medians over "
        "rounds interleaved with passes in process. Queue and compute are means per request of Triton's own "
        "statistics; of a model that passes requests on to its own threads they cover the hand-over only. Our callers "
        "are Python and take more of the cores than perf_analyzer's: where the two differ, its rates are nearer to "
        "what callers on other machines would get. p99.9 rests on one request in a thousand."
    ),
    tables=(
        Table(
            rows=("party", "beside"),
            columns=(Column("texts/s in process", "texts per second"),),
            where={"server": "in process"},
        ),
        Table(
            rows=("party", "server", "callers", "texts per request"),
            columns=(
                Column("texts/s", "texts per second"),
                *_times("time per request", ".1f"),
                *_SERVER_TIMES,
                *_N_FAILED,
                Column("perf_analyzer texts/s", "texts per second", where=_ANALYZER),
                Column("p50 ms", "p50 of requests", form=".1f", where=_ANALYZER),
                Column("p99 ms", "p99 of requests", form=".1f", where=_ANALYZER),
            ),
            where={"loop": "closed"},
        ),
        Table(
            rows=("party", "share"),
            columns=(
                Column("offered per second", "offered per second"),
                Column("answered per second", "answered per second"),
                *_times("time per request", ".1f"),
                *_SERVER_TIMES,
                *_N_FAILED,
                Column("unsent", "unsent requests"),
                Column("kept up", "kept up", figure="yes"),
            ),
            where={"loop": "open"},
            text=(
                "Single texts that arrive at random (Poisson), at a share of the rate of the closed loop with 32 "
                "callers. A time counts from the moment a request was due, so that waiting behind a slow one counts. "
                "The last rate is the first that was too much, or the highest tried."
            ),
        ),
        Table(
            rows=("party", "texts per request", "tokens"),
            columns=(
                Column("maximum texts/s", "maximum texts per second"),
                Column("offered texts/s", "offered texts per second"),
                Column("answered texts/s", "texts per second"),
                Column("of maximum", "texts per second", over="maximum texts per second", form="percent"),
                Column("calm p99 ms", "calm time per request", figure="p99", form=".1f"),
                Column("accepted", "time per request", figure="count"),
                *_times("time per request", ".1f", ("p50", "p99")),
                Column("refused", "refused requests"),
                *_times("time per refusal", ".1f", ("p50", "p99")),
                Column("failed", "failed requests"),
                Column("sent late p99 ms", "sending lag", figure="p99", form=".1f"),
                Column("MiB before", "memory before", scale=2**-20),
                Column("MiB after", "memory after", scale=2**-20),
                Column("recovered after s", "recovery", form=".2f"),
            ),
            where={"loop": "overload"},
            text=(
                "Overload: requests arrive at random at twice the maximum, which a closed loop of the same requests "
                "had just reached. The server accepts `tokens` tokens at once and refuses more; no request is retried. "
                "It has recovered when a fresh request is answered within the p99 of such requests one after another. "
                "Memory is that of all of the server's processes."
            ),
        ),
    ),
    plots=("serving",),
)

STARTUP = Section(
    "Startup",
    "startup",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column("median s", "time to the first vector", form=".2f"),
                Column("fastest to slowest", "time to the first vector", figure="range", form=".2f"),
                Column("n", "time to the first vector", figure="count"),
                _megabytes("MB at the first vector", "memory at the first vector"),
                _megabytes("MB at most", "peak memory"),
                Column("texts", "texts for the peak"),
                _megabytes("MB installed", "installed packages"),
                EXPORT_COSINE,
            ),
            text=(
                "From process start to the first vector, each in a fresh process, files in the page cache. Where a "
                "peer converts a model, the conversion was saved before and is not counted. Memory is the process's "
                "peak resident set, shared files included: at the first vector, and after that many texts of the "
                "workload; medians. Installed are the packages that the party needs, without Python itself and pip."
            ),
        ),
    ),
)

SCALING = Section(
    "Scaling",
    "scaling",
    tables=(
        Table(
            rows=("party", "texts"),
            columns=(
                Column("µs per text", "time per text", form=",.1f"),
                Column("tokens per text", "tokens per text", form=".2f"),
                _megabytes("MB at the first window", "memory at the first window"),
                _megabytes("MB at most", "peak memory"),
                Column("processes", "time per text", figure="count"),
                EXPORT_COSINE,
            ),
            text=(
                "The workload's texts repeated, each time with another number of seven digits at the end, so that no "
                "text comes twice, from a generator through `encode_stream`; loading left out. Memory is the process's "
                "peak resident set."
            ),
        ),
        Table(
            rows=("party", "cores"),
            columns=(
                Column("streams", "streams"),
                Column("texts/s", "texts per second"),
                Column("CPU seconds per second", "CPU seconds per second", figure="max", form=".2f"),
                Column("rounds", "texts per second", figure="count"),
            ),
            text=(
                "The whole workload in one `encode` call, in a process that may run on so many cores. Streams are "
                "those that the engine chose. CPU seconds per second are the most of any round, over all threads."
            ),
        ),
        Table(
            rows=("party", "callers"),
            columns=(
                Column("texts/s of one encode", "texts per second of one encode"),
                Column("texts/s of the callers", "texts per second"),
                Column("share", "share of one encode", form="percent"),
                Column("rounds", "texts per second", figure="count"),
            ),
            text=(
                "Concurrent asyncio callers of single texts through `AsyncEncoder`, interleaved with one `encode` call "
                "of the same texts."
            ),
        ),
        Table(
            rows=("party", "full queue"),
            columns=(
                Column("calls", "calls"),
                Column("refused", "time until refused", figure="count"),
                *_times("time until refused", ".2f", ("p50", "max")),
                Column("accepted", "accepted"),
                Column("answered", "answered"),
                Column("worst cosine to one encode", "worst cosine to one encode", form=".6f"),
            ),
            text=(
                "Waves of the same callers meet a queue that so many texts fill; a refusal's time counts from the "
                "moment a call was due. Fewer answered than accepted calls mean that some were lost."
            ),
        ),
    ),
    plots=("scaling", "scaling_memory"),
)

PEERS = Section(
    "Peers",
    "peers",
    tables=(
        Table(
            rows=("party", "version", "computes in", "batch size"),
            columns=(
                *_RATE,
                Column("rounds", "texts per second", figure="count"),
                EXPORT_COSINE,
                replace(FP32_COSINE, suite="peers"),  # it has none of the rate's conditions
            ),
            text=(
                "The same weights and texts in the same run, ours and theirs interleaved. Each peer runs in its own "
                "environment and process at its defaults but for the batch size, which is the best of a sweep "
                "beforehand. " + PARITY_NOTE
            ),
        ),
        Table(
            rows=("party", "tokens"),
            columns=(
                *_times("time per text", ".2f", ("p50", "p90", "p99")),
                Column("n", "time per text", figure="count"),
            ),
            text=(
                "One text a call, warm, tokenising included, each party's own process timing its own calls, "
                "interleaved. Ours run with the streams that throughput needs; `mirror plan --for latency` finds what "
                "a single text needs."
            ),
        ),
        Table(
            rows=("party",),
            columns=(
                Column(
                    "{value}, times as fast", "our rate over its rate", figure="interval", form=".2f", spread="ours"
                ),
                Column("worst cosine to {value}", "cosine to ours", figure="min", form=".6f", spread="ours"),
            ),
            text=(
                "How many times as many texts per second ours encodes: ratios of median rates, with 95 % bootstrap "
                "intervals over the rounds. They show how rounds scattered, not what all of them had in common."
            ),
        ),
    ),
)

TRAINING = Section(
    "Training",
    "training",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column("median s", "time to the saved folder", form=".1f"),
                Column("fastest to slowest", "time to the saved folder", figure="range", form=".1f"),
                Column("{value}", "Spearman x 100", form=".2f", spread="set"),
                Column("mean, lowest to highest", "Spearman x 100", figure="range", form=".2f", where={"set": "mean"}),
                Column("seeds", "seed", figure="count"),
                Column("texts", "texts"),
            ),
            text=(
                "Seconds are from process start to the saved folder. Scores are Spearman x 100, medians over the "
                "seeds, all pairs of a set together."
            ),
        ),
    ),
    plots=("training",),
)

SECTIONS = (CEILINGS, THROUGHPUT, LATENCY, QUALITY, SERVING, STARTUP, SCALING, PEERS, TRAINING)
