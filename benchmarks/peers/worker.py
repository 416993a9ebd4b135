"""Our end of a peer's line-JSON protocol: one request, one answer, in a process of the peer's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mirror_runtime.errors import PeerError

GRACE_S = 5.0


def peer_environment() -> Mapping[str, str]:
    """Give the environment variables of a peer's process: ours, but no hub is asked for anything."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class PeerWorker:
    """A running peer. Use it in a `with` block: the process ends with it.

    Args:
        command: what to start; it speaks the protocol described in the peer's script.
        log: file for its standard error.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                encoding="utf-8",
                env=dict(peer_environment()),
                start_new_session=True,  # Ctrl-C is ours to handle: the worker ends when its input does
            )

    def ask(self, op: str, **arguments: object) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            PeerError: the peer answered with an error, or ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # PIPE
        assert stdout is not None  # PIPE
        try:
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise PeerError(f"{op}: the peer ended with status {status}: {self._last_words()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeerError(f"{op}: the peer answered {line[:200]!r}, which is not JSON") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise PeerError(f"{op}: {answer['error'] if isinstance(answer, dict) else repr(answer)}")
        return answer

    def close(self) -> None:
        """End the process: first by ending its input, then by force."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None  # PIPE
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it is gone already
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> PeerWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
