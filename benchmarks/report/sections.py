"""What a report shows of each suite, as data: tables with their captions and caveats, and plots."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.report.tables import Column, Table

EXPORT_COSINE = Column(head="worst cosine of export", metric="worst cosine of export", suite="bundle", form=".6f")
FP32_COSINE = Column(head="worst cosine to fp32", metric="worst cosine to fp32", figure="min", form=".6f")

PARITY_NOTE = (
    "Worst cosine of export is the worst text's similarity to the PyTorch reference when the artifact was exported; "
    "worst cosine to fp32 is the worst text's similarity to the bundle's own fp32 vectors, over this workload."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of a report about one suite; it is shown where one of its tables has rows.

    Attributes:
        text: above the tables.
        plots: names of `plots.PLOTS`, each drawn where the report has its figures.
    """

    title: str
    suite: str
    tables: tuple[Table, ...]
    text: str = ""
    plots: tuple[str, ...] = ()


def _times(metric: str, form: str, figures: tuple[str, ...] = ("p50", "p90", "p99", "p99.9")) -> tuple[Column, ...]:
    return tuple(Column(head=f"{figure} ms", metric=metric, figure=figure, form=form) for figure in figures)


def _megabytes(head: str, metric: str) -> Column:
    return Column(head=head, metric=metric, scale=1e-6)


_RATE = (
    Column(head="texts/s", metric="texts per second"),
    Column(head="slowest to fastest round", metric="texts per second", figure="range"),
)
_SERVER_TIMES = (
    Column(head="queue ms", metric="queue time", form=".1f"),
    Column(head="compute ms", metric="compute time", form=".1f"),
    Column(head="texts per execution", metric="texts per execution", form=".1f"),
)
_N_FAILED = (
    Column(head="n", metric="time per request", figure="count"),
    Column(head="failed", metric="failed requests", figure="sum"),
)
_ANALYZER = {"client": "perf_analyzer"}

CEILINGS = Section(
    title="Ceilings",
    suite="ceilings",
    tables=(
        Table(
            rows=("party", "threads", "best shape", "MFLOP per token"),
            columns=(Column(head="GFLOP/s", metric="matrix products", figure="max"),),
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
                Column(head="GB/s read", metric="memory read", figure="max", form=".1f"),
                Column(head="GB/s copied", metric="memory copied", figure="max", form=".1f"),
            ),
            text=(
                "Memory, all usable cores at once, each on its own part of an array. Copied counts read and written "
                "bytes together. The rate is that of the fastest repetition."
            ),
        ),
    ),
)

