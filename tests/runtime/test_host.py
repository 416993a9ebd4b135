"""Cores are what this process may use, not what the machine has."""

import os
from pathlib import Path

import pytest

from mirror_runtime.host import cpu_quota_cores, memory_limit_bytes, peak_memory_bytes
from mirror_runtime.triton.server.processes import resident_bytes
from tests.runtime.isolated import start


@pytest.fixture
def groups(tmp_path):
    """Write control groups' files by relative path, and return their mount and the file of this process's groups."""

    def write(membership: str, **files: str) -> tuple[Path, Path]:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        (tmp_path / "membership").write_text(membership)
        return tmp_path / "cgroup", tmp_path / "membership"

    return write


SERVICE = "0::/a.slice/b.service\n"
CONTAINER = "5:cpuset:/x\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"
V2 = {
    **{"a.slice/b.service/cpu.max": "max 100000", "a.slice/cpu.max": "150000 100000"},
    **{"a.slice/b.service/memory.max": "4294967296", "a.slice/memory.max": "max"},
    "other.slice/cpu.max": "10000 100000",
}
V1 = {
    **{"cpu/docker/abc/cpu.cfs_quota_us": "300000", "cpu/docker/abc/cpu.cfs_period_us": "100000"},
    **{"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
    "memory/docker/abc/memory.limit_in_bytes": "2147483648",
    "memory/memory.limit_in_bytes": "9223372036854771712",
}


@pytest.mark.parametrize(
    ("membership", "files", "cores", "memory"),
    [
        (SERVICE, {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (SERVICE, V2, 1.5, 2**32),
        (SERVICE, {"a.slice/b.service/cpu.max": "50000 100000", "a.slice/cpu.max": "150000 100000"}, 0.5, None),
        (CONTAINER, V1, 3.0, 2**31),
        (CONTAINER, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
    ],
    ids=["unlimited", "v2: the parent's", "v2: its own", "v1", "v1 unlimited"],
)
def test_the_tightest_limit_of_a_group_and_its_parents_counts(groups, membership, files, cores, memory):
    place = groups(membership, **files)
    assert cpu_quota_cores(*place) == cores
    assert memory_limit_bytes(*place) == memory


def test_no_control_groups_are_no_limits_and_memory_of_a_process_is_read_while_it_lives(tmp_path):
    assert cpu_quota_cores(tmp_path, tmp_path / "absent") is None
    assert memory_limit_bytes(tmp_path, tmp_path / "absent") is None
    assert 2**20 < resident_bytes([os.getpid()]) <= peak_memory_bytes() * 1.1
    assert resident_bytes([2**22 + 1]) == 0  # beyond the largest process id


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_with_one_core_streams_and_threads_follow(tiny_bundle):
    process = start("run_on_one_core", tiny_bundle)
    process.communicate()
    assert process.returncode == 0
