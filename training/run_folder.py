"""The files of a run folder: the encoder, its model card, the loss, the evaluation and the report."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from encoders.reference import Reference
from encoders.write import write_layout
from evaluation.similarity import difference, flat
from mirror_runtime.bundle import to_json
from training.card import render_card
from training.checkpoint import Step
from training.contamination import Overlap
from training.curve import draw_curve
from training.job import Job, Summary

VERSIONED = ("mirror-runtime", "torch", "transformers", "tokenizers", "numpy", "accelerate", "safetensors")
CURVE_FILE, METRICS_FILE, REPORT_FILE, EVALUATION_FILE = "loss.png", "metrics.jsonl", "train.json", "evaluation.json"


def write_run_folder(folder: Path, job: Job, tuned: Reference, summary: Summary, steps: Sequence[Step]) -> None:
    """Write all files of a run, except TensorBoard's, into a folder."""
    before, after, start = summary.before, summary.after, summary.start
    card = render_card(
        summary.spec,
        job.config,
        start.corpus,
        steps[-1],
        curve=CURVE_FILE,
        before=before,
        after=after,
        overlaps=start.overlaps,
    )
    write_layout(folder, model=tuned.model, tokenizer=tuned.tokenizer, spec=summary.spec, card=card)
    lines = [
        json.dumps({"step": s.step, "loss": s.loss, "tokens": s.tokens, "sec": round(s.seconds, 4)}) for s in steps
    ]
    (folder / METRICS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
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
