"""Pytest hooks with the rules for all tests.

- A test that costs more than `LIMIT_S` seconds (setup and call) fails unless it is marked `slow`. Its cost is the
  smaller of wall-clock and CPU time, without session fixtures and cached folders (see `tests.support.stopwatch`):
  neither a busy machine nor the order of the tests changes the result.
- Files run in an order that suits parallel workers.
- `--fast` skips the tests that are marked, by hand or by a fixture of theirs, as tracing a graph, tuning an encoder,
  starting a server or a process. A test that traces or starts a process without the mark fails under `--fast`.
"""

from __future__ import annotations

import gc
import platform
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support import stopwatch

LIMIT_S = 10.0

NOT_FAST = ("slow", "serving", "parity", "gpu", "trace", "process", "tunes")
"""Marks of the tests that `--fast` skips; `--tunes` adds the last of them."""

FIXTURES = {"trace": ("minilm_bundle", "tiny_bundle"), "serving": ("server",)}
"""Marks that a test gets from the fixtures it uses."""

PROCESS_EVENTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")
"""Audit events of a process that starts."""

_start = pytest.StashKey[stopwatch.Spent]()
_spent = pytest.StashKey[stopwatch.Spent]()
_watching = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip tests that trace a graph, start a server or a process")
    parser.addoption("--tunes", action="store_true", help="with --fast, run also the tests that tune an encoder")
    parser.addoption("--broken-files", type=int, default=12, help="broken files to feed each reader of files")
    parser.addoption("--fail-skipped", action="store_true", help="a skipped test fails: the machine has all it needs")
    parser.addoption("--two-models-seconds", type=float, default=2, help="of load on one model that calls another")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until everything is imported: the search for reference cycles takes a fifth of that time
    if config.getoption("--fast"):
        platform.platform()  # starts `uname` the first time, in whichever test that would be
        sys.addaudithook(_refuse_processes)


def _left_out(config: pytest.Config) -> tuple[str, ...]:
    """Return the marks of the tests that do not run."""
    return () if not config.getoption("--fast") else NOT_FAST[:-1] if config.getoption("--tunes") else NOT_FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `--fast`, do not import a file all of whose tests are marked: its libraries take seconds to load."""
    left_out = _left_out(config)
    if not left_out or not collection_path.is_file():
        return None
    marks = re.findall(r"^pytestmark = (.*)", collection_path.read_text(encoding="utf-8"), re.MULTILINE)
    return True if set(re.findall(r"mark\.(\w+)", "".join(marks))) & set(left_out) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        for mark, fixtures in FIXTURES.items():
            if used.intersection(fixtures):
                item.add_marker(mark)
    _order_files(items)
    if left_out := _left_out(config):
        slow = [item for item in items if any(map(item.get_closest_marker, left_out))]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    if fixturedef.scope == "session":
        with stopwatch.shared_work():
            return (yield)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_start] = stopwatch.now()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    global _watching
    _watching = item.config.getoption("--fast")
    try:
        with pytest.MonkeyPatch.context() as patch:
            if _watching and "export.graph.trace" in sys.modules:
                patch.setattr("export.graph.trace._trace", _refuse_traces)
            return (yield)
    finally:
        _watching = False
        item.stash[_spent] = stopwatch.now() - item.stash[_start]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--fail-skipped"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped: {report.longreprtext}"
    if call.when == "call" and report.passed and item.get_closest_marker("slow") is None:
        wall_s, cpu_s = item.stash[_spent]
        if min(wall_s, cpu_s) > LIMIT_S:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {wall_s:.1f} s ({cpu_s:.1f} s of CPU time), over the limit of "
                f"{LIMIT_S:.0f} s: make it faster, or mark it `slow` with the reason"
            )
    return report


def _order_files(items: list[pytest.Item]) -> None:
    """Put the files that take long first, so that no worker of a parallel run starts one of them last.

    One file that uses the bundle of MiniLM leads, to start its export, and the others follow later, when it is done.
    """
    exporting = [item.path for item in items if "minilm_bundle" in getattr(item, "fixturenames", ())]
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("serving")}

    def turn(item: pytest.Item) -> int:
        if item.path in exporting:
            return 0 if item.path == exporting[0] else 2
        return 1 if item.path in slow else 3

    items.sort(key=turn)


def _refuse_processes(event: str, args: tuple[Any, ...]) -> None:
    is_git = event == "subprocess.Popen" and args[0] == "git"  # reports name the commit; takes milliseconds
    if _watching and event in PROCESS_EVENTS and not is_git and not stopwatch.in_shared_work():
        raise AssertionError(f"this test starts a process ({event} {args[:2]}): mark it `process`")


def _refuse_traces(*_args: object) -> None:
    raise AssertionError("this test traces a graph: mark it `trace`")
