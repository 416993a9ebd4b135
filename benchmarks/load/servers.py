"""The servers that are put under load: Triton with its own statistics, and `mirror gateway` as its users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.plan import Variant
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.triton.server.server import Server, launcher

T = TypeVar("T")

Row = tuple[str, str, Sequence[float]]
"""Metric, unit and samples."""

Statistics = Callable[[], Sequence[Row]]

STARTUP_S = 180.0
STOP_S = 10.0

SETTLE_S = 0.1
"""Triton counts a request a moment after it has answered it."""

_HOST = "127.0.0.1"
_POLL_S = 0.05
_LOG_LINES = 5
_ADDRESS = re.compile(rf"^TEI\s+http://({re.escape(_HOST)}:\d+)/embed$", re.MULTILINE)


def triton_statistics(server: Server) -> Statistics:
    """Return a function that reads Triton's own statistics of the requests since its last call.

    They are the mean time that a request waited and was in the model, and the mean number of texts that shared an
    execution; nothing if no request was answered.

    Raises:
        ServerError: the counters cannot be read.
    """

    def counters() -> Counter[str]:
        time.sleep(SETTLE_S)
        stats = _read_json(f"http://{_HOST}:{server.http_port}/v2/models/{MODEL_NAME}/stats")["model_stats"][0]
        times = stats["inference_stats"]
        return Counter(
            texts=stats["inference_count"],
            executions=stats["execution_count"],
            requests=times["success"]["count"],
            queue_ns=times["queue"]["ns"],
            compute_ns=sum(times[part]["ns"] for part in ("compute_input", "compute_infer", "compute_output")),
        )

    before = counters()

    def take() -> list[Row]:
        nonlocal before
        now = counters()
        gained, before = now - before, now
        if not gained["requests"] or not gained["executions"]:
            return []
        return [
            ("queue time", "ms", [gained["queue_ns"] / gained["requests"] / 1e6]),
            ("compute time", "ms", [gained["compute_ns"] / gained["requests"] / 1e6]),
            ("texts per execution", "", [gained["texts"] / gained["executions"]]),
        ]

    return take


@contextmanager
def mirror_process(
    *arguments: str, ready: Callable[[str], T | None]
) -> Iterator[tuple[subprocess.Popen[bytes], Path, T]]:
    """Run a `mirror` command that serves, and stop it on exit.

    Call it in the main thread: the process is ended when the thread that started it ends.

    Args:
        arguments: of `mirror`.
        ready: receives what it has printed so far; returns None until it serves.

    Yields:
        The process, a folder with its standard error in `log` and its temporary files in `tmp`, and `ready`'s result.

    Raises:
        ServerError: it ended or was not ready in time; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        temporary, output, log = (Path(folder) / name for name in ("tmp", "output", "log"))
        temporary.mkdir()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}
        environment.pop(KEY_VARIABLE, None)  # our callers have no API key
        with output.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                [*launcher(), sys.executable, "-m", "mirror_runtime.cli", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the process in order
            )
        try:
            deadline, found = time.monotonic() + STARTUP_S, None
            while found is None:
                time.sleep(_POLL_S)
                status = process.poll()
                printed = "".join(path.read_text(encoding="utf-8", errors="replace") for path in (output, log))
                if status is not None or time.monotonic() > deadline:
                    problem = "was not ready in time" if status is None else f"did not start (status {status})"
                    end = "\n".join(printed.splitlines()[-_LOG_LINES:])
                    raise ServerError(f"mirror {arguments[0]} {problem}; its log ends:\n{end}")
                found = ready(printed)
            yield process, Path(folder), found
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def running_gateway(bundle: Path, variant: Variant) -> Iterator[str]:
    """Start a gateway on a free port, and yield its host and port once an inference succeeds; see `mirror_process`."""

    def healthy(printed: str) -> str | None:
        address = _ADDRESS.search(printed)
        with suppress(ServerError):
            if address and _read_json(f"http://{address[1]}/health") is not None:
                return address[1]
        return None

    options = ["--engine", variant.engine.value, "--precision", variant.precision.value, "--port", "0"]
    options += ["--drain", "0"]  # without a load balancer nothing must notice the end first
    with mirror_process("gateway", str(bundle), *options, ready=healthy) as (_, _, address):
        yield address


def _read_json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} cannot be read: {error}") from error
