"""Cores are what this process may use, not what the machine has."""

import os
import subprocess
import sys

import pytest

from mirror_runtime.host import _cgroup_quota


def test_no_quota_is_no_limit(tmp_path):
    assert _cgroup_quota(tmp_path, tmp_path / "absent") is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cgroup_quota(tmp_path, tmp_path / "absent") is None


def test_the_tightest_group_above_the_process_counts(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/a.slice/b.scope\n")
    own = tmp_path / "a.slice" / "b.scope"
    own.mkdir(parents=True)
    (own / "cpu.max").write_text("max 100000\n")
    (own.parent / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "other.slice").mkdir()
    (tmp_path / "other.slice" / "cpu.max").write_text("10000 100000\n")
    assert _cgroup_quota(tmp_path, membership) == 1.5
    (own / "cpu.max").write_text("50000 100000\n")
    assert _cgroup_quota(tmp_path, membership) == 0.5


def test_version_1_is_read_too(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("3:cpuset:/x\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    own = tmp_path / "cpu" / "docker" / "abc"
    own.mkdir(parents=True)
    (own / "cpu.cfs_quota_us").write_text("300000\n")
    (own / "cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_quota(tmp_path, membership) == 3.0
    (own / "cpu.cfs_quota_us").write_text("-1\n")
    assert _cgroup_quota(tmp_path, membership) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_with_one_core_streams_and_threads_follow(tiny_bundle):
    code = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
import numpy as np
from mirror_runtime import Encoder
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import PackedRows

def ticks():
    lines = {{t: open(f"/proc/self/task/{{t}}/stat").read() for t in os.listdir("/proc/self/task")}}
    return {{t: sum(map(int, line.rsplit(")", 1)[1].split()[11:13])) for t, line in lines.items()}}

assert usable_cores() == 1
for engine in ("openvino", "onnxruntime"):
    with Encoder.load({str(tiny_bundle)!r}, engine=engine, precision="fp32") as encoder:
        assert encoder.engine.streams == 1
        empty = np.zeros((3, 16, 64), np.int64)
        rows = PackedRows(input_ids=empty[0], position_ids=empty[1], segment_ids=empty[2])
        encoder.engine.run(rows)
        before = ticks()
        while sum(ticks().values()) - sum(before.values()) < 50:
            for _ in range(50):
                encoder.engine.run(rows)
        spent = {{t: n - before.get(t, 0) for t, n in ticks().items()}}
        busy = [n for n in spent.values() if n > 0.2 * sum(spent.values())]
        assert len(busy) == 1, (engine, spent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
