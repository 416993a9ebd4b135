"""What `soak.json` holds: one frozen dataclass a kind of figure, units in the key names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.machine_results import Host
from benchmarks.results import Source, WorkloadInfo

SCHEMA_VERSION = 2
SOAK_FILE = "soak.json"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a run must keep to.

    Attributes:
        growth_mb_per_hour: of all server processes' resident memory together, over the second half of the run.
        drift: of p99, as a ratio: the last third of the run to its first.
        unexpected: requests that ended as none may.
    """

    growth_mb_per_hour: float
    drift: float
    unexpected: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for.

    Attributes:
        minutes: of load, without start and end of the server.
        share: of the measured rate at which requests arrive.
        window_s: the length of a window, in seconds.
        seed: of texts, kinds of requests and moments of arrival.
    """

    engine: str
    precision: str
    minutes: float
    share: float
    window_s: float
    seed: int
    thresholds: Thresholds


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was served, and what its vectors were held against.

    Attributes:
        name: the bundle's folder.
        fingerprint: its vector space.
        engine: that served; what "auto" meant.
        precision: likewise.
        floor: the cosine to the expected vector below which a vector is wrong: the one of the artifact's certificate.
        canaries: texts whose expected vectors are the reference's own, out of the bundle. The others' were computed in
            process by the artifact that served.
        long_texts: texts put together to about the encoder's limit; the others are the workload's.
    """

    name: str
    fingerprint: str
    engine: str
    precision: str
    floor: float
    canaries: int
    long_texts: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long right answers took, from the moment their requests were due.

    Attributes:
        requests: how many.
        p50_ms: half took at most this; the others likewise.
        p99_ms: see `p50_ms`.
        p999_ms: see `p50_ms`; of fewer than 1,000 requests it is little more than the slowest.
    """

    requests: int
    p50_ms: float
    p99_ms: float
    p999_ms: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """What ended within some seconds.

    Attributes:
        at_s: its end, counted from the begin of the load.
        seconds: its length.
        requests: how many ended, in whatever way.
        outcomes: how many ended in which way: the names are those of `benchmarks.soak_tally.Outcome`.
        times: of right answers; None where there was none.
        sent_late_p99_ms: how long after they were due requests were sent: the generator's own share of `times`. None
            where none was sent.
    """

    at_s: float
    seconds: float
    requests: int
    outcomes: Mapping[str, int]
    times: Times | None
    sent_late_p99_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the server.

    Attributes:
        name: "mirror serve", "tritonserver", "model" for what runs the model, or "other".
        resident_mb: its resident memory, in 10^6 bytes. Pages that processes share count in each.
    """

    name: str
    pid: int
    resident_mb: float


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """The server's processes at one moment, in seconds since the load began."""

    at_s: float
    processes: tuple[Process, ...]

    @property
    def total_mb(self) -> float:
        """The resident memory of all, in 10^6 bytes."""
        return sum(process.resident_mb for process in self.processes)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Requests that ended in one way in which none may.

    Attributes:
        kind: an `Outcome`.
        first_at_s: when the first of them ended, in seconds since the load began.
        first_reason: what was said of that one.
    """

    kind: str
    count: int
    first_at_s: float
    first_reason: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What came of SIGTERM.

    Attributes:
        by_itself: the server had ended before it was told to.
        status: its exit status; None where it did not end in time and was killed.
        seconds: it took.
        left: what it left behind: processes, shared memory, files.
    """

    by_itself: bool
    status: int | None
    seconds: float
    left: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One thing that was judged.

    Attributes:
        name: of it.
        passed: None where the run was too short to judge it.
        says: what was found and what the threshold is.
    """

    name: str
    passed: bool | None
    says: str


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """The content of `soak.json`.

    Attributes:
        partial: interrupted before the time was over.
        started: date and time, UTC.
        load_s: for how long requests arrived.
        capacity_per_s: requests a second that a closed loop of the same mix was answered, before the load; None where
            it was not measured.
        offered_per_s: requests a second that were to arrive; None likewise.
        generator_cpu_share: of one core, what sending, checking and counting took during the load.
        times: of all right answers.
        times_by_kind: of right answers to each kind of request: protocol and texts, such as "grpc 8".
        growth_mb_per_hour: of each process name and of "all": the least-squares slope of resident memory over the
            second half of the run. Empty with fewer than two samples there.
        p99_drift: the last third's median p99 of a window over the first third's; None with too few windows.
        problems: the unexpected ends of requests.
        server_said: what `mirror serve` wrote to standard error.
        ending: None where the server never ran.
    """

    schema_version: int
    partial: bool
    started: str
    load_s: float
    host: Host
    versions: Mapping[str, str]
    source: Source
    subject: Subject
    workload: WorkloadInfo
    settings: Settings
    capacity_per_s: float | None
    offered_per_s: float | None
    generator_cpu_share: float | None
    times: Times | None
    times_by_kind: Mapping[str, Times]
    outcomes: Mapping[str, int]
    windows: tuple[Window, ...]
    memory: tuple[MemorySample, ...]
    growth_mb_per_hour: Mapping[str, float]
    p99_drift: float | None
    problems: tuple[Problem, ...]
    server_said: tuple[str, ...]
    ending: Ending | None
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that was judged is beyond its threshold."""
        return all(verdict.passed is not False for verdict in self.verdicts)
