"""Build a front: make the candidates, measure them, choose one, and write what was found."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from encoders.families import FAMILIES
from encoders.sentence_transformers import read_json
from encoders.source import ResolvedEncoder, resolve
from encoders.supported import CUTTABLE
from evaluation.held_out import first_by_hash, text_hash
from evaluation.probes import CONTENT, MIN_ITEMS, MIN_WORDS, build_probes
from evaluation.retrieval import Retrieval
from evaluation.sets import EvaluationSet
from export.tradeoff.candidates import ENCODER, Candidate, Kind, candidates
from export.tradeoff.choose import Row, choose
from export.tradeoff.make import (
    CandidateError,
    Made,
    Place,
    Run,
    digest_of,
    keep,
    kept,
    make,
    peak_child_memory_bytes,
    run_script,
)
from export.tradeoff.measure import ROUNDS, Judge, Point, Quality, Speed, Tasks, measure_speeds, points_of
from export.tradeoff.report import Front, draw, page, records
from mirror_runtime.bundle import MANIFEST_FILE, TOKENIZER_FILE, Precision, sha256_texts
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import BundleError, InputError, MirrorError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, replace_file, whole_folder
from mirror_runtime.host import cpu_flags, cpu_model, has_bf16, peak_memory_bytes, usable_cores
from mirror_runtime.plan import installed_versions
from mirror_runtime.triton.repository.render import link_or_copy
from training.own import held_out_hashes

PAGE_FILE, PICTURE_FILE, RECORDS_FILE = "report.md", "front.png", "front.json"
CANDIDATES, MEASURED, CHOSEN = "candidates", "measured", "chosen"
"""Folders of the output."""

SHARE, FEWEST, MOST = 0.1, 200, 1000
"""Share of the distinct texts that is held out, and its limits, where the encoder's own run held out none of them."""

CALIBRATION, SAMPLE = 300, 1000
"""Texts for the scales of int8, and for neighbours and cosines."""

SPEED_TEXTS, SPEED_CHARACTERS = 1024, 60_000
"""Texts encoded together in each round, and about how long they are together."""

PROBES = (CONTENT, "halves")
"""Of the probes those that rank encoders as labelled sets do (docs/how-to/evaluate.md)."""

OnProgress = Callable[[str, int, int, str], None]
"""Called with a stage, the steps of it that are done, their number, and what is being done."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare, and where to."""

    encoder: str
    texts: tuple[str, ...]  # distinct, one line each
    output: Path
    kinds: tuple[Kind, ...] = tuple(Kind)
    students: tuple[str, ...] = ()  # smaller encoders that learn from the encoder
    sets: tuple[EvaluationSet, ...] = ()
    collections: tuple[Retrieval, ...] = ()
    max_loss: float | None = None  # see `choose`
    min_speed: float | None = None


def build(request: Request, on_progress: OnProgress = lambda *_: None, run: Run = run_script) -> Front:
    """Make and measure what is not there yet, and write the report, the picture, the records and the chosen bundle.

    Raises:
        InputError: the texts are too few, the output is something else's, or no candidate is within the limits; in the
            last case the report is written.
        MirrorError: the encoder itself cannot be exported or measured.
    """
    began, output = time.perf_counter(), request.output.absolute()
    source, *bases = map(_resolve, (request.encoder, *request.students))
    require("matplotlib", "train")  # before the work rather than after it
    held_out = _held_out(request)
    tasks = _tasks(request, held_out)
    used = output.exists() and (output.is_file() or any(output.iterdir()))
    if used and not (output / CANDIDATES).is_dir():
        raise InputError(f"{output} holds something else: choose another --output")
    failed: dict[str, str] = {}
    with locked_folder(output):
        (output / CANDIDATES).mkdir(exist_ok=True)
        places = _places(request, (source, *bases), held_out, output)
        table = candidates(
            request.kinds,
            layers=_layers(source),
            dim=source.spec.dim,
            bf16=has_bf16(),
            cuttable=read_json(source.folder / TOKENIZER_FILE, dict)["model"]["type"] in CUTTABLE,
            trained_dims=source.spec.trained_dims,
            trained_depths=source.spec.trained_depths,
            students=len(request.students),
        )
        made = _make(table, output / CANDIDATES, places, failed, on_progress, run)
        qualities = _judge(made, tasks, output / MEASURED, failed, on_progress)
        texts = _speed_texts(held_out)
        speeds = _time([point for point, _ in qualities], texts, output / MEASURED, failed, on_progress)
        facts = {
            "texts": len(request.texts),
            "held_out": len(held_out),
            "speed_texts": len(texts),
            "rounds": ROUNDS,
            "cores": usable_cores(),
            "cpu": cpu_model(),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_mb": round(peak_memory_bytes() / 1e6),
            "peak_child_memory_mb": round(peak_child_memory_bytes() / 1e6),
        }
        front = Front(encoder=source.spec.base_model, rows=_rows(qualities, speeds), failed=failed, facts=facts)
        return _write(front, request, output)


