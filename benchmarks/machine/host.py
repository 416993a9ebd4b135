"""What was measured on and with: the machine, library versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from benchmarks.report.facts import Facts, Host, Settings, Source, Subject
from benchmarks.workload import WorkloadFacts
from mirror_runtime.host import cpu_flags, cpu_model, cpu_quota_cores, memory_bytes, memory_limit_bytes, usable_cores

ROOT = Path(__file__).resolve().parents[2]

SPEED_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""CPU features that decide how fast matrix products run in fp32, bf16, fp16 and int8."""

THREAD_PREFIXES = ("OMP_", "OPENBLAS_", "MKL_", "GOMP_", "KMP_", "BLIS_")
THREAD_VARIABLES = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Environment variables by which libraries decide how many threads they start, and how these wait."""

MEASURED_WITH = ("mirror-runtime", "numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")


def describe_run(
    subject: Subject, workload: WorkloadFacts, settings: Settings, versions: Mapping[str, str] | None = None
) -> Facts:
    """Return the facts of a run that begins now."""
    return Facts(
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"), partial=True, resumed=(), wall_s=0.0,
        host=describe_host(), versions=versions or installed_versions(), source=describe_source(ROOT), subject=subject,
        workload=workload, settings=settings,
    )  # fmt: skip


def describe_host() -> Host:
    """Describe this machine as this process sees it."""
    flags = cpu_flags()
    return Host(
        cpu_model=cpu_model(), cores_online=os.cpu_count() or 1, cores_usable=usable_cores(),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        cpu_quota_cores=cpu_quota_cores(), memory_limit_bytes=memory_limit_bytes(),
        cpu_flags=tuple(flag for flag in SPEED_FLAGS if flag in flags), clocks_mhz=clocks_mhz(), governor=governor(),
        thread_environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(THREAD_PREFIXES) or name in THREAD_VARIABLES
        },
        memory_bytes=memory_bytes(), os=platform.platform(), python=platform.python_version(),
        load_1min_start=os.getloadavg()[0],
    )  # fmt: skip


def clocks_mhz(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[float, ...]:
    """Return the current clock of each logical core; empty where the system does not state them."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return tuple(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))


def governor(file: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) -> str | None:
    """Return the first core's frequency governor; None where the system does not state it."""
    return file.read_text(encoding="ascii").strip() if file.is_file() else None


def installed_versions(packages: Sequence[str] = MEASURED_WITH) -> dict[str, str]:
    """Return the versions of the packages that are installed here."""
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def describe_source(root: Path) -> Source:
    """Return the commit of a clone and whether files differ from it; both None without git or a clone."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", "-C", root, *arguments], stderr=subprocess.DEVNULL, text=True, timeout=30
        ).strip()

    try:
        return Source(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return Source(commit=None, dirty=None)
