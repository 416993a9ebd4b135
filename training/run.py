"""A tuning run from names to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from encoders.reference import Reference
from encoders.source import ResolvedEncoder, resolve
from encoders.write import write_layout
from evaluation.sets import EvaluationSet
from evaluation.similarity import Group, Report, difference, evaluate, flat
from mirror_runtime.bundle import ENCODER_FILE, EncoderSpec, Pooling, to_json
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.extras import require
from mirror_runtime.folders import whole_folder
from training.card import render_card
from training.checkpoint import Checkpoint, Step
from training.contamination import Overlap
from training.corpus import Corpus, CorpusRequest, Lengths, measure_lengths, read_corpus
from training.curve import CURVE_PACKAGE, draw_curve
from training.events import Events, open_events
from training.hardware import Hardware, choose_hardware
from training.recipe import TuneConfig
from training.trainer import steps_in, train

VERSIONED = ("mirror-runtime", "torch", "transformers", "tokenizers", "numpy", "accelerate", "safetensors")
CURVE_FILE, METRICS_FILE, REPORT_FILE, EVALUATION_FILE = "loss.png", "metrics.jsonl", "train.json", "evaluation.json"
EVENTS_FOLDER = "tensorboard"

SPARE_BYTES = 32 * 2**20
"""Room for all that a run folder holds besides weights."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to tune, on what, and where to.

    Attributes:
        base: a folder or a hub name, see `resolve`.
        revision: of a hub name.
        pooling: needed where the base records none.
        corpus: what to learn from.
        output: the run folder to be.
        overwrite: whether an output folder in use is replaced.
        config: the recipe.
        checkpoint_every: steps between two checkpoints, which lie beside `output`; None writes none.
        tensorboard: whether event files are written.
        sets: measured before and after, by what is averaged together.
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
    """What is known when the first step begins.

    Attributes:
        corpus: as read.
        lengths: of its texts.
        overlaps: how much of each evaluation set is in it.
        hardware: what `auto` was.
        steps: of the whole run.
        checkpoint: the file from which an earlier run goes on; None for a fresh start.
    """

    corpus: Corpus
    lengths: Lengths
    overlaps: tuple[Overlap, ...]
    hardware: Hardware
    steps: int
    checkpoint: Path | None


