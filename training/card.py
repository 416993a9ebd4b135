"""The model card of a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from encoders.card import RUN_MARK
from evaluation.similarity import AGGREGATION, GEOMETRY, Report, difference
from mirror_runtime.bundle import EncoderSpec
from training.corpus import Corpus, Overlap
from training.gate import Outcome
from training.recipe import Objective, TuneConfig

HOW = {
    Objective.MIRROR: "Mirror-BERT tuning",
    Objective.SELF_GUIDED: "self-guided tuning (SG-BERT)",
    Objective.COSENT: "tuning on scored pairs (CoSENT)",
    Objective.ANGLE: "tuning on scored pairs (AnglE)",
    Objective.HYBRID: "tuning on its own ranking mixed with BM25",
    Objective.TEACHER: "distillation of another encoder's vectors",
}


def render_card(
    spec: EncoderSpec,
    config: TuneConfig,
    corpus: Corpus,
    steps: int,
    *,
    curve: str,
    before: Report | None,
    after: Report | None,
    overlaps: Sequence[Overlap],
    outcome: Outcome | None,
    choice: str | None,
) -> str:
    """Build the card's text, without front matter; before and after are None without evaluation sets."""
    how = HOW[config.objective]
    text = "scored pairs of texts" if corpus.has_scores else "lines of raw text, no labels"
    if corpus.has_pairs and not corpus.has_scores:
        text = "pairs of texts with the same meaning"
        text += ", some with hard negatives" if any(len(one) > 2 for one in corpus.examples) else ""
    if corpus.has_documents:
        text = "documents of a title and a text, no labels"
    of = f"{len(corpus.examples):,} {text}"
    about = f"A text encoder made from {spec.base_model} by {how}: {of}, {steps} steps."
    fewer = {"numbers": spec.trained_dims, "layers": spec.trained_depths}
    also = "; ".join(f"{', '.join(map(str, numbers))} {what}" for what, numbers in fewer.items() if numbers)
    rows = {
        "vector": f"{spec.dim} numbers, unit length",
        **({"also trained for": f"the first {also}"} if also else {}),
        "pooling": spec.pooling.value,
        "longest text": f"{spec.max_tokens} tokens" + (f" ({config.max_tokens} while tuning)" if steps else ""),
        "recipe": _recipe(config, corpus.has_documents) if steps else "none: the base as it is",
        "corpus": f"sha256 {corpus.sha256}",
    }
    parts = [
        f"# {spec.base_model}, {'mirror-tuned' if steps else 'left as it is'}",
        about if steps else f"The weights of {spec.base_model}, unchanged: no recipe surely helped on {of}.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    if choice is not None:
        parts.append(f"## Which recipe?\n\n{choice}.")
    if outcome is not None:
        parts.append(f"## Did tuning help?\n\n{outcome}. The interval holds 95 % of a paired bootstrap.")
    if before is not None and after is not None:
        parts.append(_results(before, after, overlaps))
    parts += [
        RUN_MARK,
        *([f"![loss]({curve})"] if steps else []),
        "`encoder.json` holds the settings that decide a vector; `train.json` and `metrics.jsonl` record the run.",
    ]
    return "\n\n".join(parts) + "\n"


def _recipe(config: TuneConfig, documents: bool) -> str:
    parts = [
        config.objective.value,
        *([f"last {config.train_layers} layers"] if config.train_layers else []),
        *([f"LoRA of rank {config.lora}, merged"] if config.lora else []),
        f"{config.batch_size} texts a step",
        f"learning rate {config.lr:g} ({config.schedule.value})",
        f"temperature {config.temperature:g}",
        f"dropout {config.dropout:g}",
        f"drophead {config.drophead:g}",
        f"up to {config.repetition:.0%} of tokens repeated",
        f"{config.mask_length} characters masked",
        *([f"views of a document: {', '.join(config.views)}"] if documents else []),
        f"seed {config.seed}",
    ]
    return ", ".join(parts)


def _results(before: Report, after: Report, overlaps: Sequence[Overlap]) -> str:
    change = difference(before, after)
    found = [f"{overlap.share:.1%}" for overlap in overlaps]
    lines = [
        "## Measured",
        "",
        "Spearman × 100 of cosine and human scores, with 95 % intervals of a bootstrap over pairs "
        f"({len(after.results[0].resampled):,} resamples). Aggregation {AGGREGATION}. The last column is the share of "
        "a set's texts in the corpus: if it is large, the value predicts less about other text.",
        "",
        "| set | pairs | before | after | change | in the corpus |",
        "|---|---|---|---|---|---|",
    ]
    for old, new, gain, share in zip(before.results, after.results, change.sets, found, strict=True):
        lines.append(f"| {new.name} | {new.pairs:,} | {old.spearman} | {new.spearman} | {gain:+} | {share} |")
    for group, mean in after.means.items():
        lines.append(f"| mean ({group.value}) | | {before.means[group]} | {mean} | {change.means[group]:+} | |")
    lines += [
        "",
        "Geometry of the vectors, before → after; lower is better, except for IS and (effective) rank:",
        "",
        f"| set | {' | '.join(GEOMETRY)} |",
        f"|---{'|---' * len(GEOMETRY)}|",
    ]
    for old, new in zip(before.results, after.results, strict=True):
        figures = zip(old.geometry, new.geometry, strict=True)
        shown = ["–" if a is None or b is None else f"{a:.3f} → {b:.3f}" for a, b in figures]
        lines.append(f"| {new.name} | {' | '.join(shown)} |")
    return "\n".join(lines)
