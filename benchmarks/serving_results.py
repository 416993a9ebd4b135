"""What a report holds of a server under load."""

from __future__ import annotations

from dataclasses import dataclass

from mirror_runtime.bundle import EngineName, Precision


@dataclass(frozen=True, kw_only=True)
class ServerTimes:
    """What Triton's own statistics say of the requests of one measurement.

    Attributes:
        queue_ms: mean time that a request waited for others to share an execution with, or for a free instance.
        compute_ms: mean time in the model: tokenising, packing and running the graph.
        texts_per_execution: texts that shared one, on average.
    """

    queue_ms: float
    compute_ms: float
    texts_per_execution: float


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """Callers that each send their next request when the last one is answered.

    Attributes:
        concurrency: callers.
        texts_a_request: in each.
        rounds_texts_per_s: one a round.
        texts_per_s: their median.
        requests: answered in all rounds.
        samples_ms: their times, sorted, thinned to at most 1,000 evenly spaced ranks; percentiles are of all.
        errors: requests that failed; they are in no other figure.
        server: None where the statistics could not be read.
    """

    concurrency: int
    texts_a_request: int
    rounds_texts_per_s: tuple[float, ...]
    texts_per_s: float
    requests: int
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    errors: int
    server: ServerTimes | None


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Single texts that arrive at random (Poisson), whether or not earlier ones are answered.

    Attributes:
        offered_per_s: requests that were to be sent, over the time they were to be sent in.
        achieved_per_s: requests answered, over the time until the last answer.
        requests: answered.
        samples_ms: from the moment a request was to be sent, so that waiting behind a slow one counts; thinned like a
            closed loop's.
        unsent: requests given up because their time was long past: the percentiles are then lower bounds.
        kept_up: at least 95 % of what was offered was answered in time, and nothing was given up.
    """

    offered_per_s: float
    achieved_per_s: float
    requests: int
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    errors: int
    unsent: int
    kept_up: bool
    server: ServerTimes | None


@dataclass(frozen=True, kw_only=True)
class PerfAnalyzerRun:
    """NVIDIA's perf_analyzer on the same server and texts: somebody else's measure of a closed loop."""

    concurrency: int
    texts_a_request: int
    texts_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class Overload:
    """Twice the work that the server can do, sent at random moments (Poisson) from a process of its own.

    Attributes:
        texts_a_request: in each.
        seconds: for how long requests were sent.
        max_tokens_in_flight: the server's bound on what it takes; it refuses what comes on top.
        maximum_texts_per_s: of a closed loop of the same requests from the same process, just before.
        calm_p99_ms: of the same requests one after another, before that: the ordinary time.
        offered_texts_per_s: texts that were due, over the time they were due in.
        goodput_texts_per_s: texts answered, over the time until the last answer.
        accepted: requests answered. Their times, as those of the refused, count from the moment a request was due, and
            samples are thinned like a closed loop's.
        refused: requests that the server said it had no room for. Nobody asked again.
        refused_p50_ms, refused_p99_ms: None where none was.
        errors: requests with neither an answer nor a refusal.
        lag_p99_ms: how long after it was due a request was sent: large where the sender was too slow, not the server.
        resident_before_bytes, resident_after_bytes: memory of all of the server's processes, before the sender began
            and after the server had recovered; pages that they share count in each.
        recovery_s: from the last request sent until a fresh one was answered within `calm_p99_ms`; None where none
            was within half a minute.
    """

    texts_a_request: int
    seconds: float
    max_tokens_in_flight: int
    maximum_texts_per_s: float
    calm_p99_ms: float
    offered_texts_per_s: float
    goodput_texts_per_s: float
    accepted: int
    accepted_samples_ms: tuple[float, ...]
    accepted_p50_ms: float
    accepted_p99_ms: float
    refused: int
    refused_samples_ms: tuple[float, ...]
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    errors: int
    lag_p99_ms: float
    resident_before_bytes: int
    resident_after_bytes: int
    recovery_s: float | None

    @property
    def goodput_share(self) -> float:
        """What was answered a second, over the maximum."""
        return self.goodput_texts_per_s / self.maximum_texts_per_s


GRPC = "grpc"
GATEWAY = "http, gateway"


@dataclass(frozen=True, kw_only=True)
class ServingResult:
    """One artifact behind a server on this machine, load generator beside it on the same cores.

    Attributes:
        engine: of the artifact.
        precision: of the artifact.
        server: its name and version.
        protocol: of the callers: `GRPC` to Triton, or `GATEWAY`.
        in_process_texts_per_s: the runtime without a server on the same texts, in turns with the closed loops.
        closed: by concurrency.
        open: by rate, up to the first that was too much; empty for the gateway.
        perf_analyzer: empty where it could not be run, and for the gateway.
        overload: None where it could not be measured, and for the gateway.
    """

    engine: EngineName
    precision: Precision
    server: str
    protocol: str
    in_process_texts_per_s: float
    closed: tuple[ClosedLoop, ...]
    open: tuple[OpenLoop, ...]
    perf_analyzer: tuple[PerfAnalyzerRun, ...]
    overload: Overload | None

    @property
    def point(self) -> str:
        """Engine and precision, such as "openvino bf16"."""
        return f"{self.engine.value} {self.precision.value}"

    @property
    def name(self) -> str:
        """What tells it from the report's others: the point behind Triton, or "openvino bf16, http, gateway"."""
        return self.point if self.protocol == GRPC else f"{self.point}, {self.protocol}"

    @property
    def share_of_in_process(self) -> float | None:
        """The best closed loop over the runtime without a server; None before either is measured."""
        if not self.closed or not self.in_process_texts_per_s:
            return None
        return max(loop.texts_per_s for loop in self.closed) / self.in_process_texts_per_s

    @property
    def knee_per_s(self) -> float | None:
        """The highest rate that was kept up with; None where none was."""
        return max((loop.offered_per_s for loop in self.open if loop.kept_up), default=None)
