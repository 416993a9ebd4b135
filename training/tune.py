"""Tune a masked language model into a text encoder, from raw text, labels or a teacher: the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from evaluation.statistics import Verdict
from mirror_runtime.cli.options import PoolingOption, RevisionOption
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError
from training.augment import MaskViews
from training.corpus import CorpusRequest, Overlap
from training.documents import View
from training.evaluate import load_sets, show
from training.job import Job, ProbeChoice, RunObserver, Start, Summary
from training.labels import Labels
from training.recipe import (
    IMPLIED,
    RECIPES,
    RIVALS,
    Device,
    Objective,
    Projection,
    Recipe,
    Schedule,
    TuneConfig,
    TunePrecision,
    Variant,
)

if TYPE_CHECKING:
    from training.checkpoint import Step

WORSE_STATUS = 3
"""Exit status of a run whose encoder is worse than its base."""

MASKS = ("mask_length", "mask_views", "reference_masking", "repetition")
"""Settings of the views of one text."""

LISTS = ("--corpus", "--column", "--exclude", "--sts", "--words", "--matryoshka", "--depths")


def _default(name: str) -> str:
    """Format a setting's default in the sentence recipe, and in each recipe that differs from it."""
    defaults = {recipe: _format(getattr(config, name)) for recipe, config in RECIPES.items()}
    usual = defaults[Recipe.SENTENCE]
    others = [f"{recipe.value} {value}" for recipe, value in defaults.items() if value != usual]
    return f"({'; '.join([usual, *others])})"