def _resolve(encoder: str) -> ResolvedEncoder:
    try:
        found = resolve(encoder, text_vectors=False)
    except BundleError as error:
        raise InputError(f"{encoder} must be an encoder that records its pooling: {error}") from error
    if found.spec.scores_pairs or found.spec.per_token:
        what = "is a reranker with scores of pairs" if found.spec.scores_pairs else "has vectors of tokens"
        raise InputError(f"{encoder} {what}, and none of texts to compare: pass an encoder")
    return found


def _held_out(request: Request) -> list[str]:
    """Return the texts to measure on: what the encoder's run held out of them, if it learnt from their like."""
    hashes = held_out_hashes([request.encoder])
    own = first_by_hash((text for text in request.texts if text_hash(text) in hashes), MOST)
    count = min(MOST, max(FEWEST, round(SHARE * len(request.texts))))
    return own if len(own) >= MIN_ITEMS else first_by_hash(request.texts, count)


def _layers(source: ResolvedEncoder) -> int:
    """Return the number of layers, under whatever key the family's configuration has it; 0 of a static encoder."""
    if FAMILIES[source.spec.family].is_static:
        return 0
    config = read_json(source.folder / "config.json", dict)
    return next(int(config[key]) for key in ("num_hidden_layers", "n_layers", "num_layers") if key in config)


def _tasks(request: Request, held_out: Sequence[str]) -> Tasks:
    probes = build_probes([(text,) for text in held_out], [(text,) for text in request.texts])
    by_name = {probe.name: probe for probe in probes}
    if CONTENT not in by_name:
        raise InputError(
            f"too few of the {len(held_out)} held-out texts (of {len(request.texts)}) have {MIN_WORDS} words or more, "
            "both rare and common ones, which the probe needs: pass more text"
        )
    return Tasks(
        probes=tuple(by_name[name] for name in PROBES if name in by_name),
        sample=tuple(first_by_hash(request.texts, SAMPLE)),
        sets=request.sets,
        collections=request.collections,
    )


