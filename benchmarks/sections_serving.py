"""The section on servers: closed loops, random arrivals, somebody else's measure of the same, and too much work."""

from __future__ import annotations

from benchmarks.blocks import NONE, Block, Plot, Section, Table, percent
from benchmarks.results import Report
from benchmarks.serving_results import ClosedLoop, OpenLoop, Overload, ServingResult


def serving(report: Report) -> Section | None:
    """Show artifacts behind a server, with as much to do as it can and with more."""
    if not report.serving:
        return None
    blocks: list[Block] = []
    for result in report.serving:
        blocks += [f"**{result.point}**, {result.server}, {result.protocol}: {_serving_text(result)}"]
        if result.closed:
            blocks.append(Table(_CLOSED_HEAD, [_closed_row(loop, result) for loop in result.closed]))
        if result.open:
            blocks.append(Table(_OPEN_HEAD, [_open_row(loop) for loop in result.open]))
        if result.overload is not None:
            blocks += [_overload_text(result.overload), Table(_OVERLOAD_HEAD, [_overload_row(result.overload)])]
    text = (
        "Server, callers and this program share the machine's cores. A closed loop's callers send their next request "
        "when the last one is answered; its rates are medians over rounds in turns with passes in process. Arrivals "
        "are random (Poisson), of single texts, and each one's time counts from the moment it was to be sent, so that "
        "waiting behind a slow one counts. The last rate is the first that was too much, or the highest tried. Queue "
        "and compute are means of Triton's own statistics, a request: of a model that hands requests to threads of its "
        "own they hold the handing over alone. Our callers are Python and take more of the cores than perf_analyzer's: "
        "where the two differ, its rates are nearer to what callers on other machines would get. p99.9 rests on one "
        "request in a thousand: of fewer than some thousands it is near the slowest one. The gateway is `mirror "
        "gateway` with the artifact in its own process; its callers post to /embed over connections that stay open, "
        "and read JSON where Triton's read bytes."
    )
    return Section("Serving", (text, *blocks, Plot("serving", "Load against latency")))


_CLOSED_HEAD = (
    "callers x texts", "texts/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "queue ms", "compute ms",
    "texts an execution", "n", "failed", "perf_analyzer texts/s", "p50 ms", "ours to its",
)  # fmt: skip
_OPEN_HEAD = (
    "offered a second", "answered a second", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "queue ms", "compute ms",
    "texts an execution", "n", "failed", "kept up",
)  # fmt: skip

_OVERLOAD_HEAD = (
    "offered texts/s", "answered texts/s", "of maximum", "accepted", "p50 ms", "p99 ms", "refused", "p50 ms", "p99 ms",
    "failed", "sent late p99 ms", "MiB before", "MiB after", "recovered after s",
)  # fmt: skip


def _serving_text(result: ServingResult) -> str:
    share, knee = result.share_of_in_process, result.knee_per_s
    parts = [f"{result.in_process_texts_per_s:,.0f} texts/s in process without a server"]
    if share is not None:
        parts.append(f"the best closed loop reaches {percent(share)} of that")
    if knee is not None:
        parts.append(f"up to {knee:,.0f} single texts a second were kept up with")
    elif result.open:
        parts.append("no rate was kept up with")
    return f"{'; '.join(parts)}."


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


def _overload_text(overload: Overload) -> str:
    return (
        f"Overload: for {overload.seconds:g} s, requests of {overload.texts_a_request} texts arrive at random "
        "(Poisson) from a process of their own, at twice the "
        f"{overload.maximum_texts_per_s:,.0f} texts/s that a closed loop of the same requests from the same process "
        f"had just reached. The server takes {overload.max_tokens_in_flight:,} tokens at once, as `mirror serve` does "
        "by default, and refuses what comes on top; nobody asks again. All times count from the moment a request was "
        f"due. It has recovered when a fresh request is answered within {overload.calm_p99_ms:.1f} ms, the p99 of such "
        "requests one after another before. "
        "Memory is of all of the server's processes."
    )


def _overload_row(overload: Overload) -> tuple[str, ...]:
    return (
        f"{overload.offered_texts_per_s:,.0f}",
        f"{overload.goodput_texts_per_s:,.0f}",
        percent(overload.goodput_share),
        str(overload.accepted),
        f"{overload.accepted_p50_ms:.1f}",
        f"{overload.accepted_p99_ms:.1f}",
        str(overload.refused),
        _milliseconds(overload.refused_p50_ms),
        _milliseconds(overload.refused_p99_ms),
        str(overload.errors),
        f"{overload.lag_p99_ms:.1f}",
        f"{overload.resident_before_bytes / 2**20:,.0f}",
        f"{overload.resident_after_bytes / 2**20:,.0f}",
        "not" if overload.recovery_s is None else f"{overload.recovery_s:.2f}",
    )


def _milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _times(loop: ClosedLoop | OpenLoop) -> tuple[str, ...]:
    server = loop.server
    inside = (
        (NONE, NONE, NONE)
        if server is None
        else (f"{server.queue_ms:.1f}", f"{server.compute_ms:.1f}", f"{server.texts_per_execution:.1f}")
    )
    return f"{loop.p50_ms:.1f}", f"{loop.p90_ms:.1f}", f"{loop.p99_ms:.1f}", f"{loop.p999_ms:.1f}", *inside