def _format(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no" if value is False else "none"
    if isinstance(value, tuple):
        return " ".join(map(_format, value)) or "none"
    return str(value.value) if isinstance(value, Enum) else f"{value:g}" if isinstance(value, float) else str(value)


def _setting(name: str, help_text: str) -> Any:
    return typer.Option(help=f"{help_text} {_default(name)}", rich_help_panel="Recipe")


def command(
    *,
    base: Annotated[str, typer.Option(help="Folder or hub name of a masked language model or encoder.")],
    corpus: Annotated[
        list[str],
        typer.Option(
            help="UTF-8 text (one sentence, phrase or word a line), .csv, .tsv, .jsonl, .json, any with .gz or .zst, "
            ".parquet, folders, patterns, or a data set: hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT. Several are "
            "concatenated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Run folder to write.")],
    pooling: PoolingOption = None,
    revision: RevisionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder, at the end.")] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two checkpoints beside the output. After a kill, the same command resumes from the "
            "last one: with 20, from step 20 or 40 of 50. (none)"
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files into OUTPUT/tensorboard.")
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Each line is `text1<TAB>text2`, texts with the same meaning.", rich_help_panel="Corpus"
        ),
    ] = False,
    scored_pairs: Annotated[
        bool,
        typer.Option(
            "--scored-pairs",
            help="The files have columns score, sentence1 and sentence2; 5,749 pairs at 64 are 89 steps an epoch.",
            rich_help_panel="Corpus",
        ),
    ] = False,
    triplets: Annotated[
        bool,
        typer.Option(
            "--triplets",
            help="The files have columns anchor, positive and negative (in .jsonl also a list), or those that --column "
            "names, such as anchor positive negative_1 negative_2: each negative is one for all texts of a step.",
            rich_help_panel="Corpus",
        ),
    ] = False,
    entailment: Annotated[
        bool,
        typer.Option(
            "--entailment",
            help="The files have columns label, sentence1 and sentence2. What a text entails is its positive, what "
            "contradicts it a negative, and neutral is left out.",
            rich_help_panel="Corpus",
        ),
    ] = False,
    documents: Annotated[
        bool,
        typer.Option(
            "--documents",
            help="Documents with a title and a text: two columns; Markdown, one under each heading; or blocks of lines "
            "between blank lines. Without a title, the first sentence is in its place. A folder stands for its .md, "
            ".rst and .txt files.",
            rich_help_panel="Corpus",
        ),
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="To read from files with columns. (text; with --pairs text1 text2; with labels as said there)",
            rich_help_panel="Corpus",
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            help="Number of distinct lines to draw with --seed, such as 10000. (all)", rich_help_panel="Corpus"
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation sets or files of lines. Their texts are left out, ignoring case and punctuation.",
            rich_help_panel="Corpus",
        ),
    ] = None,
    sts: Annotated[
        list[str] | None,
        typer.Option(help="Sentence similarity sets, measured before and after.", rich_help_panel="Evaluation"),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(help="Word similarity sets, measured before and after.", rich_help_panel="Evaluation"),
    ] = None,
    probe: Annotated[
        ProbeChoice,
        typer.Option(
            help="auto holds out 5 % of the texts (100 to 400), measures a probe on them before and after, and ends "
            "with status 3 if the tuned encoder is worse; content is the probe of lines on any texts; none tunes "
            "unmeasured on all texts.",
            rich_help_panel="Evaluation",
        ),
    ] = ProbeChoice.AUTO,
    accept_worse: Annotated[
        bool,
        typer.Option(
            "--accept-worse", help="End with status 0 even if the probe is worse.", rich_help_panel="Evaluation"
        ),
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tune so often, with --seed and the next ones, and keep the best of them, of the average of their "
            "weights, or of the base, by the probe on texts of its own.",
            rich_help_panel="Recipe",
        ),
    ] = 1,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            help="Defaults of the options below. (sentence; scored with --scored-pairs; teacher with --teacher; "
            "self-guided with --objective self-guided)",
            rich_help_panel="Recipe",
        ),
    ] = None,
    objective: Annotated[Objective | None, _setting("objective", "Loss to minimise.")] = None,
    variant: Annotated[Variant | None, _setting("variant", "Form of the self-guided objective.")] = None,
    drift: Annotated[
        float | None, _setting("drift", "Of the self-guided objective: weight of the distance to the base's weights.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Encoder whose vectors are learnt from text alone: a folder, a bundle, or what evaluate.py takes. "
            "Encodes the corpus once, and keeps the vectors in the user's cache: 20,000 of 768 numbers are 61 MB.",
            rich_help_panel="Recipe",
        ),
    ] = None,
    projection: Annotated[
        Projection | None,
        _setting(
            "projection",
            "If the teacher's vectors are wider: pca cuts 768 numbers to the student's 384, dense gives the student a "
            "layer from 384 to 768.",
        ),
    ] = None,
    matryoshka: Annotated[
        list[int] | None,
        _setting(
            "matryoshka",
            "Train for the first N components of a vector too: with 64 128, 384 numbers may be cut to 64 or 128.",
        ),
    ] = None,
    depths: Annotated[
        list[int] | None,
        _setting(
            "depths",
            "Train for the first N layers too: with 2 4, to_onnx.py --depth 2 exports one without the last 4 of 6.",
        ),
    ] = None,
    train_layers: Annotated[
        int | None,
        _setting(
            "train_layers",
            "Tune only so many last layers: with 2 of 6, four run without gradient and dropout (saving not measured).",
        ),
    ] = None,
    lora: Annotated[
        int | None,
        _setting(
            "lora",
            "Tune additions of this rank in place of weights, and merge them at the end: 16 are 2.9 % of MiniLM's "
            "parameters. For few steps: at 1e-3, 6 steps of 200 were ahead of 44 of mirror+, and 44 were behind it.",
        ),
    ] = None,
    seed: Annotated[int | None, _setting("seed", "Seed of shuffling, masks, dropout and --sample.")] = None,
    epochs: Annotated[int | None, _setting("epochs", "Passes over the corpus.")] = None,
    batch_size: Annotated[
        int | None, _setting("batch_size", "Texts a step, over all processes: 10,000 lines at 200 are 50 steps.")
    ] = None,
    lr: Annotated[float | None, _setting("lr", "Maximum learning rate of AdamW.")] = None,
    schedule: Annotated[Schedule | None, _setting("schedule", "Learning rate after warm-up.")] = None,
    warmup: Annotated[
        float | None, _setting("warmup", "Share of the steps over which the learning rate rises: 0.1 of 50 are 5.")
    ] = None,
    beta2: Annotated[float | None, _setting("beta2", "Beta2 of AdamW.")] = None,
    weight_decay: Annotated[float | None, _setting("weight_decay", "Of AdamW, on every parameter.")] = None,
    clip: Annotated[float | None, _setting("clip", "Maximum norm of a step's gradient.")] = None,
    temperature: Annotated[float | None, _setting("temperature", "Divides the cosine.")] = None,
    views: Annotated[
        list[View] | None,
        _setting("views", "How a document is learnt; of several, one is drawn for each document and epoch."),
    ] = None,
    mask_length: Annotated[
        int | None, _setting("mask_length", "Masked characters in a view of 30 or more; 0 for none.")
    ] = None,
    mask_views: Annotated[MaskViews | None, _setting("mask_views", "Which views are masked.")] = None,
    reference_masking: Annotated[
        bool | None, _setting("reference_masking", "Mask exactly like the published code, including its quirks.")
    ] = None,
    repetition: Annotated[
        float | None,
        _setting("repetition", "Maximum share of its tokens that the second view repeats: 3 of 10 with 0.3."),
    ] = None,
    dropout: Annotated[float | None, _setting("dropout", "Dropout everywhere in the model.")] = None,
    drophead: Annotated[
        float | None,
        _setting("drophead", "Probability that an attention head is dropped for a text; with --dropout 0."),
    ] = None,
    max_tokens: Annotated[
        int | None, _setting("max_tokens", "Longest text while tuning, including special tokens.")
    ] = None,
    micro_batch_tokens: Annotated[
        int | None,
        _setting(
            "micro_batch_tokens",
            "Slots that go through the model at once, which bounds memory: of 400 texts in about 100 rows of 64, 4096 "
            "slots are 64 rows.",
        ),
    ] = None,
    precision: Annotated[TunePrecision | None, _setting("precision", "auto is bf16 if the device supports it.")] = None,
    device: Annotated[Device | None, _setting("device", "auto is the NVIDIA GPU if PyTorch finds one.")] = None,
) -> None:
    """Tune a masked language model into a text encoder: from raw text (Mirror-BERT, SG-BERT), labels or a teacher.

    Writes a folder that sentence-transformers loads and that records its pooling (encoder.json). Defaults are in
    parentheses: the sentence recipe's, then those of recipes that differ. The last line of stdout is one JSON object.
    """
    options = locals()
    kinds = {Labels.SCORES: scored_pairs, Labels.TRIPLETS: triplets, Labels.ENTAILMENT: entailment}
    labels = [kind for kind, chosen in kinds.items() if chosen]
    if len(labels) + pairs > 1:
        raise InputError("--pairs, --scored-pairs, --triplets and --entailment exclude each other: pass one of them")
    for clash, message in (
        (documents and teacher, "--teacher is learnt from single texts, not from --documents: pass lines, or drop one"),
        (recipe is Recipe.AUTO and (labels or teacher), "--recipe auto has no recipe for labels or a teacher: drop it"),
    ):
        if clash:
            raise InputError(message)
    if recipe is None and documents and objective in (None, Objective.MIRROR):
        recipe = Recipe.DOCUMENTS
    if recipe is None:
        implied = Objective.TEACHER if teacher else Objective.COSENT if scored_pairs else Objective.MIRROR
        recipe = IMPLIED[objective or implied]
    options |= {name: tuple(options[name] or ()) or None for name in ("views", "matryoshka", "depths")}
    changes = {f.name: options[f.name] for f in dataclasses.fields(TuneConfig) if options[f.name] is not None}
    rivals = RIVALS[documents] if recipe is Recipe.AUTO else {recipe.value: RECIPES[recipe]}
    rivals = {name: dataclasses.replace(rival, **changes) for name, rival in rivals.items()}
    config = next(iter(rivals.values()))
    _check_options(changes, config.objective, documents, bool(pairs or labels))
    job = Job(
        base=base,
        revision=revision,
        pooling=pooling,
        corpus=CorpusRequest(
            files=tuple(corpus),
            pairs=pairs,
            documents=documents,
            labels=labels[0] if labels else None,
            columns=tuple(column or ()),
            sample=sample,
            seed=config.seed,
            exclude=tuple(exclude or ()),
        ),
        teacher=teacher,
        output=output,
        overwrite=overwrite,
        config=config,
        rivals=rivals if recipe is Recipe.AUTO or seeds > 1 else {},
        seeds=seeds,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        sets=load_sets(sts or [], words or []) if sts or words else {},
        probe=probe,
    )
    summary = _run(job, Console(stderr=True, markup=False))
    if summary.start.hardware.writes:
        sys.stdout.write(json.dumps(summary.to_json(), ensure_ascii=False) + "\n")
    if summary.outcome is not None and summary.outcome.verdict is Verdict.WORSE and not accept_worse:
        sys.stderr.write("Keep the base, or pass --accept-worse\n")
        raise typer.Exit(WORSE_STATUS)


