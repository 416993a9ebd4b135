"""What this machine offers: usable cores, CPU features, memory. Reads Linux's files; asks nothing at import."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from functools import cache
from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU features that multiply bfloat16 in hardware."""


def usable_cores() -> int:
    """Count the cores this process may use: its affinity mask, cut by the container's CPU quota (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_quota(mount: Path, membership: Path) -> float | None:
    """Read the tightest CPU quota, in cores, of this process's control group and those above it; None without any.

    Args:
        mount: where the control groups are mounted.
        membership: the file that names this process's groups, one a line, as `number:controllers:path`.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    folders = {mount, mount / "cpu"}  # what a container sees as its root
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        group = root / path.strip("/")
        folders |= {group, *(parent for parent in group.parents if parent.is_relative_to(root))}
    return min((quota for folder in folders if (quota := _quota(folder)) is not None), default=None)


def _quota(group: Path) -> float | None:
    """Read one group's quota in cores, or None where it has none."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


@cache
def cpu_flags() -> frozenset[str]:
    """Name the CPU's features as /proc/cpuinfo spells them; empty where there is no such file."""
    return frozenset(_cpuinfo("flags").split())


@cache
def cpu_model() -> str:
    """Name the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def has_bf16() -> bool:
    """Tell whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(BF16_FLAGS & cpu_flags())


def memory_bytes() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once, in bytes, children left out."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