def _places(
    request: Request, sources: Sequence[ResolvedEncoder], held_out: Sequence[str], output: Path
) -> dict[str, Place]:
    """Write the texts for training, and describe what candidates are made from."""
    kept_back = set(held_out)
    rest = [text for text in request.texts if text not in kept_back]
    if not rest:
        raise InputError(f"{len(request.texts)} texts are too few to hold {FEWEST} out: pass 2,000 or more")
    found = {}
    for name, texts in {"corpus": rest, "calibration": rest[:: -(-len(rest) // CALIBRATION)]}.items():
        path = output / "texts" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as beside:
            beside.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        found[name] = Place(str(path), sha256_texts(texts))
    for number, (name, source) in enumerate(zip((request.encoder, *request.students), sources, strict=True)):
        folder = Path(name).expanduser()
        place = Place(str(folder.absolute()) if folder.is_dir() else name, digest_of(source.identity))
        found[f"base-{number}" if number else "source"] = place
    return found


def _make(
    table: Sequence[Candidate],
    output: Path,
    places: dict[str, Place],
    failed: dict[str, str],
    on_progress: OnProgress,
    run: Run,
) -> list[Made]:
    """Make candidates; a failed one is left out, with its reason in `failed`, and so are those that need it."""
    found = []
    for done, candidate in enumerate(table):

        def show(line: str = "", done: int = done, name: str = candidate.name) -> None:
            on_progress("making", done, len(table), f"{name}: {line}" if line else name)

        show()
        try:
            one = make(candidate, output, places, show, run)
        except CandidateError as error:
            if candidate.name == ENCODER:
                raise
            failed[candidate.name] = str(error)
        else:
            places[candidate.name] = Place(str(one.folder), one.digest)
            found.append(one)
    on_progress("making", len(table), len(table), "")
    return found


def _judge(
    made: Sequence[Made], tasks: Tasks, output: Path, failed: dict[str, str], on_progress: OnProgress
) -> list[tuple[Point, Quality]]:
    """Measure what the points' vectors are worth; those that share an encoder together."""
    judge: Judge | None = None
    groups: dict[str, list[Point]] = {}
    for one in made:
        points, lacking = points_of(one)
        for point in points:
            groups.setdefault(point.engine_key, []).append(point)
        for precision in lacking:
            reasons = [why for name, why in one.record.refused.items() if precision.value in name]
            failed[f"{one.candidate.name} {precision.value}"] = "; ".join(reasons) or "is not in its bundle"
    found: list[tuple[Point, Quality]] = []
    for done, (key, points) in enumerate(groups.items()):
        on_progress("comparing", done, len(groups), key)
        path = output / f"{key.replace(' ', '-')}.json"
        inputs = (made[0].digest, points[0].made.digest, [point.dimensions for point in points], tasks.digest)
        digest = digest_of(inputs, _machine())
        values = kept(tuple[Quality, ...], path, digest)
        if values is None or len(values) != len(points):
            try:
                if judge is None:
                    with Point(made=made[0], precision=Precision.FP32).load() as encoder:
                        judge = Judge(tasks, encoder)
                with points[0].load() as encoder:
                    values = tuple(judge.judge(points, encoder))
            except MirrorError as error:
                if points[0].made is made[0]:
                    raise
                failed[key] = str(error)
                continue
            keep(path, digest, values)
        found += zip(points, values, strict=True)
    on_progress("comparing", len(groups), len(groups), "")
    return found


def _time(
    points: Sequence[Point], texts: Sequence[str], output: Path, failed: dict[str, str], on_progress: OnProgress
) -> dict[str, Speed]:
    """Measure all encoders in one interleaved run; an earlier run's figures count if it had the same ones."""
    first = {point.engine_key: point for point in reversed(points)}
    identity = [[key, point.made.digest] for key, point in sorted(first.items())]
    digest = digest_of(identity, sha256_texts(texts), _machine(), ROUNDS)
    path = output / "speeds.json"
    values: dict[str, Speed] | None = kept(Mapping[str, Speed], path, digest)
    if values is None or values.keys() != first.keys():
        with ExitStack() as around:
            opened: dict[str, Encoder] = {}
            for key in dict.fromkeys(point.engine_key for point in points):
                on_progress("timing", 0, ROUNDS, f"loading {key}")
                try:
                    opened[key] = around.enter_context(first[key].load())
                except MirrorError as error:
                    if first[key].made.candidate.name == ENCODER:
                        raise
                    failed[key] = str(error)
            values = measure_speeds(
                {key: encoder.encode for key, encoder in opened.items()},
                texts,
                lambda done: on_progress("timing", done, ROUNDS, f"{len(opened)} in turns"),
            )
        if len(values) == len(first):
            keep(path, digest, values)
    return values


def _machine() -> list[Any]:
    """Return what figures depend on besides bundles and texts."""
    return [installed_versions(), cpu_model(), sorted(cpu_flags()), usable_cores()]


def _rows(qualities: Sequence[tuple[Point, Quality]], speeds: dict[str, Speed]) -> tuple[Row, ...]:
    own = {point.engine_key for point, _ in qualities if point.made.candidate.name == ENCODER}
    best = max((speed for key, speed in speeds.items() if key in own), key=lambda speed: speed.texts_per_s)
    rows = [
        Row(point=point, quality=quality, speed=speed, ratio=speed.over(best))
        for point, quality in qualities
        if (speed := speeds.get(point.engine_key))
    ]
    return tuple(sorted(rows, key=lambda row: -row.speed.texts_per_s))


def _speed_texts(held_out: Sequence[str]) -> list[str]:
    count = round(SPEED_CHARACTERS * len(held_out) / sum(map(len, held_out)))
    return list(held_out[: max(1, min(SPEED_TEXTS, count))])


def _write(front: Front, request: Request, output: Path) -> Front:
    """Write all files; a choice that no candidate fits is an error after the report is written."""
    problem = None
    if request.max_loss is not None or request.min_speed is not None:
        try:
            front = replace(front, choice=choose(front.rows, request.max_loss, request.min_speed))
        except InputError as error:
            problem = InputError(f"{error}. All are in {output / PAGE_FILE}")
    for name, text in ((PAGE_FILE, page(front)), (RECORDS_FILE, json.dumps(records(front), indent=1) + "\n")):
        with replace_file(output / name) as beside:
            beside.write_text(text, encoding="utf-8")
    with replace_file(output / PICTURE_FILE) as beside:
        draw(front).savefig(beside, format="png", dpi=120)
    if front.choice is None and (output / CHOSEN).exists():
        shutil.rmtree(output / CHOSEN)  # an earlier run's
    if problem is not None:
        raise problem
    if front.choice is not None:
        with whole_folder(output / CHOSEN, overwrite=True, marker=MANIFEST_FILE) as folder:
            shutil.copytree(front.choice[0].point.made.bundle, folder, copy_function=link_or_copy, dirs_exist_ok=True)
    return front
