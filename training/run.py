"""Run a tuning job: from names and files to a run folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from encoders.families import FAMILIES
from encoders.reference import Reference
from encoders.source import ResolvedEncoder, resolve
from evaluation.served import is_remote
from evaluation.similarity import evaluate
from evaluation.statistics import Verdict
from mirror_runtime.bundle import ENCODER_FILE, Pooling
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.extras import require
from mirror_runtime.folders import os_error_message, whole_folder
from training.augment import Document
from training.batches import check
from training.checkpoint import Checkpoint, Step
from training.corpus import Corpus, measure_lengths, read_corpus
from training.elastic import trained_depths, trained_dims
from training.gate import Gate, Outcome, split_corpus
from training.hardware import Hardware, choose_hardware
from training.hybrid import HybridScores
from training.job import Job, ProbeChoice, RunObserver, Start, Summary
from training.recipe import Objective, Projection
from training.run_folder import CURVE_PACKAGE, Events, open_events, write_run_folder
from training.teacher import add_dense, fit_width, teacher_vectors
from training.trainer import steps_in, train

EVENTS_FOLDER = "tensorboard"

SPARE_BYTES = 32 * 2**20
"""Room for everything in a run folder except weights."""


def tune(job: Job, observer: RunObserver | None = None) -> Summary:
    """Tune an encoder and write its run folder, whole or not at all.

    If a launcher started several processes, each calls this with the same job; only the first writes, evaluates and
    has its progress observed.

    Raises:
        MirrorError: base, corpus, output or settings cannot be used; nothing was written but checkpoints.
    """
    begin = time.perf_counter()
    hardware = choose_hardware(job.config.device, job.config.precision)
    if job.rivals and (job.probe is ProbeChoice.NONE or hardware.processes > 1):
        raise InputError(
            "--recipe auto and --seeds choose by the probe, in one process: drop --probe none and the launcher"
        )
    corpus, gates = read_corpus(job.corpus), []
    if job.probe is not ProbeChoice.NONE:
        corpus, held_out = split_corpus(corpus, 2 if job.rivals else 1)
        only_content = job.probe is ProbeChoice.CONTENT
        gates = [Gate(half, corpus.records, hardware, only_content=only_content) for half in held_out]
    source = _tuned_source(job)
    if not hardware.writes:
        return _tune(job, source, corpus, hardware, None, RunObserver(), begin, [])
    with whole_folder(job.output, overwrite=job.overwrite, marker=ENCODER_FILE) as folder:
        summary = _tune(job, source, corpus, hardware, folder, observer or RunObserver(), begin, gates)
    for checkpoint in filter(None, (_checkpoint(one) for one in _rivals(job))):
        checkpoint.path.unlink(missing_ok=True)
    return dataclasses.replace(summary, seconds=time.perf_counter() - begin)


def _tune(
    job: Job,
    source: ResolvedEncoder,
    corpus: Corpus,
    hardware: Hardware,
    folder: Path | None,
    observer: RunObserver,
    begin: float,
    gates: Sequence[Gate],
) -> Summary:
    base = Reference.load(source)
    if base.tokenizer.mask_token is None:  # a rival that masks would be refused
        job = dataclasses.replace(
            job, rivals={name: dataclasses.replace(one, mask_length=0) for name, one in job.rivals.items()}
        )
    for one in _rivals(job):
        check(base, corpus.examples, one.config, hardware)
        _check_teacher(one)
    if folder is not None:
        require(CURVE_PACKAGE, "train")  # before the work rather than after it
        _check_room(base, job, folder)
    with contextlib.ExitStack() as around:
        around.enter_context(_explained_errors(job.output))
        events = None
        if job.tensorboard and folder is not None:
            events = around.enter_context(open_events(folder / EVENTS_FOLDER))
        trials: dict[str, Outcome] = {}
        if job.rivals:
            tuned = _best(job, base, corpus, hardware, observer, events, gates[0], trials)
        else:
            tuned = _train(job, base, corpus, hardware, observer, events)
        outcome = None
        if gates:  # not earlier: other processes would wait until their collective fails
            gates[-1].before(base)
            outcome = gates[-1].after(tuned.reference)
        steps = tuned.steps
        summary = Summary(
            output=job.output,
            spec=tuned.reference.spec,
            start=tuned.start,
            steps=len(steps),
            tokens=sum(step.tokens for step in steps),
            loss=steps[-1].loss if steps else None,
            train_seconds=steps[-1].seconds if steps else 0.0,
            seconds=time.perf_counter() - begin,
            outcome=outcome,
            trials=trials,
            chosen=tuned.job.trial,
        )
        if folder is None:
            return summary
        if any(job.sets.values()):
            summary = _evaluated(job, source, tuned.reference, summary, observer, events)
        write_run_folder(folder, tuned.job, tuned.reference, summary, steps, source)
    return summary


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A tuned encoder."""

    job: Job
    reference: Reference
    start: Start
    steps: list[Step]


