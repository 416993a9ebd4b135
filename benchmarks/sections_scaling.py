"""The section on scaling: cost against texts, cores and callers."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.blocks import NONE, Block, Plot, Section, Table, cosine_text, percent
from benchmarks.results import Report
from benchmarks.scaling_results import CallersResult
from benchmarks.sections_speed import parity
from benchmarks.summary import median


def scaling(report: Report) -> Section | None:
    """Show how each artifact scales."""
    if not report.scaling:
        return None
    blocks = (*_sizes(report), *_cores(report), *_callers(report))
    return Section("Scaling", (*blocks, Plot("scaling", "Time of a text and peak memory against the number of texts")))


def _sizes(report: Report) -> Sequence[Block]:
    rows = []
    for result in report.scaling:
        for size in result.sizes:
            ratio = result.ratio(size)
            rows.append(
                (
                    result.point.name,
                    f"{size.texts:,}",
                    f"{size.us_per_text:,.1f}",
                    NONE if ratio is None else f"{ratio:.3f}",
                    f"{size.tokens / size.texts:.2f}",
                    f"{size.first_bytes / 1e6:,.0f}",
                    f"{size.peak_bytes / 1e6:,.0f}",
                    str(len(size.samples_s)),
                    parity(result.point),
                )
            )
    if not rows:
        return ()
    head = (
        "engine, precision", "texts", "µs a text", "to 10,000", "tokens a text", "MB at the first window",
        "MB at most", "processes", "min cosine",
    )  # fmt: skip
    text = (
        "The workload's texts over and over, each time with another number of seven digits at the end, so that none "
        "comes twice, from a generator through `encode_stream`; loading left out. `to 10,000` is a text's time over "
        "that at 10,000 texts, or at the size nearest to it. Memory is the process's peak resident set."
    )
    return Table(head, rows), text


def _cores(report: Report) -> Sequence[Block]:
    rows = []
    for result in report.scaling:
        for one in result.cores:
            rows.append(
                (
                    result.point.name,
                    str(one.cores),
                    str(one.streams),
                    f"{one.texts_per_s:,.0f}",
                    f"{one.texts_per_s / result.cores[0].texts_per_s * result.cores[0].cores:.2f}",
                    f"{one.cpu_share:.2f}",
                    str(len(one.samples_s)),
                )
            )
    if not rows:
        return ()
    head = ("engine, precision", "cores", "streams", "texts/s", "times one core", "CPU seconds a second", "rounds")
    text = (
        "The whole workload in one `encode` call, in a process whose affinity leaves it so many cores. Streams are "
        "those that the engine chose. CPU seconds a second are the most of any round, over all threads."
    )
    return Table(head, rows), text


def _callers(report: Report) -> Sequence[Block]:
    found = [(result.point.name, one) for result in report.scaling if (one := result.callers) is not None]
    if not found:
        return ()
    rates = [
        (
            name,
            f"{one.texts / median(one.offline_samples_s):,.0f}",
            f"{one.texts / median(one.callers_samples_s):,.0f}",
            percent(one.share),
            str(len(one.callers_samples_s)),
        )
        for name, one in found
    ]
    first = found[0][1]
    head = ("engine, precision", "offline texts/s", f"{first.callers} callers, texts/s", "of offline", "rounds")
    text = (
        f"{first.callers} asyncio callers of single texts through `AsyncEncoder`, in turns with one `encode` call of "
        f"the same {first.texts:,} texts. Below, the same callers meet a queue that {first.queue.max_waiting} texts "
        "fill, in waves; times are from when a call was due."
    )
    queue_head = (
        "engine, precision", "calls", "refused", "p50 ms until refused", "max ms", "accepted", "answered", "min cosine",
    )  # fmt: skip
    return Table(head, rates), text, Table(queue_head, [_queue(name, one) for name, one in found]), _QUEUE_NOTE


_QUEUE_NOTE = "Min cosine here is the worst answer's similarity to the same artifact's vector of the same text offline."


def _queue(name: str, one: CallersResult) -> Sequence[str]:
    queue = one.queue
    return (
        name,
        str(queue.sent),
        str(queue.refused),
        NONE if queue.refused_p50_ms is None else f"{queue.refused_p50_ms:.2f}",
        NONE if queue.refused_max_ms is None else f"{queue.refused_max_ms:.2f}",
        str(queue.accepted),
        str(queue.answered) + ("" if queue.answered == queue.accepted else " **: some were lost**"),
        cosine_text(queue.min_cosine),
    )
