"""This machine: usable cores, CPU features, memory, and what its control groups allow. Reads Linux's files.

Nothing is read at import.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU features that multiply bfloat16 in hardware."""


_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

_UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as the largest multiple of a page that it can hold."""


def usable_cores() -> int:
    """Count the cores that this process may use: its affinity mask, cut by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota_cores(mount: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Read the tightest CPU quota of this process's control groups (v2 or v1) and of their parents; None without one.

    `membership` is the file that lists the groups, one a line, as `number:controllers:path`.
    """
    return _tightest(mount, membership, "cpu", _quota)


def memory_limit_bytes(mount: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Read the tightest memory limit, likewise; None where there is none."""
    limit = _tightest(mount, membership, "memory", _limit)
    return None if limit is None else int(limit)


def _tightest(mount: Path, membership: Path, controller: str, read: Callable[[Path], float | None]) -> float | None:
    """Read every group that bounds this process, and return the least of what they allow."""
    folders = {mount, mount / controller}  # what a container sees as its root
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controller if controllers else mount
        group = root / path.strip("/")
        folders |= {group, *(parent for parent in group.parents if parent.is_relative_to(root))}
    return min((found for folder in folders if (found := read(folder)) is not None), default=None)


def _quota(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    quota, period = quota or _read(group / "cpu.cfs_quota_us"), period or _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _limit(group: Path) -> float | None:
    limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
    return int(limit) if limit.isdecimal() and int(limit) < _UNLIMITED else None


def _read(path: Path) -> str:
    """Read a file of the system; empty where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's features as /proc/cpuinfo spells them; empty where there is no such file."""
    return frozenset(_cpuinfo("flags").split())


@cache
def cpu_model() -> str:
    """Return the CPU's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(BF16_FLAGS & cpu_flags())


def memory_bytes() -> int:
    """Return the physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held at once, in bytes, without its children."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo(key: str) -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
