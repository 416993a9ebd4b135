"""What a report holds: one frozen dataclass a kind of result, units in the key names, one strict reader.

Every result keeps its raw samples beside the figures computed from them, the conditions it was measured under, and the
parity that its artifact was exported with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from benchmarks.machine_results import Bandwidth, Ceiling, Host
from benchmarks.peer_results import Comparison, PeerResult, SingleTexts, TrainingResult
from benchmarks.point import Point
from benchmarks.quality_results import QualityResult, QualitySet
from benchmarks.scaling_results import ScalingResult
from benchmarks.serving_results import ServingResult
from mirror_runtime.bundle import from_json
from mirror_runtime.errors import BundleError, InputError

SCHEMA_VERSION = 6
REPORT_FILE = "report.json"


class Suite(str, Enum):
    """A question that the benchmark answers."""

    LATENCY = "latency"
    """How long does one text take?"""
    THROUGHPUT = "throughput"
    """How many texts a second, over the whole workload?"""
    SERVING = "serving"
    """How does it behave behind Triton, under load?"""
    QUALITY = "quality"
    """What are the vectors worth, by people's scores?"""
    STARTUP = "startup"
    """How long from process start to the first vector?"""
    SCALING = "scaling"
    """What do more texts, cores and callers cost?"""
    PEERS = "peers"
    """How does that compare with other libraries, in the same run?"""
    TRAINING = "training"
    """How long does tuning take and how good is it, beside the published recipe?"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The code that was measured; both None outside a git clone."""

    commit: str | None
    dirty: bool | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The bundle that was measured.

    Attributes:
        name: its folder's name.
        fingerprint: its vector space.
        base_model: where its weights came from.
        max_tokens: longest text in tokens.
        dim: length of a vector.
        artifacts: engine and precision of every packed artifact, measured or not.
        flop_per_token: floating-point operations of one token's matrix products without attention and embeddings;
            None where config.json does not say the encoder's shape.
    """

    name: str
    fingerprint: str
    base_model: str
    max_tokens: int
    dim: int
    artifacts: tuple[str, ...]
    flop_per_token: int | None


@dataclass(frozen=True, kw_only=True)
class WorkloadInfo:
    """The texts that were encoded. Token counts include special tokens, after truncation to the encoder's limit.

    Attributes:
        distinct: texts that differ in their tokens from all others: the runtime computes equal ones of a window once.
    """

    source: str
    texts: int
    distinct: int
    texts_sha256: str
    tokens_mean: float
    tokens_p50: float
    tokens_p90: float
    tokens_max: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for.

    Attributes:
        points: engine and precision of the artifacts to measure.
        peers: titles of the other libraries to measure; empty without the suite.
        sets_sha256: of the evaluation sets' files.
        training: what suite training does, in words; None without the suite.
        planted_slowdown: share by which every engine run was made to take longer on purpose; 0 in a real report.
    """

    suites: tuple[Suite, ...]
    points: tuple[str, ...]
    peers: tuple[str, ...]
    sets_sha256: tuple[str, ...]
    training: str | None
    quick: bool
    rounds: int
    seed: int
    planted_slowdown: float


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """One text at a time, in process, warm, tokenising included.

    Attributes:
        streams: the engine's parallel streams; a single text uses one of them.
        tokens: exact length of every text, special tokens included.
        floor_ms: what the machine's bare matrix products or its memory would take; None where either is unknown.
        yardstick_ms: one a round, of as many samples each; see `benchmarks.yardstick`. Empty where there is none.
    """

    point: Point
    streams: int
    tokens: int
    floor_ms: float | None
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    yardstick_ms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ThroughputResult:
    """The whole workload in one `encode` call, tokenising included; one sample a round.

    Attributes:
        tokens: useful tokens executed in a round: padding does not count.
        row_fill: share of executed token slots that held useful tokens.
        ceiling_share: useful operations a second over the machine's bare matrix-product rate; None without a ceiling.
        tokenize_share, pack_share, infer_share, unpack_share: each stage's seconds over the rounds' wall
            seconds. Stages overlap and infer counts every stream, so they need not add up to 1.
        yardstick_s: one a round; see `benchmarks.yardstick`. Empty where there is none.
    """

    point: Point
    streams: int
    texts: int
    tokens: int
    samples_s: tuple[float, ...]
    texts_per_s: float
    texts_per_s_min: float
    texts_per_s_max: float
    tokens_per_s: float
    row_fill: float
    ceiling_share: float | None
    tokenize_share: float
    pack_share: float
    infer_share: float
    unpack_share: float
    yardstick_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LengthResult:
    """Texts of one length in one `encode` call, tokenising included; one sample a round.

    Attributes:
        tokens: exact length of every text, special tokens included.
    """

    point: Point
    tokens: int
    texts: int
    samples_s: tuple[float, ...]
    texts_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class StartupResult:
    """Seconds from process start to the first vector, in a fresh process with warm file caches, and what it takes.

    Attributes:
        party: our engine and precision, or a peer and its backend.
        min_cosine: of the artifact's export; None for a peer.
        first_vector_bytes: the process's peak resident memory when it had its first vector; median of the starts.
        texts: of the workload, that it encoded next.
        peak_bytes: its peak resident memory after these.
        installed_bytes: of the packages that it needs, Python itself left out.
    """

    party: str
    min_cosine: float | None
    samples_s: tuple[float, ...]
    median_s: float
    first_vector_bytes: int
    texts: int
    peak_bytes: int
    installed_bytes: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A point that could not be measured."""

    suite: str
    party: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `report.json`.

    Attributes:
        partial: the run was interrupted; what is here was finished, or holds fewer rounds than asked for.
        resumed: when the run was continued after an interrupt; empty for one that ran through.
        finished: the steps that need not be measured again by `--resume`.
        bandwidth: of the memory; None where no suite wanted it.
        ours_beside_peers: our throughput in the rounds that took turns with the peers.
        single_texts: latency of ours and of the peers, in turns.
    """

    schema_version: int
    partial: bool
    started: str
    resumed: tuple[str, ...]
    finished: tuple[str, ...]
    wall_s: float
    host: Host
    versions: Mapping[str, str]
    source: Source
    subject: Subject
    workload: WorkloadInfo
    settings: Settings
    ceilings: tuple[Ceiling, ...]
    bandwidth: Bandwidth | None
    latency: tuple[LatencyResult, ...]
    throughput: tuple[ThroughputResult, ...]
    lengths: tuple[LengthResult, ...]
    startup: tuple[StartupResult, ...]
    quality_sets: tuple[QualitySet, ...]
    quality: tuple[QualityResult, ...]
    serving: tuple[ServingResult, ...]
    ours_beside_peers: tuple[ThroughputResult, ...]
    peers: tuple[PeerResult, ...]
    single_texts: tuple[SingleTexts, ...]
    comparisons: tuple[Comparison, ...]
    training: tuple[TrainingResult, ...]
    scaling: tuple[ScalingResult, ...]
    failures: tuple[Failure, ...]

    @property
    def measured(self) -> bool:
        """Whether any suite gave a figure (a ceiling alone is none)."""
        speed = (self.latency, self.throughput, self.startup, self.scaling, self.serving, self.peers)
        return any((*speed, self.quality, self.training))


def read_report(folder: Path) -> Report:
    """Read `report.json` of a report folder, strictly.

    Raises:
        InputError: the file is missing, malformed, or of another schema version.
    """
    path = folder / REPORT_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a report: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema_version {version!r}; this program reads {SCHEMA_VERSION}")
    try:
        return from_json(Report, data, str(path))
    except BundleError as error:
        raise InputError(str(error)) from error
