"""What the control groups of this process's container allow, under cgroup v2 or v1. Reads Linux's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as the largest multiple of a page that it can hold."""


def cpu_quota_cores(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """Give the tightest CPU quota of this process's groups and of those above them, in cores; None without any."""
    return _tightest(mount, membership, "cpu", _quota)


def memory_limit_bytes(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Give the tightest memory limit of this process's groups and of those above them; None without any."""
    limit = _tightest(mount, membership, "memory", _limit)
    return None if limit is None else int(limit)


def _tightest(mount: Path, membership: Path, controller: str, read: Callable[[Path], float | None]) -> float | None:
    """Ask every group that bounds this process; a line of its membership is `number:controllers:path`."""
    folders = {mount, mount / controller}  # what a container sees as its root
    lines = membership.read_text(encoding="ascii").splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controller if controllers else mount
        group = root / path.strip("/")
        folders |= {group, *(parent for parent in group.parents if parent.is_relative_to(root))}
    return min((found for folder in folders if (found := read(folder)) is not None), default=None)


def _quota(group: Path) -> float | None:
    quota, _, period = _words(group / "cpu.max").partition(" ")
    quota, period = quota or _words(group / "cpu.cfs_quota_us"), period or _words(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _limit(group: Path) -> float | None:
    limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
    return int(limit) if limit.isdecimal() and int(limit) < UNLIMITED else None


def _words(file: Path) -> str:
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""
