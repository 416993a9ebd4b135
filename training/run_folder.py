"""The files of a run folder: the encoder, its model card, the loss and its events, the evaluation and the report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from encoders.reference import Reference
from encoders.source import ResolvedEncoder
from encoders.write import write_layout
from evaluation.similarity import difference
from evaluation.statistics import flat
from mirror_runtime.bundle import to_json
from mirror_runtime.extras import require
from training.card import render_card
from training.checkpoint import Step
from training.corpus import Overlap
from training.job import REPORT_FILE, Job, Summary

VERSIONED = ("mirror-runtime", "torch", "transformers", "tokenizers", "numpy", "accelerate", "safetensors")
CURVE_FILE, METRICS_FILE, EVALUATION_FILE = "loss.png", "metrics.jsonl", "evaluation.json"

FLUSH_SECONDS = 5
"""Pause between two writes of events to the disk: short enough to watch a run."""

CURVE_PACKAGE = "matplotlib.figure"

SMOOTHED = 0.05
"""Window of the running mean, as a share of the steps."""


class Events:
    """An event file of TensorBoard, whose own writer has a thread that prints a traceback where the disk is full."""

    def __init__(self, file: BinaryIO) -> None:
        self._messages = require("tensorboard.compat.proto.event_pb2", "train")
        self._records = require("tensorboard.summary.writer.record_writer", "train").RecordWriter(file)
        self._flushed_at = 0.0
        self._write(file_version="brain.Event:2")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a number. An OSError says that it could not be written."""
        self._write(step=step, summary={"value": [{"tag": name, "simple_value": value}]})

    def _write(self, **fields: Any) -> None:
        self._records.write(self._messages.Event(wall_time=time.time(), **fields).SerializeToString())
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._records.flush()
            self._flushed_at = time.monotonic()


@contextmanager
def open_events(folder: Path) -> Iterator[Events]:
    """Open an event file in a new folder, and complete it when the block ends."""
    require("tensorboard", "train")  # before anything is written
    folder.mkdir()
    with (folder / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}").open("wb") as file:
        yield Events(file)


def write_run_folder(
    folder: Path, job: Job, tuned: Reference, summary: Summary, steps: Sequence[Step], base: ResolvedEncoder
) -> None:
    """Write all files of a run, except TensorBoard's, into a folder. Prompts and license are the base's."""
    before, after, start = summary.before, summary.after, summary.start
    card = render_card(
        summary.spec,
        job.config,
        start.corpus,
        len(steps),
        curve=CURVE_FILE,
        before=before,
        after=after,
        overlaps=start.overlaps,
        outcome=summary.outcome,
        choice=summary.choice if summary.trials else None,
    )
    write_layout(
        folder,
        model=tuned.model,
        tokenizer=tuned.tokenizer,
        spec=summary.spec,
        card=card,
        dense=tuned.dense,
        prompts=base.prompts,
        terms=base.card.terms,
    )
    lines = [
        json.dumps({"step": s.step, "loss": s.loss, "tokens": s.tokens, "sec": round(s.seconds, 4)}) for s in steps
    ]
    (folder / METRICS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if steps:
        draw_curve(steps, folder / CURVE_FILE)
    if before is not None and after is not None:
        gains = zip(after.results, difference(before, after).sets, strict=True)
        _dump(
            folder / EVALUATION_FILE,
            {
                "before": before.to_json(),
                "after": after.to_json(),
                "change": [{"name": result.name} | flat("spearman", gain) for result, gain in gains],
                "overlap": [_overlap(overlap) for overlap in start.overlaps],
            },
        )
    _dump(folder / REPORT_FILE, _report(job, summary))


def draw_curve(steps: Sequence[Step], path: Path) -> None:
    """Draw loss against step, with its running mean, into a PNG file: with the Agg canvas, without global state."""
    canvas = require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg
    figure = require(CURVE_PACKAGE, "train").Figure(figsize=(7, 3.6), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    numbers, losses = [step.step for step in steps], np.array([step.loss for step in steps])
    window = max(1, round(SMOOTHED * len(steps)))
    axes.plot(numbers, losses, color="C0", alpha=0.35 if window > 1 else 1, marker="." if len(steps) < 3 else None)
    if window > 1:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(numbers[window - 1 :], mean, color="C0", label=f"mean of {window} steps")
        axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _report(job: Job, summary: Summary) -> dict[str, Any]:
    corpus, start = summary.start.corpus, summary.start
    return {
        "base": summary.spec.base_model,
        "revision": summary.spec.revision,
        "teacher": job.teacher,
        "settings": to_json(job.config) if summary.steps else None,  # none was used
        "corpus": {
            "sha256": corpus.sha256,
            "files": [dataclasses.asdict(file) for file in corpus.files],
            **corpus.counts,
            "excluded_for": [_overlap(overlap) for overlap in corpus.overlaps],
            "sampled_from": corpus.sampled_from,
            "texts": len(corpus.examples),
            "pairs": corpus.has_pairs,
            "documents": corpus.has_documents,
            "labels": job.corpus.labels.value if job.corpus.labels else None,
            "tokens": dataclasses.asdict(start.lengths),
        },
        "held_out": list(summary.outcome.held_out) if summary.outcome else [],
        "evaluation_sets_in_corpus": [_overlap(overlap) for overlap in start.overlaps],
        "result": {key: value for key, value in summary.to_json().items() if key != "output"},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONED},
    }


def _overlap(overlap: Overlap) -> dict[str, Any]:
    return dataclasses.asdict(overlap) | {"share": round(overlap.share, 4)}


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
