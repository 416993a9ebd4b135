"""Process groups, read from /proc on Linux."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def group_members(leader: int) -> list[int]:
    """Return the living processes of a process group."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields and int(fields[2]) == leader and fields[0] not in ("Z", "X"):
            members.append(int(folder.name))
    return members


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X")


def stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process; a debugger that holds it does not count."""
    return _stat(pid)[:1] == ["T"]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the total CPU time of processes; ended ones count as zero."""
    return sum((int(fields[11]) + int(fields[12])) / _TICKS for fields in map(_stat, pids) if fields)


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the total resident memory of processes; shared pages count for each, ended processes as zero."""
    return sum(int(fields[21]) * _PAGE for fields in map(_stat, pids) if fields)


def runners(server: int, model: str) -> list[int]:
    """Return the processes in which a tritonserver runs a model; their command lines contain the model's path."""
    return [pid for pid in group_members(server) if pid != server and f"/{model}/" in _command_line(pid)]


def tritons(token: str) -> list[int]:
    """Return the living processes of Triton whose command line contains a text."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    commands = {pid: _command_line(pid) for pid in pids}
    return [
        pid
        for pid, command in commands.items()
        if token in command and Path(command.partition("\0")[0]).name.startswith("triton") and alive(pid)
    ]


def kill_group(leader: int) -> None:
    """Kill the remaining processes of a group and wait until they have ended."""
    kill_all(lambda: group_members(leader))


def kill_all(members: Callable[[], Iterable[int]]) -> None:
    """Kill processes until there are none."""
    while pids := list(members()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Read the fields after a process's name in its stat file: state, parent, group, …; empty if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before ")" may contain anything
