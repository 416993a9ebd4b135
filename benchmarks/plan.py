"""What one benchmark run measures, and what every suite needs: variants, loaded encoders, steps of progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from benchmarks.recorder import Recorder
from benchmarks.workload import Workload
from evaluation.sets import EvaluationSet
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Layout, Manifest, Parity, Precision
from mirror_runtime.errors import InputError, MirrorError

if TYPE_CHECKING:
    from benchmarks.peers.specs import PeerBackend
    from benchmarks.suites.startup import Starter
    from benchmarks.suites.training import TrainingPlan


class Suite(str, Enum):
    """A question that the benchmark answers."""

    LATENCY = "latency"  # how long does one text take?
    THROUGHPUT = "throughput"  # how many texts per second, over the whole workload?
    SERVING = "serving"  # how does it behave behind Triton and the gateway, under load?
    QUALITY = "quality"  # what are the vectors worth, by people's scores?
    STARTUP = "startup"  # how long from process start to the first vector?
    PEERS = "peers"  # how does that compare with other libraries, in the same run?
    TRAINING = "training"  # how long does tuning take and how good is it, beside the published recipe?


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way our runtime runs the bundle: engine and precision, with the parity that its export proved."""

    engine: EngineName
    precision: Precision
    artifact: str
    parity: Parity

    @property
    def name(self) -> str:
        """Engine and precision, such as "openvino bf16": the party of its measurements."""
        return f"{self.engine.value} {self.precision.value}"


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes that decide the cost of a token: layers, hidden width, width of the feed-forward layer."""

    layers: int
    hidden: int
    intermediate: int

    @property
    def flop_per_token(self) -> int:
        """Operations of one token: 2 for each weight of the four attention and two feed-forward matrices."""
        return 2 * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)


@dataclass(frozen=True, kw_only=True)
class Environments:
    """Virtual environments of other programs: those that the user made, by name, and where the others are made."""

    given: Mapping[str, Path]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, on what. Peers, sets and training are empty without the suites that need them.

    Attributes:
        peers: titles of other libraries; `peer_backends` is what `suites.peers.prepare_peers` installed of them.
        shape: None where config.json does not state the encoder's sizes: no ceiling is measured then.
        scratch: folder for converted models and files that other processes read; deleted after the run.
    """

    bundle: Path
    manifest: Manifest
    variants: tuple[Variant, ...]
    workload: Workload
    suites: tuple[Suite, ...]
    rounds: int
    seed: int
    quick: bool
    sets: tuple[EvaluationSet, ...] = ()
    peers: tuple[str, ...] = ()
    training: TrainingPlan | None = None
    shape: EncoderShape | None = None
    environments: Environments = field(default_factory=lambda: Environments(given={}, folder=Path(".venvs")))
    scratch: Path = Path(".")
    peer_backends: tuple[PeerBackend, ...] = ()
    peer_starters: tuple[Starter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A variant with its loaded encoder."""

    variant: Variant
    encoder: Encoder


def load_encoder(plan: Plan, variant: Variant) -> Encoder:
    """Load the bundle's encoder as one variant, or raise a `MirrorError`. The caller closes it."""
    return Encoder.load(plan.bundle, engine=variant.engine.value, precision=variant.precision.value)


@contextmanager
def loaded(plan: Plan, recorder: Recorder, suite: Suite) -> Iterator[tuple[Runner, ...]]:
    """Load an encoder for every variant; one that cannot be loaded here becomes a failure of the suite."""
    with ExitStack() as stack:
        runners = []
        for variant in plan.variants:
            with recorder.failing(suite.value, variant.name):
                runners.append(Runner(variant=variant, encoder=stack.enter_context(load_encoder(plan, variant))))
        yield tuple(runners)


def packed_variants(manifest: Manifest) -> tuple[Variant, ...]:
    """Return a variant for every packed artifact of a bundle."""
    return tuple(
        Variant(engine=a.engine, precision=a.precision, artifact=a.path, parity=a.parity)
        for a in manifest.artifacts
        if a.layout is Layout.PACKED
    )


def select_variants(
    manifest: Manifest, engines: Sequence[EngineName], precisions: Sequence[Precision]
) -> tuple[Variant, ...]:
    """Pick the variants to measure; empty choices mean all. A choice that leaves none is an error."""
    packed = packed_variants(manifest)
    kept = [one for one in packed if not engines or one.engine in engines]
    chosen = tuple(one for one in kept if not precisions or one.precision in precisions)
    if not chosen:
        has = ", ".join(variant.name for variant in packed) or "no packed artifact"
        raise InputError(f"the bundle has {has}: nothing matches --engine and --precision")
    return chosen


SIZES = {
    "layers": ("num_hidden_layers", "n_layers"),
    "hidden": ("hidden_size", "dim"),
    "intermediate": ("intermediate_size", "hidden_dim"),
}
"""Keys of config.json, of BERT and of DistilBERT."""

SIX_MATRICES = frozenset(
    {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "jina_embeddings_v3", "mpnet"}
    | {"roberta", "xlm-roberta"}
)
"""Families whose layers have the matrices of `EncoderShape`: no gate and no grouped keys."""


def read_shape(bundle: Path) -> EncoderShape | None:
    """Read the encoder's sizes from the bundle's config.json; None where it does not state them or has other parts."""
    try:
        config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] not in SIX_MATRICES:
            return None
        sizes = {name: int(next(config[key] for key in keys if key in config)) for name, keys in SIZES.items()}
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return EncoderShape(**sizes)


@contextmanager
def steps(progress: Progress, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps; call the yielded function after each with a word on what comes next."""
    task = progress.add_task(what, total=total, doing="")
    yield lambda doing: progress.update(task, advance=1, doing=doing)
    progress.update(task, completed=total, doing="")


def take_turns(
    parties: Mapping[str, Callable[[int], object]],
    rounds: int,
    fail: Callable[[str, MirrorError], None],
    done: Callable[[str], None],
) -> set[str]:
    """Run every party once a round, A B A B and never A A B B: a machine that changes speed does so for all alike.

    A party that fails is reported to `fail`, left out from then on and among the names returned. After each of a
    party's turns `done` is called with its name.
    """
    failed: set[str] = set()
    for round_ in range(rounds):
        for name, turn in parties.items():
            if name not in failed:
                try:
                    turn(round_)
                except MirrorError as error:
                    failed.add(name)
                    fail(name, error)
            done(name)
    return failed
