"""Encode a corpus on many processes or machines: Ray Data distributes shards, workers encode them.

The output is a folder of Parquet files, one per shard, whose names sort in the corpus's order. During a run it is
called `OUT.partial`; after a kill, the next run encodes the missing shards only. Every machine must see the bundle, the
corpus and the output under the same paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import read_manifest
from mirror_runtime.corpus.corpus import BadTexts, Corpus, Shard, check_errors
from mirror_runtime.corpus.encode_file import EncodeProgress, encode_rows
from mirror_runtime.corpus.results import Window
from mirror_runtime.corpus.sinks import vector_table
from mirror_runtime.encoded import check_text_vectors
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import EngineError, InputError, MirrorError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, replace_file
from mirror_runtime.strict_json import read_object

SHARD_ROWS = 65_536
"""Rows per shard: a minute's work of a slow machine, which is the most that a kill can cost."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every worker needs to know."""

    bundle: Path
    source: Corpus
    folder: Path  # where the shards' files go
    load_options: Mapping[str, Any]  # further arguments of `Encoder.load`
    bad_texts: BadTexts


class ShardWorker:
    """One process of the pool: it loads the encoder once and writes one file per shard."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self._encoder = Encoder.load(job.bundle, **job.load_options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Encode one shard, which is a Ray batch of one row, and return its counts and the problem, if any.

        A problem is returned, not raised, because Ray would wrap it and log tracebacks of its own.
        """
        shard = Shard(**{name: int(values[0]) for name, values in batch.items()})
        problem, kind = "", ""
        progress = EncodeProgress()
        try:
            progress = self._encode(shard)
        except MirrorError as error:
            problem, kind = str(error), "input" if isinstance(error, InputError) else "engine"
        return {name: [value] for name, value in {**asdict(progress), "problem": problem, "kind": kind}.items()}

    def _encode(self, shard: Shard) -> EncodeProgress:
        job = self._job
        truncated, failed = 0, 0
        with (
            # Ray may run a shard twice at once, after it lost contact with a worker.
            replace_file(shard_path(job.folder, shard), shared=True) as beside,
            vector_table(beside, self._encoder.spec) as append,
        ):
            for rows, window in encode_rows(self._encoder, job.source.rows(shard)):
                check_errors(rows, window.errors, job.bad_texts)
                append(Window(window.vectors, window.tokens, window.truncated, []))
                truncated += int(window.truncated.sum())
                failed += len(window.errors)
        return EncodeProgress(texts=shard.rows, truncated=truncated, failed=failed, position=shard.size)


def shard_path(folder: Path, shard: Shard) -> Path:
    """Return the path of a shard's file."""
    return folder / f"part-{shard.number:06d}.parquet"


def encode_with_ray(
    bundle: Path,
    source: Corpus,
    output: Path,
    *,
    workers: int,
    load_options: Mapping[str, Any] | None = None,
    bad_texts: BadTexts = BadTexts.STOP,
    shard_rows: int = SHARD_ROWS,
    address: str | None = None,
    on_progress: Callable[[EncodeProgress], None] = lambda _: None,
) -> EncodeProgress:
    """Encode every row of a corpus with a pool of Ray workers.

    An encoder uses every core that it may, so one worker per machine is the right number.

    Args:
        bundle: the bundle's folder.
        source: the corpus.
        output: the folder to write, with columns embedding, tokens and truncated in its files.
        workers: processes that encode.
        load_options: further arguments of `Encoder.load`; a resumed run must pass the same.
        bad_texts: what happens to rows that cannot be encoded; not `SKIP`.
        shard_rows: rows per shard.
        address: of a running Ray cluster; None starts one on this machine for this call. Ray listens on the machine's
            address, not on loopback, and requires the token that it keeps in the user's home.
        on_progress: called at the start and after each shard. `truncated` and `failed` count this run's shards only.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: a row cannot be read or encoded; `output` exists; another process writes it; or an unfinished run
            has another input or other settings.
        EngineError: an engine or a worker failed. Finished shards stay.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    check_text_vectors(read_manifest(bundle).encoder)  # report an invalid bundle here, not from a worker
    if output.exists():
        raise InputError(f"{output} exists: remove it or choose another output")
    source.check_output(output)
    load_options = load_options or {}
    folder = output.with_name(output.name + ".partial")
    if source.keep or bad_texts is BadTexts.SKIP:
        raise InputError("Ray's workers keep no columns and skip no rows: leave out --keep, or --engine-pool ray")
    identity = {
        "bundle": str(bundle.resolve()),
        **source.identity(),
        "part_rows": shard_rows,
        "options": {key: str(value) for key, value in sorted(load_options.items())},
    }
    job = ShardJob(
        bundle=bundle.resolve(), source=source, folder=folder.resolve(), load_options=load_options, bad_texts=bad_texts
    )
    with _claimed(folder, identity):
        shards = list(source.shards(shard_rows))
        missing = [shard for shard in shards if not shard_path(folder, shard).exists()]
        finished = [shard for shard in shards if shard not in missing]
        done = EncodeProgress(
            texts=sum(shard.rows for shard in finished), position=sum(shard.size for shard in finished)
        )
        on_progress(done)
        for counts in _run(ray, job, missing, workers, address) if missing else ():
            done = EncodeProgress(**{name: getattr(done, name) + int(count) for name, count in counts.items()})
            on_progress(done)
        for name in ("state.json", "lock"):
            (folder / name).unlink()
        os.rename(folder, output)
    return done


def _run(
    ray: Any, job: ShardJob, shards: Sequence[Shard], workers: int, address: str | None
) -> Iterator[Mapping[str, int]]:
    """Encode shards with the pool, and yield the counts of each when it is finished."""
    started = not ray.is_initialized()
    if started:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
        pool = ray.data.ActorPoolStrategy(size=workers)
        for counts in rows.map_batches(ShardWorker, fn_constructor_args=(job,), batch_size=1, compute=pool).iter_rows():
            problem, kind = counts.pop("problem"), counts.pop("kind")
            if problem:
                raise (InputError if kind == "input" else EngineError)(problem)
            yield counts
    except ray.exceptions.RayError as error:
        raise EngineError(f"a Ray worker failed: {error}") from error
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Lock the partial folder for this process, and check that it belongs to the same input and settings."""
    with locked_folder(folder):
        state = folder / "state.json"
        if not state.exists():
            with replace_file(state) as beside:
                beside.write_text(json.dumps(identity), encoding="utf-8")
        elif read_object(state, "no unfinished run") != identity:
            raise InputError(
                f"{folder.name} holds an unfinished run with other settings: finish it with the bundle, input and "
                "settings in its state.json, or delete it to start again"
            )
        yield
