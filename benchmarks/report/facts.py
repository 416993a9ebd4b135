"""What a report states beside its measurements: the machine, the code, the bundle, the texts and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.workload import WorkloadFacts


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine, and what this process may use of it. Empty or None: the system sets or states nothing.

    Attributes:
        cores_online: logical cores of the machine; `cores_usable`: what affinity and the container's quota leave.
        cpu_quota_cores: the tightest CPU quota of the process's control groups, in cores.
        memory_limit_bytes: the tightest memory limit of the process's control groups.
        cpu_flags: CPU features that decide the speed of matrix products.
        clocks_mhz: of each logical core before the first measurement.
        thread_environment: environment variables that change how many threads libraries start.
        load_1min_start: load average before the first measurement; above ~0.5 other work was running.
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
    """The bundle that was measured.

    Attributes:
        artifacts: engine and precision of every packed artifact, measured or not.
        flop_per_token: of one token's matrix products, without attention and embeddings; None where config.json does
            not state the encoder's sizes.
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

    Attributes:
        partial: the run was interrupted; some figures may rest on fewer rounds than requested.
        resumed: when the run was continued after an interruption.
        wall_s: of all continuations together.
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
