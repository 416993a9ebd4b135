"""The sections on speed: ceilings, throughput, latency, startup, serving."""

from __future__ import annotations

from benchmarks.blocks import NONE, Block, Plot, Section, Table, cosine_text, percent
from benchmarks.point import Point
from benchmarks.results import Report
from benchmarks.serving_results import ClosedLoop, OpenLoop, ServingResult

PARITY_NOTE = "Min cosine is the worst text's similarity to the reference when the artifact was exported (manifest)."


def ceilings(report: Report) -> Section | None:
    """Show what the machine could give at best."""
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


def throughput(report: Report) -> Section | None:
    """Show texts a second over the whole workload."""
    if not report.throughput:
        return None
    rows = [
        (
            r.point.name,
            f"{r.texts_per_s:,.0f}",
            f"{r.texts_per_s_min:,.0f} to {r.texts_per_s_max:,.0f}",
            f"{r.tokens_per_s:,.0f}",
            percent(r.ceiling_share),
            percent(r.row_fill),
            str(r.streams),
            f"{percent(r.tokenize_share)} / {percent(r.pack_share)} / {percent(r.infer_share)} / "
            f"{percent(r.unpack_share)}",
            str(len(r.samples_s)),
            parity(r.point),
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
        "they overlap, and infer is summed over the streams. " + PARITY_NOTE + above
    )
    return Section("Throughput", (Table(head, rows), text, Plot("throughput", "Texts a second"), *_lengths(report)))


def _lengths(report: Report) -> tuple[Block, ...]:
    """Lay lengths against artifacts: a row a length."""
    if not report.lengths:
        return ()
    found = {(r.tokens, r.point.name): r for r in report.lengths}
    names = tuple(dict.fromkeys(r.point.name for r in report.lengths))
    rows = [
        (
            str(tokens),
            *(NONE if (r := found.get((tokens, name))) is None else f"{r.tokens_per_s:,.0f}" for name in names),
        )
        for tokens in sorted({r.tokens for r in report.lengths})
    ]
    head = ("tokens of each text", *(f"{name}, tokens/s" for name in names))
    text = f"{report.lengths[0].texts} different texts of exactly one length in one call; medians of rounds in turns."
    return Table(head, rows), text, Plot("lengths", "Throughput against length")


def latency(report: Report) -> Section | None:
    """Show how long one text takes."""
    if not report.latency:
        return None
    rows = [
        (
            r.point.name,
            str(r.tokens),
            f"{r.p50_ms:.2f}",
            f"{r.p90_ms:.2f}",
            f"{r.p99_ms:.2f}",
            f"{r.p999_ms:.2f}",
            str(len(r.samples_ms)),
            parity(r.point),
        )
        for r in report.latency
    ]
    few = any(len(r.samples_ms) < 300 for r in report.latency)
    head = ("engine, precision", "tokens", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "n", "min cosine")
    text = (
        "One text a call, in process, warm, tokenising included, no server and nobody else asking. "
        + ("With fewer than 300 samples p99 rests on one to three of them. " if few else "")
        + PARITY_NOTE
    )
    plots = (
        Plot("latency", "Latency of one text against its length"),
        Plot("latency_cdf", "How latencies are distributed"),
    )
    return Section("Latency of one text", (Table(head, rows), text, *plots))


def startup(report: Report) -> Section | None:
    """Show how long the first vector takes."""
    if not report.startup:
        return None
    rows = [
        (
            r.party,
            f"{r.median_s:.2f}",
            f"{min(r.samples_s):.2f} to {max(r.samples_s):.2f}",
            str(len(r.samples_s)),
            f"{r.first_vector_bytes / 1e6:,.0f}",
            f"{r.peak_bytes / 1e6:,.0f}",
            f"{r.installed_bytes / 1e6:,.0f}",
            NONE if r.min_cosine is None else cosine_text(r.min_cosine),
        )
        for r in report.startup
    ]
    head = (
        "party", "median s", "min to max", "n", "MB at the first vector", "MB at most", "MB installed", "min cosine",
    )  # fmt: skip
    text = (
        "From process start to the first vector, each in a fresh process, files in the page cache. "
        "Where a peer converts a model, the conversion was saved before and is not counted. Memory is the process's "
        f"peak resident set, shared files included: at the first vector, and after {report.startup[0].texts:,} texts "
        "of the workload, medians too. Installed are the packages that the party needs, Python itself and pip left out."
    )
    return Section("Startup", (Table(head, rows), text))


def parity(point: Point) -> str:
    """Write the parity that a point's artifact was exported with."""
    return cosine_text(point.parity.min_cosine)


def serving(report: Report) -> Section | None:
    """Show artifacts behind a server: closed loops, random arrivals, and somebody else's measure of the same."""
    if not report.serving:
        return None
    blocks: list[Block] = []
    for result in report.serving:
        blocks += [f"**{result.name}**, {result.server}, {result.protocol}: {_serving_text(result)}"]
        if result.closed:
            blocks.append(Table(_CLOSED_HEAD, [_closed_row(loop, result) for loop in result.closed]))
        if result.open:
            blocks.append(Table(_OPEN_HEAD, [_open_row(loop) for loop in result.open]))
    text = (
        "Server, callers and this program share the machine's cores. A closed loop's callers send their next request "
        "when the last one is answered; its rates are medians over rounds in turns with passes in process. Arrivals "
        "are random (Poisson), of single texts, and each one's time counts from the moment it was to be sent, so that "
        "waiting behind a slow one counts. The last rate is the first that was too much, or the highest tried. Queue "
        "and compute are means of Triton's own statistics, a request: of a model that hands requests to threads of its "
        "own they hold the handing over alone. Our callers are Python and take more of the cores than perf_analyzer's: "
        "where the two differ, its rates are nearer to what callers on other machines would get."
    )
    return Section("Serving", (text, *blocks, Plot("serving", "Load against latency")))


_CLOSED_HEAD = (
    "callers x texts", "texts/s", "p50 ms", "p90 ms", "p99 ms", "queue ms", "compute ms", "texts an execution", "n",
    "failed", "perf_analyzer texts/s", "p50 ms", "ours to its",
)  # fmt: skip
_OPEN_HEAD = (
    "offered a second", "answered a second", "p50 ms", "p90 ms", "p99 ms", "queue ms", "compute ms",
    "texts an execution", "n", "failed", "kept up",
)  # fmt: skip


def _serving_text(result: ServingResult) -> str:
    share, knee = result.share_of_in_process, result.knee_per_s
    kept = "no rate was kept up with" if knee is None else f"up to {knee:,.0f} single texts a second were kept up with"
    best = "" if share is None else f"the best closed loop reaches {percent(share)} of that; "
    return f"{result.in_process_texts_per_s:,.0f} texts/s in process without a server; {best}{kept}."


def _closed_row(loop: ClosedLoop, result: ServingResult) -> tuple[str, ...]:
    beside = [
        run
        for run in result.perf_analyzer
        if (run.concurrency, run.texts_a_request) == (loop.concurrency, loop.texts_a_request)
    ]
    theirs = (
        (f"{beside[0].texts_per_s:,.0f}", f"{beside[0].p50_ms:.1f}", f"{loop.texts_per_s / beside[0].texts_per_s:.2f}")
        if beside
        else (NONE, NONE, NONE)
    )
    return (
        f"{loop.concurrency} x {loop.texts_a_request}",
        f"{loop.texts_per_s:,.0f}",
        *_times(loop),
        str(loop.requests),
        str(loop.errors),
        *theirs,
    )


def _open_row(loop: OpenLoop) -> tuple[str, ...]:
    given_up = f", {loop.unsent} never sent" if loop.unsent else ""
    return (
        f"{loop.offered_per_s:,.0f}",
        f"{loop.achieved_per_s:,.0f}",
        *_times(loop),
        str(loop.requests),
        str(loop.errors),
        "yes" if loop.kept_up else f"no{given_up}",
    )


def _times(loop: ClosedLoop | OpenLoop) -> tuple[str, ...]:
    server = loop.server
    inside = (
        (NONE, NONE, NONE)
        if server is None
        else (f"{server.queue_ms:.1f}", f"{server.compute_ms:.1f}", f"{server.texts_per_execution:.1f}")
    )
    return f"{loop.p50_ms:.1f}", f"{loop.p90_ms:.1f}", f"{loop.p99_ms:.1f}", *inside
