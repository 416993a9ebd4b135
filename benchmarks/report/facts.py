"""What a report states beside its measurements: the machine, the code, the bundle, the texts and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.workload import WorkloadFacts


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine, and what this process may use of it. Empty or None: the system sets or states nothing.

    Cores are logical ones; those usable are what affinity and the quota leave. Quota and limit are the tightest of the
    process's control groups. Clocks and load are from before the first measurement: a load above ~0.5 is other work.
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
class Source:
    """The code that was measured; both None outside a git clone."""

    commit: str | None
    dirty: bool | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The bundle that was measured, with all its packed artifacts.

    The operations of a token are those of its matrix products, without attention; None where sizes are not stated.
    """

    name: str
    fingerprint: str
    base_model: str
    max_tokens: int
    dim: int
    artifacts: tuple[str, ...]
    flop_per_token: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the run: `variants` are the parties that are ours, `peers` the titles of other libraries."""

    suites: tuple[str, ...]
    variants: tuple[str, ...]
    peers: tuple[str, ...]
    sets_sha256: tuple[str, ...]
    training: str | None
    quick: bool
    rounds: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything in a report that is not a measurement.

    A partial run was interrupted; `resumed` are the moments when it was continued, and `wall_s` is of all together.
    """

    started: str
    partial: bool
    resumed: tuple[str, ...]
    wall_s: float
    host: Host
    versions: Mapping[str, str]
    source: Source
    subject: Subject
    workload: WorkloadFacts
    settings: Settings
