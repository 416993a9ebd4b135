"""Child processes: one answers line-JSON requests (another library, the load generator), one runs to its end."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mirror_runtime.errors import PeerError

EXIT_S = 5.0
"""Time for a worker to end after its input is closed; then it is killed."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class WorkerProcess:
    """A running worker, without access to model hubs. Use it in a `with` block: the process ends with the block.

    A request is one line `{"op": NAME, ARGUMENT: VALUE, …}` on the worker's standard input; the answer is one line of
    JSON on its standard output, `{"error": "…"}` after a failure.

    The file `log` receives its standard error; `environment` is on top of this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] = _OFFLINE, folder: Path | None = None
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
                env={**os.environ, **_OFFLINE, **environment},
                cwd=folder,
                start_new_session=True,  # Ctrl-C is handled here: the worker ends when its input does
            )
        assert self._process.stdin is not None  # PIPE
        assert self._process.stdout is not None  # PIPE
        self._input, self._output = self._process.stdin, self._process.stdout

    def ask(self, op: str, timeout_s: float | None = None, **arguments: object) -> dict[str, Any]:
        """Send a request and wait for its answer; a worker whose answer takes longer than `timeout_s` is killed.

        Raises:
            PeerError: the worker answered with an error, ended, or took too long.
        """
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(threading.TIMEOUT_MAX if timeout_s is None else timeout_s, kill)
        timer.daemon = True
        timer.start()
        line = ""
        try:
            self._input.write(json.dumps({"op": op, **arguments}) + "\n")
            self._input.flush()
            self._pending += 1
            while self._pending:  # Ctrl-C may have left the answer to an earlier request unread
                line = self._output.readline()
                self._pending -= 1
        except BrokenPipeError:  # it has ended
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise PeerError(f"{op}: no answer after {timeout_s:.0f} seconds")
        if not line:
            log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["its log is empty"]
            raise PeerError(f"{op}: the worker ended with status {self._process.wait()}: {log[-1]}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeerError(f"{op}: the answer is not JSON: {line[:200]!r}") from error
        if "error" in answer:
            raise PeerError(f"{op}: {answer['error']}")
        return answer

    def peak_bytes(self) -> int:
        """Return the process's peak resident memory, 0 once it has ended. getrusage's includes that of its parent."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the worker's input, and kill it if it does not end."""
        for stream in (self._input, self._output):
            with suppress(BrokenPipeError):  # it has ended already
                stream.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run_to_end(command: Sequence[str], name: str) -> None:
    """Run a command in an empty folder.

    Raises:
        PeerError: it failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=neutral, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PeerError(f"{name} ended with status {done.returncode}: {last[0]}")