def _rivals(job: Job) -> list[Job]:
    """Return a job for each seed of each rival, or the job alone."""
    if not job.rivals:
        return [job]
    return [
        dataclasses.replace(
            job, config=dataclasses.replace(config, seed=seed), trial=name if job.seeds == 1 else f"{name}.{seed}"
        )
        for name, config in job.rivals.items()
        for seed in range(config.seed, config.seed + job.seeds)
    ]


def _best(
    job: Job,
    base: Reference,
    corpus: Corpus,
    hardware: Hardware,
    observer: RunObserver,
    events: Events | None,
    gate: Gate,
    trials: dict[str, Outcome],
) -> _Tuned:
    """Tune by each rival and return the best, or the base if the gate finds none better; fill `trials`."""
    gate.before(base)
    best, gain, seeds = None, 0.0, list[_Tuned]()
    for rival in _rivals(job):
        seeds.append(_train(rival, base, corpus, hardware, observer, events))
        candidates = seeds[-1:]
        if len(seeds) == job.seeds:
            candidates += [_soup(seeds)] if job.seeds > 1 else []
            seeds = []
        for tuned in candidates:
            trials[str(tuned.job.trial)] = outcome = gate.after(tuned.reference)
            if outcome.verdict is Verdict.BETTER and outcome.gain.value > gain:
                best, gain = tuned, outcome.gain.value
    untouched = dataclasses.replace(tuned.start, steps=0)
    return best or _Tuned(job=job, reference=base, start=untouched, steps=[])


@torch.no_grad()
def _soup(seeds: Sequence[_Tuned]) -> _Tuned:
    """Average the weights of one recipe's seeds (model soup, Wortsman et al. 2022); its steps are those of all."""
    first = seeds[0]
    mixed = dataclasses.replace(
        first.reference, model=copy.deepcopy(first.reference.model), dense=copy.deepcopy(first.reference.dense)
    )
    for place, module in enumerate((mixed.model, *mixed.dense)):
        states = [(one.reference.model, *one.reference.dense)[place].state_dict() for one in seeds]
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name] for state in states]).mean(0))
    steps = list[Step]()
    for one in seeds:
        before = steps[-1].seconds if steps else 0.0
        steps += [
            dataclasses.replace(step, step=len(steps) + i, seconds=before + step.seconds)
            for i, step in enumerate(one.steps, 1)
        ]
    trial = f"{str(first.job.trial).rpartition('.')[0]}.soup"
    return _Tuned(job=dataclasses.replace(first.job, trial=trial), reference=mixed, start=first.start, steps=steps)


def _train(
    job: Job, base: Reference, corpus: Corpus, hardware: Hardware, observer: RunObserver, events: Events | None
) -> _Tuned:
    reference = dataclasses.replace(base, model=copy.deepcopy(base.model), dense=copy.deepcopy(base.dense))
    checkpoint = _checkpoint(job)
    start = _start(job, reference, corpus, hardware, checkpoint)
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if events is not None:
            for name in ("loss", "tokens", "seconds"):
                events.add_scalar("/".join(filter(None, (job.trial, name))), getattr(step, name), step.step)
        observer.on_step(step)

    observer.on_start(start)
    reference, targets = _taught(job, reference, corpus, hardware, observer)
    train(reference, corpus.examples, job.config, hardware, on_step, checkpoint, targets)
    spec = dataclasses.replace(
        reference.spec,
        trained_dims=trained_dims(job.config, reference),
        trained_depths=trained_depths(job.config, reference),
    )
    reference = dataclasses.replace(reference, spec=spec)
    return _Tuned(job=job, reference=reference, start=start, steps=steps)


def _check_teacher(job: Job) -> None:
    if job.teacher is None and job.config.objective is Objective.TEACHER:
        raise InputError("--objective teacher learns from another encoder: name it with --teacher")
    if job.teacher is not None and job.config.objective is not Objective.TEACHER:
        raise InputError(f"--objective {job.config.objective.value} has no teacher: drop --teacher or --objective")
    if job.teacher is not None and job.checkpoint_every and is_remote(job.teacher):
        raise InputError(
            f"--checkpoint-every cannot resume with the teacher {job.teacher}: what serves it may change, so its "
            "vectors are not kept. Pass a folder or bundle as teacher, or drop --checkpoint-every"
        )


