"""A child process that answers line-JSON requests one at a time: another library, or the load generator."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mirror_runtime.errors import PeerError

EXIT_S = 5.0
"""Time for a worker to end after its input is closed; then it is killed."""


def offline_environment() -> dict[str, str]:
    """Return this process's environment variables with all access to model hubs switched off."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class WorkerProcess:
    """A running worker. Use it in a `with` block: the process ends with the block.

    A request is one line `{"op": NAME, ARGUMENT: VALUE, …}` on the worker's standard input; the answer is one line of
    JSON on its standard output, `{"error": "…"}` after a failure.

    Args:
        command: starts the worker.
        log: file that receives its standard error.
        environment: variables on top of `offline_environment`.
        folder: its working directory; None for this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._log = log
        self._pending = 0
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                encoding="utf-8",
                env={**offline_environment(), **(environment or {})},
                cwd=folder,
                start_new_session=True,  # Ctrl-C is handled here: the worker ends when its input does
            )

    def ask(self, op: str, timeout_s: float | None = None, **arguments: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            op: name of the operation.
            timeout_s: the worker is killed when its answer takes longer; None waits forever.
            **arguments: of the operation.

        Raises:
            PeerError: the worker answered with an error, ended, or took too long.
        """
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = None if timeout_s is None else threading.Timer(timeout_s, kill)
        if timer is not None:
            timer.start()
        try:
            line = self._exchange(json.dumps({"op": op, **arguments}))
        finally:
            if timer is not None:
                timer.cancel()
        if late.is_set():
            raise PeerError(f"{op}: no answer after {timeout_s:.0f} seconds")
        if not line:
            log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["its log is empty"]
            raise PeerError(f"{op}: the worker ended with status {self._process.wait()}: {log[-1]}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeerError(f"{op}: the answer is not JSON: {line[:200]!r}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise PeerError(f"{op}: {answer['error'] if isinstance(answer, dict) else repr(answer)}")
        return answer

    def close(self) -> None:
        """End the process: close its input, then kill it if it does not end."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None  # PIPE
            with suppress(BrokenPipeError):  # it has ended already
                stream.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, request: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # PIPE
        assert stdout is not None  # PIPE
        try:
            stdin.write(request + "\n")
            stdin.flush()
            self._pending += 1
            line = ""
            while self._pending:  # Ctrl-C may have left the answer to an earlier request unread
                line = stdout.readline()
                self._pending -= 1
        except BrokenPipeError:
            return ""
        return line
