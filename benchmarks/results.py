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

from mirror_runtime.bundle import EngineName, Parity, Precision, from_json
from mirror_runtime.errors import BundleError, InputError

SCHEMA_VERSION = 2
REPORT_FILE = "report.json"


class Suite(str, Enum):
    """A question that the benchmark answers."""

    LATENCY = "latency"
    """How long does one text take?"""
    THROUGHPUT = "throughput"
    """How many texts a second, over the whole workload?"""
    STARTUP = "startup"
    """How long from process start to the first vector?"""
    PEERS = "peers"
    """How does that compare with other libraries, in the same run?"""
    TRAINING = "training"
    """How long does tuning take and how good is it, beside the published recipe?"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine.

    Attributes:
        cores_online: logical cores of the machine.
        cores_usable: what affinity and the container's quota leave to this process.
        cpu_flags: the CPU's features that decide the speed of matrix products.
        load_1min_start: the system's load average before the first measurement; above ~0.5 others were at work.
    """

    cpu_model: str
    cores_online: int
    cores_usable: int
    cpu_flags: tuple[str, ...]
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
        name: its folder's name.
        fingerprint: its vector space.
        base_model: where its weights came from.
        max_tokens: longest text in tokens.
        dim: length of a vector.
        flop_per_token: floating-point operations of one token's matrix products without attention and embeddings;
            None where config.json does not say the encoder's shape.
    """

    name: str
    fingerprint: str
    base_model: str
    max_tokens: int
    dim: int
    flop_per_token: int | None


@dataclass(frozen=True, kw_only=True)
class WorkloadInfo:
    """The texts that were encoded. Token counts include special tokens, after truncation to the encoder's limit."""

    source: str
    texts: int
    texts_sha256: str
    tokens_mean: float
    tokens_p50: float
    tokens_p90: float
    tokens_max: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for."""

    suites: tuple[Suite, ...]
    quick: bool
    rounds: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way our runtime runs the bundle, with the parity its export proved."""

    engine: EngineName
    precision: Precision
    artifact: str
    parity: Parity

    @property
    def name(self) -> str:
        """Engine and precision, such as "openvino bf16"."""
        return f"{self.engine.value} {self.precision.value}"


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The rate of bare matrix products in one engine at one precision on all usable cores.

    Attributes:
        rows, inner, outer: the product [rows, inner] x [inner, outer], chained with its transpose.
        flop_per_sample: operations in one sample.
        samples_s: seconds, one per repetition.
        gflop_per_s: of the fastest sample, for a ceiling must not sink because others were at work.
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
class LatencyResult:
    """One text at a time, in process, warm, tokenising included.

    Attributes:
        streams: the engine's parallel streams; a single text uses one of them.
        tokens: exact length of every text, special tokens included.
    """

    point: Point
    streams: int
    tokens: int
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class ThroughputResult:
    """The whole workload in one `encode` call, tokenising included; one sample a round.

    Attributes:
        tokens: useful tokens executed in a round: padding does not count.
        row_fill: share of executed token slots that held useful tokens.
        ceiling_share: useful operations a second over the machine's bare matrix-product rate; None without a ceiling.
        tokenize_share, pack_share, infer_share, unpack_share: each stage's seconds over the rounds' wall
            seconds. Stages overlap and infer counts every stream, so they need not add up to 1.
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


@dataclass(frozen=True, kw_only=True)
class StartupResult:
    """Seconds from process start to the first vector, in a fresh process with warm file caches.

    Attributes:
        party: our engine and precision, or a peer and its backend.
        min_cosine: of the artifact's export; None for a peer.
    """

    party: str
    min_cosine: float | None
    samples_s: tuple[float, ...]
    median_s: float


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One batch size of a peer's sweep over a part of the workload."""

    batch_size: int
    texts: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """Another library on the same weights and texts, in its own environment, at its best batch size.

    Attributes:
        precision: what the library says it computes in.
        threads: what the library says it uses; None where it does not say.
    """

    peer: str
    backend: str
    precision: str
    threads: int | None
    versions: Mapping[str, str]
    load_s: float
    sweep: tuple[SweepPoint, ...]
    batch_size: int
    texts: int
    samples_s: tuple[float, ...]
    texts_per_s: float
    texts_per_s_min: float
    texts_per_s_max: float

    @property
    def name(self) -> str:
        """Peer and backend."""
        return f"{self.peer} {self.backend}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our median rate over a peer's, from rounds that took turns, and how far the vectors agree.

    Attributes:
        ratio_low, ratio_high: 95 % bootstrap interval over the rounds.
        min_cosine, mean_cosine: the peer's vectors to ours over the workload.
    """

    point: Point
    peer: str
    ratio: float
    ratio_low: float
    ratio_high: float
    min_cosine: float
    mean_cosine: float


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One tuning run in a process of its own.

    Attributes:
        seconds: from process start to the saved folder.
        spearman: of each evaluation set, x 100.
        mean: over the sets.
    """

    seed: int
    seconds: float
    spearman: Mapping[str, float]
    mean: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """One recipe over several seeds, in rounds that took turns with the others.

    Attributes:
        party: whose code and which recipe.
        base: the encoder that was tuned.
        median_s: of the runs' seconds.
    """

    party: str
    base: str
    pooling: str
    corpus: str
    texts: int
    runs: tuple[TrainingRun, ...]
    median_s: float


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
        ours_beside_peers: our throughput in the rounds that took turns with the peers.
    """

    schema_version: int
    partial: bool
    started: str
    wall_s: float
    host: Host
    versions: Mapping[str, str]
    source: Source
    subject: Subject
    workload: WorkloadInfo
    settings: Settings
    ceilings: tuple[Ceiling, ...]
    latency: tuple[LatencyResult, ...]
    throughput: tuple[ThroughputResult, ...]
    startup: tuple[StartupResult, ...]
    ours_beside_peers: tuple[ThroughputResult, ...]
    peers: tuple[PeerResult, ...]
    comparisons: tuple[Comparison, ...]
    training: tuple[TrainingResult, ...]
    failures: tuple[Failure, ...]

    @property
    def measured(self) -> bool:
        """Whether any suite gave a figure (a ceiling alone is none)."""
        return bool(self.latency or self.throughput or self.startup or self.peers or self.training)


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