def _check_options(changes: Mapping[str, Any], objective: Objective, documents: bool, pairs: bool) -> None:
    """Check that no setting is given which the run would ignore."""
    single = objective is Objective.MIRROR and not pairs
    for names, used, needs in (
        (("views",), documents, "--documents"),
        (("projection",), objective is Objective.TEACHER, "--teacher"),
        (("variant", "drift"), objective is Objective.SELF_GUIDED, "--objective self-guided"),
        (MASKS, single, "--objective mirror, and lines or documents without labels"),
    ):
        for name in names if not used else ():
            if name in changes:
                raise InputError(f"--{name.replace('_', '-')} would change nothing: it needs {needs}. Leave it out")


class _Display(RunObserver):
    """Shows a run on a terminal: the corpus, and progress bars with the remaining time."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def on_start(self, start: Start) -> None:
        if "tuning" not in self.tasks:  # of several rivals, the corpus is described once
            self._describe(start)
        if start.checkpoint is not None:
            self.progress.console.print(f"resuming from {start.checkpoint}", soft_wrap=True)
        name = f"tuning ({start.trial})" if start.trial else "tuning"
        self.tasks["tuning"] = self.progress.add_task(name, total=start.steps, note="")

    def _describe(self, start: Start) -> None:
        corpus, lengths, hardware = start.corpus, start.lengths, start.hardware
        left_out = [f"{corpus.counts['duplicates']:,} duplicates", f"{corpus.counts['empty']:,} empty lines"]
        if corpus.overlaps:
            left_out.append(f"{corpus.counts['excluded']:,} with evaluation texts")
        show = self.progress.console.print
        drawn = f", {len(corpus.examples):,} of them drawn" if corpus.sampled_from else ""
        show(
            f"{corpus.sampled_from or len(corpus.examples):,} distinct {corpus.unit}s "
            f"({' and '.join([', '.join(left_out[:-1]), left_out[-1]])} left out){drawn}, {start.steps} steps on "
            f"{hardware.device.value} in {hardware.precision.value}"
            + (f" by {hardware.processes} processes" if hardware.processes > 1 else "")
        )
        show(
            f"tokens a text: median {lengths.p50}, 95 % up to {lengths.p95}, longest {lengths.max}; "
            f"{lengths.over:.1%} are longer than --max-tokens {lengths.max_tokens} and are truncated"
        )
        for overlap in corpus.overlaps:
            show(f"left out: {_overlap(overlap)}")
        for overlap in start.overlaps:
            show(f"in the corpus: {_overlap(overlap)}")

    def on_step(self, step: Step) -> None:
        self.progress.update(self.tasks["tuning"], completed=step.step, note=f"loss {step.loss:.4f}")

    def on_progress(self, encoder: str, done: int, total: int) -> None:
        if encoder not in self.tasks:
            what = "encoding by the teacher" if encoder == "teacher" else f"evaluating {encoder}"
            self.tasks[encoder] = self.progress.add_task(what, total=total, note="")
        self.progress.update(self.tasks[encoder], completed=done)


def _overlap(overlap: Overlap) -> str:
    return f"{overlap.found:,} of {overlap.texts:,} texts of {overlap.file} ({overlap.share:.1%})"


def _run(job: Job, console: Console) -> Summary:
    from training.run import tune

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        summary = tune(job, _Display(progress))
    if not summary.start.hardware.writes:
        return summary
    if summary.before is not None and summary.after is not None:
        show([summary.before, summary.after], console)
    console.print(
        (
            f"{summary.steps} steps in {summary.train_seconds:.1f} s "
            f"({summary.tokens / summary.train_seconds:,.0f} tokens/s), last loss {summary.loss:.4f}, "
            if summary.steps
            else ""
        )
        + f"{summary.seconds:.1f} s in all. Wrote {summary.output}",
        soft_wrap=True,
    )
    if summary.trials:
        console.print(summary.choice, soft_wrap=True)
    if summary.outcome is not None:
        console.print(str(summary.outcome), soft_wrap=True)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 if the input cannot be used, 3 if the result is worse."""
    lists = {**dict.fromkeys(LISTS), "--views": [view.value for view in View]}
    return run_command(application(command), argv, "tune.py", lists=lists)


if __name__ == "__main__":
    sys.exit(main())
