"""The log states a thing a few times, and then how often it was repeated."""

import logging
from types import SimpleNamespace

from mirror_runtime.repeats import BURST, WINDOW_S, RepeatFilter


def test_another_error_is_another_thing_and_the_last_ones_are_counted(caplog):
    repeats = RepeatFilter()
    caplog.handler.addFilter(repeats)
    log = logging.getLogger("some.library")
    try:
        for i in range(BURST + 2):
            log.error("request failed: %s", ValueError(i))
        log.error("request failed: %s", KeyError("other"))
        log.error("request failed: %s", "with", exc_info=OSError("traceback"))
        repeats.summarize(now=True)
    finally:
        caplog.handler.removeFilter(repeats)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[BURST:] == [
        "request failed: 'other'",
        "request failed: with",
        "2 more of some.library: request failed: %s (ValueError)",
    ]


def test_repeats_are_counted_and_other_records_pass(caplog):
    clock = SimpleNamespace(now=0.0)
    repeats = RepeatFilter(lambda: clock.now)
    caplog.handler.addFilter(repeats)
    log = logging.getLogger("some.library")
    try:
        for i in range(1000):
            log.error("request %d failed", i)
            repeats.summarize()
        log.error("something else")
        clock.now += WINDOW_S
        repeats.summarize()
        log.error("request %d failed", 1000)
    finally:
        caplog.handler.removeFilter(repeats)
    lines = [record.getMessage() for record in caplog.records]
    first = [f"request {i} failed" for i in range(BURST)]
    summary = f"{1000 - BURST} more of some.library: request %d failed"
    assert lines == [*first, "something else", summary, "request 1000 failed"]
