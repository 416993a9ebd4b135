"""One benchmark run: what every suite needs to know, and where it leaves its results as soon as it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from benchmarks.evalsets import EvaluationSet
from benchmarks.machine_results import Bandwidth, Ceiling
from benchmarks.peer_results import Comparison, PeerResult, SingleTexts, TrainingResult
from benchmarks.planted import Slowed
from benchmarks.point import Point
from benchmarks.quality_results import QualityResult, QualitySet
from benchmarks.results import Failure, LatencyResult, LengthResult, StartupResult, Suite, ThroughputResult
from benchmarks.scaling_results import ScalingResult
from benchmarks.serving_results import ServingResult
from benchmarks.workload import Workload
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Layout, Manifest, Precision
from mirror_runtime.errors import InputError, MirrorError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, on what.

    Attributes:
        peers: titles of the other libraries to measure; empty without the suite.
        sets: scored pairs to judge vectors by; empty without the suite quality.
        training: what suite training does, in words; None without the suite.
        rounds: how often each party runs; more rounds give narrower intervals.
        seed: of the workload's sample and of the bootstrap.
        planted_slowdown: see `benchmarks.planted`; 0 for a real measurement.
        flop_per_token: see `benchmarks.ceilings.EncoderShape`; None where it is unknown.
    """

    bundle: Path
    manifest: Manifest
    points: tuple[Point, ...]
    workload: Workload
    suites: tuple[Suite, ...]
    peers: tuple[str, ...]
    sets: tuple[EvaluationSet, ...]
    training: str | None
    quick: bool
    rounds: int
    seed: int
    flop_per_token: int | None
    planted_slowdown: float = 0.0


@dataclass(kw_only=True)
class Results:
    """Results so far. A suite replaces an entry after every round, so an interrupt finds what is finished.

    Attributes:
        finished: steps that a continued run need not measure again, in the order in which they were finished.
    """

    ceilings: dict[tuple[EngineName, Precision], Ceiling] = field(default_factory=dict)
    bandwidth: Bandwidth | None = None
    latency: dict[tuple[str, int], LatencyResult] = field(default_factory=dict)
    throughput: dict[str, ThroughputResult] = field(default_factory=dict)
    lengths: dict[tuple[str, int], LengthResult] = field(default_factory=dict)
    startup: dict[str, StartupResult] = field(default_factory=dict)
    quality_sets: tuple[QualitySet, ...] = ()
    quality: dict[str, QualityResult] = field(default_factory=dict)
    serving: dict[str, ServingResult] = field(default_factory=dict)
    ours_beside_peers: dict[str, ThroughputResult] = field(default_factory=dict)
    peers: dict[str, PeerResult] = field(default_factory=dict)
    single_texts: dict[str, SingleTexts] = field(default_factory=dict)
    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    training: dict[str, TrainingResult] = field(default_factory=dict)
    scaling: dict[str, ScalingResult] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def has(self, step: str) -> bool:
        """Tell whether a step is finished, in this run or in the one that it continues."""
        return step in self.finished

    def finish(self, step: str) -> None:
        """Note that a step is finished: what it measured is complete."""
        if step not in self.finished:
            self.finished.append(step)

    def fail(self, suite: str, party: str, reason: object) -> None:
        """Note a point that could not be measured."""
        self.failures.append(Failure(suite=suite, party=party, reason=str(reason)))


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Our runtime at one point, loaded."""

    point: Point
    encoder: Encoder


@contextmanager
def loaded(plan: Plan, results: Results) -> Iterator[tuple[Runner, ...]]:
    """Load an encoder for every point; one that cannot be loaded here becomes a failure with its reason."""
    with ExitStack() as stack:
        runners = []
        for point in plan.points:
            try:
                encoder = Encoder.load(plan.bundle, engine=point.engine.value, precision=point.precision.value)
            except MirrorError as error:
                results.fail("load", point.name, error)
                continue
            if plan.planted_slowdown:
                encoder.engine = Slowed(encoder.engine, plan.planted_slowdown)
            runners.append(Runner(point=point, encoder=stack.enter_context(encoder)))
        yield tuple(runners)


def select_points(
    manifest: Manifest, engines: Sequence[EngineName], precisions: Sequence[Precision]
) -> tuple[Point, ...]:
    """Pick the packed artifacts to measure; empty choices mean all.

    Raises:
        InputError: the bundle has nothing of what was asked for.
    """
    packed = [artifact for artifact in manifest.artifacts if artifact.layout is Layout.PACKED]
    points = tuple(
        Point(engine=a.engine, precision=a.precision, artifact=a.path, parity=a.parity)
        for a in packed
        if (not engines or a.engine in engines) and (not precisions or a.precision in precisions)
    )
    if not points:
        has = ", ".join(f"{a.engine.value} {a.precision.value}" for a in packed) or "no packed artifact"
        raise InputError(f"the bundle has {has}: nothing matches --engine and --precision")
    return points


@contextmanager
def steps(progress: Progress, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps; call the yielded function after each with a word on what comes next."""
    task = progress.add_task(what, total=total, doing="")

    def advance(doing: str) -> None:
        progress.update(task, advance=1, doing=doing)

    yield advance
    progress.update(task, completed=total, doing="")