THROUGHPUT = Section(
    title="Throughput",
    suite="throughput",
    tables=(
        Table(
            rows=("party",),
            columns=(
                *_RATE,
                Column(head="tokens/s", metric="tokens per second"),
                Column(head="of ceiling", metric="share of ceiling", form="percent"),
                Column(head="row fill", metric="row fill", form="percent"),
                Column(head="streams", metric="streams"),
                *(
                    Column(head=head, metric=f"{stage} share", form="percent")
                    for head, stage in (
                        ("tokenise", "tokenize"),
                        ("pack", "pack"),
                        ("infer", "infer"),
                        ("unpack", "unpack"),
                    )
                ),
                Column(head="rounds", metric="texts per second", figure="count"),
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
            columns=(Column(head="{value}, tokens/s", metric="tokens per second", spread="party"),),
            where={},
            text="Different texts of exactly one length in one call; medians over interleaved rounds.",
        ),
    ),
    plots=("throughput", "agreement", "lengths"),
)

LATENCY = Section(
    title="Latency of one text",
    suite="latency",
    tables=(
        Table(
            rows=("party", "tokens"),
            columns=(
                *_times("time per text", ".2f"),
                Column(head="floor ms", metric="floor", form=".2f"),
                Column(head="of floor", metric="floor", over="time per text", form="percent"),
                Column(head="n", metric="time per text", figure="count"),
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
    title="Quality",
    suite="quality",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column(head="{value}", metric="Spearman x 100", figure="interval", form=".2f", spread="set"),
                Column(
                    head="difference to fp32", metric="Spearman x 100, difference to fp32", figure="signed interval",
                    form=".2f", where={"set": "mean"},
                ),
                Column(head="top-10 overlap", metric="top-10 overlap with fp32", form="percent"),
                Column(head="texts searched", metric="texts searched"),
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
)  # fmt: skip

SERVING = Section(
    title="Serving",
    suite="serving",
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
            columns=(Column(head="texts/s in process", metric="texts per second"),),
            where={"server": "in process"},
        ),
        Table(
            rows=("party", "server", "callers", "texts per request"),
            columns=(
                Column(head="texts/s", metric="texts per second"),
                *_times("time per request", ".1f"),
                *_SERVER_TIMES,
                *_N_FAILED,
                Column(head="perf_analyzer texts/s", metric="texts per second", where=_ANALYZER),
                Column(head="p50 ms", metric="p50 of requests", form=".1f", where=_ANALYZER),
                Column(head="p99 ms", metric="p99 of requests", form=".1f", where=_ANALYZER),
            ),
            where={"loop": "closed"},
        ),
        Table(
            rows=("party", "share"),
            columns=(
                Column(head="offered per second", metric="offered per second"),
                Column(head="answered per second", metric="answered per second"),
                *_times("time per request", ".1f"),
                *_SERVER_TIMES,
                *_N_FAILED,
                Column(head="unsent", metric="unsent requests"),
                Column(head="kept up", metric="kept up", figure="yes"),
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
                Column(head="maximum texts/s", metric="maximum texts per second"),
                Column(head="offered texts/s", metric="offered texts per second"),
                Column(head="answered texts/s", metric="texts per second"),
                Column(head="of maximum", metric="texts per second", over="maximum texts per second", form="percent"),
                Column(head="calm p99 ms", metric="calm time per request", figure="p99", form=".1f"),
                Column(head="accepted", metric="time per request", figure="count"),
                *_times("time per request", ".1f", ("p50", "p99")),
                Column(head="refused", metric="refused requests"),
                *_times("time per refusal", ".1f", ("p50", "p99")),
                Column(head="failed", metric="failed requests"),
                Column(head="sent late p99 ms", metric="sending lag", figure="p99", form=".1f"),
                Column(head="MiB before", metric="memory before", scale=2**-20),
                Column(head="MiB after", metric="memory after", scale=2**-20),
                Column(head="recovered after s", metric="recovery", form=".2f"),
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
    title="Startup",
    suite="startup",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column(head="median s", metric="time to the first vector", form=".2f"),
                Column(head="fastest to slowest", metric="time to the first vector", figure="range", form=".2f"),
                Column(head="n", metric="time to the first vector", figure="count"),
                _megabytes("MB at the first vector", "memory at the first vector"),
                _megabytes("MB at most", "peak memory"),
                Column(head="texts", metric="texts for the peak"),
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
    title="Scaling",
    suite="scaling",
    tables=(
        Table(
            rows=("party", "texts"),
            columns=(
                Column(head="µs per text", metric="time per text", form=",.1f"),
                Column(head="tokens per text", metric="tokens per text", form=".2f"),
                _megabytes("MB at the first window", "memory at the first window"),
                _megabytes("MB at most", "peak memory"),
                Column(head="processes", metric="time per text", figure="count"),
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
                Column(head="streams", metric="streams"),
                Column(head="texts/s", metric="texts per second"),
                Column(head="CPU seconds per second", metric="CPU seconds per second", figure="max", form=".2f"),
                Column(head="rounds", metric="texts per second", figure="count"),
            ),
            text=(
                "The whole workload in one `encode` call, in a process that may run on so many cores. Streams are "
                "those that the engine chose. CPU seconds per second are the most of any round, over all threads."
            ),
        ),
        Table(
            rows=("party", "callers"),
            columns=(
                Column(head="texts/s of one encode", metric="texts per second of one encode"),
                Column(head="texts/s of the callers", metric="texts per second"),
                Column(head="share", metric="share of one encode", form="percent"),
                Column(head="rounds", metric="texts per second", figure="count"),
            ),
            text=(
                "Concurrent asyncio callers of single texts through `AsyncEncoder`, interleaved with one `encode` call "
                "of the same texts."
            ),
        ),
        Table(
            rows=("party", "full queue"),
            columns=(
                Column(head="calls", metric="calls"),
                Column(head="refused", metric="time until refused", figure="count"),
                *_times("time until refused", ".2f", ("p50", "max")),
                Column(head="accepted", metric="accepted"),
                Column(head="answered", metric="answered"),
                Column(head="worst cosine to one encode", metric="worst cosine to one encode", form=".6f"),
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
    title="Peers",
    suite="peers",
    tables=(
        Table(
            rows=("party", "version", "computes in", "batch size"),
            columns=(
                *_RATE,
                Column(head="rounds", metric="texts per second", figure="count"),
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
                Column(head="n", metric="time per text", figure="count"),
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
                    head="{value}, times as fast", metric="our rate over its rate", figure="interval", form=".2f",
                    spread="ours",
                ),
                Column(
                    head="worst cosine to {value}", metric="cosine to ours", figure="min", form=".6f", spread="ours"
                ),
            ),
            text=(
                "How many times as many texts per second ours encodes: ratios of median rates, with 95 % bootstrap "
                "intervals over the rounds. They show how rounds scattered, not what all of them had in common."
            ),
        ),
    ),
)  # fmt: skip

TRAINING = Section(
    title="Training",
    suite="training",
    tables=(
        Table(
            rows=("party",),
            columns=(
                Column(head="median s", metric="time to the saved folder", form=".1f"),
                Column(head="fastest to slowest", metric="time to the saved folder", figure="range", form=".1f"),
                Column(head="{value}", metric="Spearman x 100", form=".2f", spread="set"),
                Column(
                    head="mean, lowest to highest", metric="Spearman x 100", figure="range", form=".2f",
                    where={"set": "mean"},
                ),
                Column(head="seeds", metric="seed", figure="count"),
                Column(head="texts", metric="texts"),
            ),
            text=(
                "Seconds are from process start to the saved folder. Scores are Spearman x 100, medians over the "
                "seeds, all pairs of a set together."
            ),
        ),
    ),
    plots=("training",),
)  # fmt: skip

SECTIONS = (CEILINGS, THROUGHPUT, LATENCY, QUALITY, SERVING, STARTUP, SCALING, PEERS, TRAINING)
