"""Process groups, read from Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def group_members(leader: int) -> list[int]:
    """List the living processes of a process group."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields and int(fields[2]) == leader and fields[0] not in ("Z", "X"):
            members.append(int(folder.name))
    return members


def alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Add up the processor time that processes have used; those that are gone count as zero."""
    return sum((int(fields[11]) + int(fields[12])) / _TICKS for fields in map(_stat, pids) if fields)


def resident_bytes(pids: Iterable[int]) -> int:
    """Add up the memory that processes have resident, what they share counted in each; those gone count as zero."""
    return sum(int(fields[21]) * _PAGE for fields in map(_stat, pids) if fields)


def runners(server: int, model: str) -> list[int]:
    """List the processes that run a model for a tritonserver, which starts them with the path of the model's file."""
    return [pid for pid in group_members(server) if pid != server and f"/{model}/" in _command_line(pid)]


def kill_group(leader: int) -> None:
    """Kill what is left of a process group and wait until it is gone."""
    while members := group_members(leader):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Read what follows a process's name in its status: state, parent, group, …; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before ")" may hold anything
