"""A tuning run from names to a run folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirror_runtime.bundle import ENCODER_FILE, EncoderSpec, Pooling, to_json
from mirror_runtime.errors import InputError
from mirror_runtime.folders import whole_folder
from training.corpus import Corpus, read_corpus
from training.layout import write_layout
from training.recipe import TuneConfig
from training.reference import Reference
from training.source import Source, resolve
from training.trainer import Hardware, Step, choose_hardware, steps_in, train

VERSIONED = ("mirror-runtime", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to tune, on what, and where to.

    Attributes:
        base: a folder or a hub name, see `resolve`.
        revision: of a hub name.
        pooling: needed where the base records none.
        corpus: a text file.
        output: the run folder to be.
        overwrite: whether an output folder in use is replaced.
        config: the recipe.
    """

    base: str
    revision: str | None = None
    pooling: Pooling | None = None
    corpus: Path
    output: Path
    overwrite: bool = False
    config: TuneConfig


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run went; written to `train.json` and printed as JSON.

    Attributes:
        output: the run folder.
        spec: the tuned encoder.
        hardware: what `auto` was.
        texts: distinct lines.
        duplicates: lines left out as repeats.
        steps: optimiser steps.
        tokens: of both views in all steps.
        loss: of the last step.
        train_seconds: the loop alone.
        seconds: from start to the finished folder.
    """

    output: Path
    spec: EncoderSpec
    hardware: Hardware
    texts: int
    duplicates: int
    steps: int
    tokens: int
    loss: float
    train_seconds: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Give one flat JSON object; units are in the names."""
        return {
            "output": str(self.output),
            "pooling": self.spec.pooling.value,
            "device": self.hardware.device.value,
            "precision": self.hardware.precision.value,
            "texts": self.texts,
            "duplicates": self.duplicates,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_sec": round(self.tokens / self.train_seconds, 1),
            "loss": self.loss,
            "train_sec": round(self.train_seconds, 3),
            "total_sec": round(self.seconds, 3),
        }


def tune(job: Job, on_start: Callable[[Corpus, Hardware, int], None], on_step: Callable[[Step], None]) -> Summary:
    """Tune an encoder and write its run folder, whole or not at all.

    Args:
        job: what to do.
        on_start: called once with the corpus, the hardware and the number of steps.
        on_step: called after each step.

    Raises:
        MirrorError: base, corpus, output or settings cannot be used; nothing was written.
    """
    begin = time.perf_counter()
    config = job.config
    hardware = choose_hardware(config.device, config.precision)
    corpus = read_corpus(job.corpus)
    source = _tuned_source(job)
    steps: list[Step] = []

    def record(step: Step) -> None:
        steps.append(step)
        on_step(step)

    with whole_folder(job.output, overwrite=job.overwrite, marker=ENCODER_FILE) as folder:
        reference = Reference.load(source)
        on_start(corpus, hardware, steps_in(len(corpus.texts), config))
        train(reference, corpus.texts, config, hardware, record)
        try:
            write_layout(
                folder,
                model=reference.model,
                tokenizer=reference.tokenizer,
                spec=source.spec,
                card=_card(source.spec, config, corpus, steps[-1]),
            )
            lines = [
                json.dumps({"step": s.step, "loss": s.loss, "tokens": s.tokens, "sec": round(s.seconds, 4)})
                for s in steps
            ]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            summary = Summary(
                output=job.output,
                spec=source.spec,
                hardware=hardware,
                texts=len(corpus.texts),
                duplicates=corpus.duplicates,
                steps=len(steps),
                tokens=sum(step.tokens for step in steps),
                loss=steps[-1].loss,
                train_seconds=steps[-1].seconds,
                seconds=time.perf_counter() - begin,
            )
            report = json.dumps(_report(job, corpus, summary), indent=2, ensure_ascii=False)
            (folder / "train.json").write_text(report + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{job.output} cannot be written: {error.strerror}") from error
    return dataclasses.replace(summary, seconds=time.perf_counter() - begin)


def _tuned_source(job: Job) -> Source:
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


def _report(job: Job, corpus: Corpus, summary: Summary) -> dict[str, Any]:
    return {
        "base": summary.spec.base_model,
        "revision": summary.spec.revision,
        "settings": to_json(job.config),
        "corpus": {
            "file": job.corpus.name,
            "sha256": corpus.sha256,
            "lines": corpus.lines,
            "empty": corpus.empty,
            "duplicates": corpus.duplicates,
            "texts": len(corpus.texts),
        },
        "result": {key: value for key, value in summary.to_json().items() if key != "output"},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONED},
    }


def _card(spec: EncoderSpec, config: TuneConfig, corpus: Corpus, last: Step) -> str:
    return f"""# {spec.base_model}, mirror-tuned

A text encoder made from {spec.base_model} by Mirror-BERT tuning: no labels, {len(corpus.texts):,} lines of raw text,
{last.step} steps.

| | |
|---|---|
| vector | {spec.dim} numbers, unit length |
| pooling | {spec.pooling.value} |
| longest text | {spec.max_tokens} tokens ({config.max_tokens} while tuning) |
| recipe | {config.objective.value}, {config.batch_size} texts a step, learning rate {config.lr}, \
temperature {config.temperature}, dropout {config.dropout}, {config.mask_length} characters masked, seed {config.seed} |
| corpus | sha256 {corpus.sha256} |

`encoder.json` says what decides a vector; `train.json` and `metrics.jsonl` say how the weights came about.
"""
