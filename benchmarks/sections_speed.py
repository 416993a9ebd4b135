"""The sections on speed without a server: ceilings, throughput, latency, startup."""

from __future__ import annotations

from benchmarks.blocks import NONE, Block, Plot, Section, Table, cosine_text, percent
from benchmarks.point import Point
from benchmarks.results import Report

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
    return Section("Ceilings", (Table(head, rows), text, *_bandwidth(report)))


def _bandwidth(report: Report) -> tuple[Block, ...]:
    """Show how fast memory is, beside the arithmetic."""
    memory = report.bandwidth
    if memory is None:
        return ()
    rows = [
        ("read", f"{memory.read_gb_per_s:.1f}", f"{memory.read_gb_per_s / memory.threads:.1f}"),
        (
            "copied, read and written bytes together",
            f"{memory.copy_gb_per_s:.1f}",
            f"{memory.copy_gb_per_s / memory.threads:.1f}",
        ),
    ]
    text = (
        f"All usable cores at once, each its part of an array of {memory.array_bytes / 2**20:,.0f} MiB; the last cache "
        f"holds {memory.cache_bytes / 2**20:,.0f} MiB. The rate is that of the fastest repetition."
    )
    return Table(("memory", "GB/s", "per core"), rows), text


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
    counts = sorted({r.texts for r in report.lengths})
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{many} different texts of exactly one length in one call; medians of rounds in turns."
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
            NONE if r.floor_ms is None else f"{r.floor_ms:.2f}",
            percent(None if r.floor_ms is None else r.floor_ms / r.p50_ms),
            str(len(r.samples_ms)),
            parity(r.point),
        )
        for r in report.latency
    ]
    few = any(len(r.samples_ms) < 300 for r in report.latency)
    head = (
        "engine, precision",
        "tokens",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "p99.9 ms",
        "floor ms",
        "of floor",
        "n",
        "min cosine",
    )
    text = (
        "One text a call, in process, warm, tokenising included, no server and nobody else asking. "
        "The floor is what the text's matrix products take at the ceiling's rate, on all cores, or what reading their "
        "weights takes from memory, as far as they are more than the last cache holds: the longer of the two. A text's "
        "share of it is floor over p50: 100 % is out of reach, and a short text has too few rows to fill the cores. "
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
