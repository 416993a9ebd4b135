"""The input, the progress and the result of a tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.sets import EvaluationSet
from evaluation.similarity import Group, Report
from mirror_runtime.bundle import EncoderSpec, Pooling
from training.corpus import Corpus, CorpusRequest, Lengths, Overlap
from training.recipe import TuneConfig

if TYPE_CHECKING:  # these import torch, for which --help does not wait
    from training.checkpoint import Step
    from training.gate import Outcome
    from training.hardware import Hardware


REPORT_FILE = "train.json"
"""Of a run folder: settings, corpus, held-out texts and results."""


class ProbeChoice(str, Enum):
    """What a run is measured by without labels."""

    AUTO = "auto"
    """Texts are held out, and a probe is measured on them: `parts` on documents, Spearman on scored pairs, else
    `content`."""
    CONTENT = "content"
    """`content` also on documents and scored pairs."""
    NONE = "none"
    """Nothing is held out or measured."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run is started with."""

    base: str  # a folder or a hub name, see `resolve`
    revision: str | None = None
    pooling: Pooling | None = None  # required if the base does not record it
    corpus: CorpusRequest
    teacher: str | None = None  # of the teacher objective: see `teacher_vectors`
    output: Path
    overwrite: bool = False
    config: TuneConfig
    rivals: Mapping[str, TuneConfig] = dataclasses.field(default_factory=dict)  # to choose from in place of `config`
    seeds: int = 1  # that each rival is tuned with; of several, the average of the weights is a rival too
    trial: str | None = None  # the rival that is tuned
    checkpoint_every: int | None = None  # steps between two checkpoints, which lie beside `output`; None writes none
    tensorboard: bool = False
    # Evaluation sets by group, measured before and after
    sets: Mapping[Group, Sequence[EvaluationSet]] = dataclasses.field(default_factory=dict)
    probe: ProbeChoice = ProbeChoice.NONE


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything that is known before the first step."""

    corpus: Corpus
    lengths: Lengths
    overlaps: tuple[Overlap, ...]  # share of each evaluation set in it
    hardware: Hardware  # with every `auto` decided
    steps: int  # of the whole run
    checkpoint: Path | None  # the file that the run resumes from; None for a fresh start
    trial: str | None = None  # the rival that is tuned


class RunObserver:
    """Receives a run's progress. This one ignores it; override any method."""

    def on_start(self, start: Start) -> None:
        """Receive the state before the first step; of each rival where there are several."""

    def on_step(self, step: Step) -> None:
        """Receive a step; after a resume first the steps before it."""

    def on_progress(self, encoder: str, done: int, total: int) -> None:
        """Receive the number of encoded texts of an evaluation; `encoder` is "before", "after" or "teacher"."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run, written to `train.json` and printed as JSON."""

    output: Path
    spec: EncoderSpec
    start: Start
    steps: int
    tokens: int  # of all views in all steps
    loss: float | None  # of the last step
    train_seconds: float  # of the training loop
    seconds: float  # from the start to the finished folder
    before: Report | None = None  # measures of the base; None without evaluation sets
    after: Report | None = None  # measures of the tuned encoder
    outcome: Outcome | None = None  # of the gate; None without one
    trials: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)  # of the rivals, on texts of their own
    chosen: str | None = None  # of the rivals; None if the base was left as it is

    @property
    def choice(self) -> str:
        """Why a rival or the base was chosen, in one sentence."""
        gains = ", ".join(f"{name} {trial.gain:+}" for name, trial in self.trials.items())
        reason = "the largest gain of those surely above zero" if self.chosen else "no gain is surely above zero"
        items = max(trial.items for trial in self.trials.values())
        return f"chosen: {self.chosen or 'the base as it is'} ({reason}, on {items} other held-out texts: {gains})"

    def to_json(self) -> dict[str, Any]:
        """Return one flat JSON object; units are in the names."""
        corpus, hardware = self.start.corpus, self.start.hardware
        scores = {
            f"{group.value}_{when}": round(mean.value, 3)
            for when, report in (("before", self.before), ("after", self.after))
            for group, mean in (report.means if report else {}).items()
        }
        trials = {name: one.to_json() for name, one in self.trials.items()}
        choice = {"chosen": self.chosen, "trials": trials} if trials else {}
        return {
            "output": str(self.output),
            "pooling": self.spec.pooling.value,
            "device": hardware.device.value,
            "precision": hardware.precision.value,
            "processes": hardware.processes,
            "texts": len(corpus.examples),
            "duplicates": corpus.counts["duplicates"],
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_sec": round(self.tokens / self.train_seconds, 1) if self.steps else None,
            "loss": self.loss,
            **scores,
            "gate": self.outcome.to_json() if self.outcome else None,
            **choice,
            "train_sec": round(self.train_seconds, 3),
            "total_sec": round(self.seconds, 3),
        }