class Watcher:
    """Hears how a run goes. This one does nothing; each method may be replaced."""

    def start(self, start: Start) -> None:
        """Hear that the first step begins."""

    def step(self, step: Step) -> None:
        """Hear of a step; after a resume first of those that were done before."""

    def evaluate(self, encoder: str, done: int, total: int) -> None:
        """Hear how many texts of an evaluation are encoded."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run went; written to `train.json` and printed as JSON.

    Attributes:
        output: the run folder.
        spec: the tuned encoder.
        start: what it began with.
        steps: optimiser steps.
        tokens: of both views in all steps.
        loss: of the last step.
        train_seconds: the loop alone.
        seconds: from start to the finished folder.
        before: the base, measured; None where no sets were given.
        after: the tuned encoder, measured.
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
        """Give one flat JSON object; units are in the names."""
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


def tune(job: Job, watcher: Watcher | None = None) -> Summary:
    """Tune an encoder and write its run folder, whole or not at all.

    Where a launcher started several processes, each calls this with the same job; the first alone writes, evaluates
    and is watched.

    Raises:
        MirrorError: base, corpus, output or settings cannot be used; nothing was written but checkpoints.
    """
    begin = time.perf_counter()
    hardware = choose_hardware(job.config.device, job.config.precision)
    corpus = read_corpus(job.corpus)
    source = _tuned_source(job)
    if not hardware.writes:
        return _tune(job, source, corpus, hardware, None, Watcher(), begin)
    with whole_folder(job.output, overwrite=job.overwrite, marker=ENCODER_FILE) as folder:
        summary = _tune(job, source, corpus, hardware, folder, watcher or Watcher(), begin)
    if checkpoint := _checkpoint(job):
        checkpoint.remove()
    return dataclasses.replace(summary, seconds=time.perf_counter() - begin)


def _tune(
    job: Job,
    source: ResolvedEncoder,
    corpus: Corpus,
    hardware: Hardware,
    folder: Path | None,
    watcher: Watcher,
    begin: float,
) -> Summary:
    reference = Reference.load(source)
    if folder is not None:
        require(CURVE_PACKAGE, "train")  # before the work, rather than after it
        _check_room(reference, job, folder)
    checkpoint = _checkpoint(job)
    sets = [(one.name, one.texts) for members in job.sets.values() for one in members]
    start = Start(
        corpus=corpus,
        lengths=measure_lengths(corpus, reference.tokenizer, job.config.max_tokens),
        overlaps=corpus.overlap_with(sets),
        hardware=hardware,
        steps=steps_in(len(corpus.examples), job.config),
        checkpoint=checkpoint.path if checkpoint and checkpoint.path.is_file() else None,
    )
    steps: list[Step] = []
    with contextlib.ExitStack() as around:
        around.enter_context(_written(job.output))
        events: Events | None = None
        if job.tensorboard and folder is not None:
            events = around.enter_context(open_events(folder / EVENTS_FOLDER))

        def record(step: Step) -> None:
            steps.append(step)
            if events is not None:
                events.step(step)
            watcher.step(step)

        watcher.start(start)
        train(reference, corpus.examples, job.config, hardware, record, checkpoint)
        summary = Summary(
            output=job.output,
            spec=source.spec,
            start=start,
            steps=len(steps),
            tokens=sum(step.tokens for step in steps),
            loss=steps[-1].loss,
            train_seconds=steps[-1].seconds,
            seconds=time.perf_counter() - begin,
        )
        if folder is None:
            return summary
        if sets:
            summary = _evaluated(job, source, reference, summary, watcher)
            if events is not None and summary.after is not None:
                for result in summary.after.results:
                    events.figure(f"spearman/{result.name}", result.spearman.value, summary.steps)
        _write(folder, job, reference, summary, steps)
    return summary


def _evaluated(job: Job, source: ResolvedEncoder, tuned: Reference, summary: Summary, watcher: Watcher) -> Summary:
    """Measure base and result. The base is loaded again: measured before, other processes would wait for it."""
    reports = [
        evaluate(
            reference,
            job.sets,
            name=name,
            on_texts=lambda done, total, name=name: watcher.evaluate(name, done, total),  # type: ignore[misc]
        )
        for name, reference in (("before", Reference.load(source)), ("after", tuned))
    ]
    return dataclasses.replace(summary, before=reports[0], after=reports[1])


def _write(folder: Path, job: Job, reference: Reference, summary: Summary, steps: Sequence[Step]) -> None:
    before, after = summary.before, summary.after
    write_layout(
        folder,
        model=reference.model,
        tokenizer=reference.tokenizer,
        spec=summary.spec,
        card=render_card(
            summary.spec,
            job.config,
            summary.start.corpus,
            steps[-1],
            curve=CURVE_FILE,
            before=before,
            after=after,
            overlaps=summary.start.overlaps,
        ),
    )
    lines = [
        json.dumps({"step": s.step, "loss": s.loss, "tokens": s.tokens, "sec": round(s.seconds, 4)}) for s in steps
    ]
    (folder / METRICS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curve(steps, folder / CURVE_FILE)
    if before is not None and after is not None:
        change = difference(before, after)
        gains = zip(after.results, change.sets, strict=True)
        _dump(
            folder / EVALUATION_FILE,
            {
                "before": before.to_json(),
                "after": after.to_json(),
                "change": [{"name": result.name} | flat("spearman", gain) for result, gain in gains],
                "overlap": [_overlap(overlap) for overlap in summary.start.overlaps],
            },
        )
    _dump(folder / REPORT_FILE, _report(job, summary))


def _checkpoint(job: Job) -> Checkpoint | None:
    """Say where a run keeps its state: beside the folder to be, which does not exist before the end."""
    if job.checkpoint_every is None:
        return None
    output = job.output.absolute()
    return Checkpoint(path=output.with_name(f".{output.name}.checkpoint"), every=job.checkpoint_every)


def _check_room(reference: Reference, job: Job, folder: Path) -> None:
    """Refuse to begin what cannot be saved: a checkpoint holds the weights and two moments of each."""
    weights = 4 * sum(value.numel() for value in reference.model.state_dict().values())
    needed = weights + SPARE_BYTES + (3 * weights if job.checkpoint_every else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{job.output} needs about {needed / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB left: "
            "free some, or give another --output"
        )


@contextlib.contextmanager
def _written(output: Path) -> Iterator[None]:
    """Say what full disks and full memories mean for the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{output} cannot be written: {reason}. Nothing was left there") from error
    except torch.OutOfMemoryError as error:
        raise EngineError("the device's memory is full: give a --micro-batch-tokens, for example 8192") from error


def _tuned_source(job: Job) -> ResolvedEncoder:
    """Resolve the base with the tuned encoder's spec: unit vectors, and the base's own limit on length.

    The recipe's `max_tokens` bounds what is looked at while tuning; the tuned encoder still reads as far as its base.
    Only `mean_padded` ties the two together: its vector is defined by the length that was padded to.
    """
    limit = job.config.max_tokens
    source = resolve(job.base, revision=job.revision, pooling=job.pooling, normalize=True)
    spec = source.spec
    if limit > spec.max_tokens:
        raise InputError(f"--max-tokens is {limit}, but {job.base} reads {spec.max_tokens} tokens at most: say less")
    if spec.pooling is Pooling.MEAN_PADDED and not (source.folder / ENCODER_FILE).is_file():
        spec = dataclasses.replace(spec, max_tokens=limit, pad_to=limit)
    return dataclasses.replace(source, spec=spec)


def _report(job: Job, summary: Summary) -> dict[str, Any]:
    corpus, start = summary.start.corpus, summary.start
    return {
        "base": summary.spec.base_model,
        "revision": summary.spec.revision,
        "settings": to_json(job.config),
        "corpus": {
            "sha256": corpus.sha256,
            "files": [dataclasses.asdict(file) for file in corpus.files],
            "lines": corpus.lines,
            "empty": corpus.empty,
            "duplicates": corpus.duplicates,
            "excluded": corpus.excluded,
            "excluded_for": [_overlap(overlap) for overlap in corpus.overlaps],
            "sampled_from": corpus.sampled_from,
            "texts": len(corpus.examples),
            "pairs": corpus.has_pairs,
            "tokens": dataclasses.asdict(start.lengths),
        },
        "evaluation_sets_in_corpus": [_overlap(overlap) for overlap in start.overlaps],
        "result": {key: value for key, value in summary.to_json().items() if key != "output"},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONED},
    }


def _overlap(overlap: Overlap) -> dict[str, Any]:
    return dataclasses.asdict(overlap) | {"share": round(overlap.share, 4)}


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
