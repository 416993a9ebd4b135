"""Process groups, read from Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def group_members(leader: int) -> list[int]:
    """List the living processes of a process group."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        state, _parent, group = text.rpartition(")")[2].split()[:3]  # the name before ")" may hold anything
        if int(group) == leader and state not in ("Z", "X"):
            members.append(int(status.parent.name))
    return members


def kill_group(leader: int) -> None:
    """Kill what is left of a process group and wait until it is gone."""
    while members := group_members(leader):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