def _taught(
    job: Job, reference: Reference, corpus: Corpus, hardware: Hardware, observer: RunObserver
) -> tuple[Reference, torch.Tensor | HybridScores | None]:
    """Return the encoder to tune, with a dense layer to a teacher's width if one is to be trained, and its targets."""
    if job.config.objective is Objective.HYBRID:
        documents = [one for one in corpus.examples if isinstance(one, Document)]
        with hardware.autocast():
            return reference, HybridScores(reference, documents, job.config.max_tokens)
    if job.teacher is None:
        return reference, None
    targets = teacher_vectors(
        job.teacher, corpus.texts, hardware, lambda done, total: observer.on_progress("teacher", done, total)
    )
    width = targets.shape[1]
    if job.config.projection is Projection.DENSE and width != reference.spec.dim:
        return add_dense(reference, width, job.config.seed), targets
    return reference, fit_width(targets, reference.spec.dim)


def _start(job: Job, reference: Reference, corpus: Corpus, hardware: Hardware, checkpoint: Checkpoint | None) -> Start:
    sets = [(one.name, one.texts) for members in job.sets.values() for one in members]
    return Start(
        corpus=corpus,
        lengths=measure_lengths(corpus, reference.tokenizer, job.config.max_tokens),
        overlaps=corpus.overlap_with(sets),
        hardware=hardware,
        steps=steps_in(len(corpus.examples), job.config),
        trial=job.trial,
        checkpoint=checkpoint.path if checkpoint and checkpoint.path.is_file() else None,
    )


def _evaluated(
    job: Job, source: ResolvedEncoder, tuned: Reference, summary: Summary, observer: RunObserver, events: Events | None
) -> Summary:
    """Add the evaluation of base and result. The base is loaded again: earlier, other processes would wait for it."""
    before, after = (
        evaluate(
            reference.encode_unnormalized,
            job.sets,
            spec=reference.spec,
            name=name,
            on_progress=lambda done, total, name=name: observer.on_progress(name, done, total),  # type: ignore[misc]
        )
        for name, reference in (("before", Reference.load(source)), ("after", tuned))
    )
    if events is not None:
        for result in after.results:
            events.add_scalar(f"spearman/{result.name}", result.spearman.value, summary.steps)
    return dataclasses.replace(summary, before=before, after=after)


def _checkpoint(job: Job) -> Checkpoint | None:
    """Return where a run keeps its state: beside the output folder, which does not exist before the end."""
    if job.checkpoint_every is None:
        return None
    output = job.output.absolute()
    name = ".".join(filter(None, (output.name, job.trial, "checkpoint")))
    return Checkpoint(path=output.with_name(f".{name}"), every=job.checkpoint_every)


def _check_room(reference: Reference, job: Job, folder: Path) -> None:
    """Check before the first step that the result fits on the disk.

    A checkpoint holds the weights and two moments of each.
    """
    weights = 4 * sum(value.numel() for value in reference.model.state_dict().values())
    needed = weights + SPARE_BYTES + (3 * weights * len(_rivals(job)) if job.checkpoint_every else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{job.output} needs about {needed / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB left: "
            "free some space, or choose another --output"
        )


@contextlib.contextmanager
def _explained_errors(output: Path) -> Iterator[None]:
    """Turn full disks and full device memory into errors that name the cure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output} cannot be written: {os_error_message(error)}. Nothing was left there") from error
    except torch.OutOfMemoryError as error:
        raise EngineError("the device's memory is full: set --micro-batch-tokens, for example to 8192") from error


def _tuned_source(job: Job) -> ResolvedEncoder:
    """Resolve the base with the tuned encoder's spec: unit vectors, and the base's own limit on length.

    The recipe's `max_tokens` limits texts while tuning; the tuned encoder still reads as many tokens as its base. Only
    `mean_padded` couples the two: its vector depends on the padded length.
    """
    limit = max(one.config.max_tokens for one in _rivals(job))
    source = resolve(job.base, revision=job.revision, pooling=job.pooling, normalize=True)
    spec = source.spec
    if FAMILIES[spec.family].is_static:
        raise InputError(f"{job.base} is a static encoder, which has no layers to tune: export it as it is")
    if limit > spec.max_tokens:
        raise InputError(f"--max-tokens is {limit}, but {job.base} reads at most {spec.max_tokens} tokens: lower it")
    if spec.pooling is Pooling.MEAN_PADDED and not (source.folder / ENCODER_FILE).is_file():
        spec = dataclasses.replace(spec, max_tokens=limit, pad_to=limit)
    return dataclasses.replace(source, spec=spec)
