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
class ServingResult:
    """One artifact behind Triton on this machine, load generator beside it on the same cores.

    Attributes:
        engine: of the artifact.
        precision: of the artifact.
        server: Triton's name and version.
        protocol: of the callers.
        in_process_texts_per_s: the runtime without a server on the same texts, in turns with the closed loops.
        closed: by concurrency.
        open: by rate, up to the first that was too much.
        perf_analyzer: empty where it could not be run.
    """

    engine: EngineName
    precision: Precision
    server: str
    protocol: str
    in_process_texts_per_s: float
    closed: tuple[ClosedLoop, ...]
    open: tuple[OpenLoop, ...]
    perf_analyzer: tuple[PerfAnalyzerRun, ...]

    @property
    def name(self) -> str:
        """Engine and precision, such as "openvino bf16"."""
        return f"{self.engine.value} {self.precision.value}"

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
