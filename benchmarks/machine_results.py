"""What a report holds of the machine: what it is, what was set on it, and what it could give at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mirror_runtime.bundle import EngineName, Precision


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine, and what this process may use of it.

    Attributes:
        cores_online: logical cores of the machine.
        cores_usable: what affinity and the container's quota leave to this process.
        affinity: the logical cores that this process may run on, by number; empty where the system does not say.
        cpu_quota_cores: the tightest CPU quota of the process's control groups, in cores; None without any.
        memory_limit_bytes: the tightest memory limit of the process's control groups; None without any.
        cpu_flags: the CPU's features that decide the speed of matrix products.
        clocks_mhz: of each logical core before the first measurement; empty where the system does not say.
        governor: what the system sets clocks by; None where it does not say, as in most virtual machines.
        thread_environment: variables of the environment that change how many threads libraries start, as they are set.
        load_1min_start: the system's load average before the first measurement; above ~0.5 others were at work.
    """

    cpu_model: str
    cores_online: int
    cores_usable: int
    affinity: tuple[int, ...]
    cpu_quota_cores: float | None
    memory_limit_bytes: int | None
    cpu_flags: tuple[str, ...]
    clocks_mhz: tuple[float, ...]
    governor: str | None
    thread_environment: Mapping[str, str]
    memory_bytes: int
    os: str
    python: str
    load_1min_start: float


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The rate of bare matrix products in one engine at one precision on all usable cores.

    Attributes:
        rows, inner, outer: the product [rows, inner] x [inner, outer], chained with its transpose.
        flop_per_sample: operations in one sample.
        samples_s: seconds, one per repetition.
        gflop_per_s: of the fastest sample, for a ceiling must not sink because others were at work. In int8 a
            multiplication and an addition count as two operations, too.
    """

    engine: EngineName
    precision: Precision
    threads: int
    rows: int
    inner: int
    outer: int
    flop_per_sample: int
    samples_s: tuple[float, ...]
    gflop_per_s: float


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """How fast all usable cores together read and copy memory that no cache holds.

    Attributes:
        array_bytes: of the array that is read, and of each of the two that are copied from and to.
        cache_bytes: of the last cache that the first core shares; 0 where the system does not say.
        read_samples_s, copy_samples_s: seconds, one per repetition.
        read_gb_per_s: of the fastest sample.
        copy_gb_per_s: likewise; a byte that is copied counts twice, once read and once written.
    """

    threads: int
    array_bytes: int
    cache_bytes: int
    read_samples_s: tuple[float, ...]
    copy_samples_s: tuple[float, ...]
    read_gb_per_s: float
    copy_gb_per_s: float
