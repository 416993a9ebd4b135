"""The machine's conditions: clocks, the container's limits, variables that change threads."""

import os

import pytest

from benchmarks.host import clocks_mhz, describe_host, governor
from benchmarks.limits import cpu_quota_cores, memory_limit_bytes


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{text}\n")


@pytest.fixture
def groups(tmp_path):
    """Control groups of version 2: a service in a slice, which has the tighter quota."""
    mount, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(mount / "a.slice" / "b.service", cpu_dot_max="max 100000", memory_dot_max="4294967296")
    write(mount / "a.slice", cpu_dot_max="150000 100000", memory_dot_max="max")
    membership.write_text("0::/a.slice/b.service\n")
    return mount, membership


def test_the_tightest_limit_of_all_groups_above_counts(groups):
    assert cpu_quota_cores(*groups) == 1.5
    assert memory_limit_bytes(*groups) == 2**32


def test_limits_of_version_1_are_read_from_their_own_mounts(tmp_path):
    mount, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(mount / "cpu" / "job", cpu_dot_cfs_quota_us="50000", cpu_dot_cfs_period_us="100000")
    write(mount / "cpu", cpu_dot_cfs_quota_us="-1", cpu_dot_cfs_period_us="100000")
    write(mount / "memory" / "job", memory_dot_limit_in_bytes=str(2**31))
    write(mount / "memory", memory_dot_limit_in_bytes="9223372036854771712")
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/\n")
    assert cpu_quota_cores(mount, membership) == 0.5
    assert memory_limit_bytes(mount, membership) == 2**31
    membership.write_text("4:memory:/\n3:cpu,cpuacct:/\n")
    assert cpu_quota_cores(mount, membership) is None
    assert memory_limit_bytes(mount, membership) is None


def test_no_control_groups_are_no_limits(tmp_path):
    assert cpu_quota_cores(tmp_path / "none", tmp_path / "none") is None
    assert memory_limit_bytes(tmp_path / "none", tmp_path / "none") is None


def test_clocks_and_governor_are_the_systems_own(tmp_path):
    cpuinfo, scaling = tmp_path / "cpuinfo", tmp_path / "governor"
    cpuinfo.write_text("processor\t: 0\ncpu MHz\t\t: 2600.5\n\nprocessor\t: 1\ncpu MHz\t\t: 3100.0\n")
    scaling.write_text("performance\n")
    assert clocks_mhz(cpuinfo) == (2600.5, 3100.0)
    assert governor(scaling) == "performance"
    assert clocks_mhz(tmp_path / "none") == ()
    assert governor(tmp_path / "none") is None


def test_variables_that_change_threads_are_recorded_and_no_others(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2", "A_SECRET": "x"})
    host = describe_host()
    assert host.thread_environment == {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2"}
    assert set(host.affinity) == os.sched_getaffinity(0)
