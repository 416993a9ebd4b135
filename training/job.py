"""The input, the progress and the result of a tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.sets import EvaluationSet
from evaluation.similarity import Group, Report
from mirror_runtime.bundle import EncoderSpec, Pooling
from training.checkpoint import Step
from training.contamination import Overlap
from training.corpus import Corpus, CorpusRequest, Lengths
from training.hardware import Hardware
from training.recipe import TuneConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run is started with.

    Attributes:
        base: a folder or a hub name, see `resolve`.
        revision: of a hub name.
        pooling: required if the base does not record it.
        corpus: the text to learn from.
        output: the run folder to write.
        overwrite: replace an existing run folder.
        config: the recipe.
        checkpoint_every: steps between two checkpoints, which lie beside `output`; None writes none.
        tensorboard: write event files.
        sets: evaluation sets by group, measured before and after.
    """

    base: str
    revision: str | None = None
    pooling: Pooling | None = None
    corpus: CorpusRequest
    output: Path
    overwrite: bool = False
    config: TuneConfig
    checkpoint_every: int | None = None
    tensorboard: bool = False
    sets: Mapping[Group, Sequence[EvaluationSet]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything that is known before the first step.

    Attributes:
        corpus: as read.
        lengths: of its texts.
        overlaps: share of each evaluation set in it.
        hardware: with every `auto` decided.
        steps: of the whole run.
        checkpoint: the file that the run resumes from; None for a fresh start.
    """

    corpus: Corpus
    lengths: Lengths
    overlaps: tuple[Overlap, ...]
    hardware: Hardware
    steps: int
    checkpoint: Path | None


class RunObserver:
    """Receives a run's progress. This one ignores it; override any method."""

    def on_start(self, start: Start) -> None:
        """Receive the state before the first step."""

    def on_step(self, step: Step) -> None:
        """Receive a step; after a resume first the steps before it."""

    def on_progress(self, encoder: str, done: int, total: int) -> None:
        """Receive the number of encoded texts of an evaluation; `encoder` is "before" or "after"."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run, written to `train.json` and printed as JSON.

    Attributes:
        output: the run folder.
        spec: the tuned encoder.
        start: the state before the first step.
        steps: number of optimiser steps.
        tokens: of all views in all steps.
        loss: of the last step.
        train_seconds: of the training loop.
        seconds: from the start to the finished folder.
        before: measures of the base; None without evaluation sets.
        after: measures of the tuned encoder.
    """

    output: Path
    spec: EncoderSpec
    start: Start
    steps: int
    tokens: int
    loss: float
    train_seconds: float
    seconds: float
    before: Report | None = None
    after: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """Return one flat JSON object; units are in the names."""
        corpus, hardware = self.start.corpus, self.start.hardware
        scores = {
            f"{group.value}_{when}": round(mean.value, 3)
            for when, report in (("before", self.before), ("after", self.after))
            for group, mean in (report.means if report else {}).items()
        }
        return {
            "output": str(self.output),
            "pooling": self.spec.pooling.value,
            "device": hardware.device.value,
            "precision": hardware.precision.value,
            "processes": hardware.processes,
            "texts": len(corpus.examples),
            "duplicates": corpus.duplicates,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_sec": round(self.tokens / self.train_seconds, 1),
            "loss": self.loss,
            **scores,
            "train_sec": round(self.train_seconds, 3),
            "total_sec": round(self.seconds, 3),
        }
