"""A corpus over many processes or machines: Ray Data deals out parts, workers encode them, finished parts are kept.

The result is a folder of Parquet files, one a part, whose names sort in the corpus's order. While it runs it is called
`OUT.partial`; run again after a kill, only the missing parts are encoded. Every machine must see the bundle, the corpus
and the output under the same paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import read_manifest
from mirror_runtime.corpus.encode_file import Progress
from mirror_runtime.corpus.files import CorpusFile, Shard
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import EngineError, InputError, MirrorError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, replace_file
from mirror_runtime.vectors import dtype_of, width_of

PART_ROWS = 65_536
"""Rows of a part: a minute's work of a slow machine, which is what a kill can cost."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every worker needs to know.

    Attributes:
        bundle: the folder that export wrote.
        source: the corpus.
        folder: where the parts go.
        options: further arguments of `Encoder.load`.
        zero_bad: give rows that cannot be encoded zeros, instead of stopping.
    """

    bundle: Path
    source: CorpusFile
    folder: Path
    options: Mapping[str, Any]
    zero_bad: bool


class Worker:
    """One process of the pool: an encoder that is loaded once and writes a file a part."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._encoder = Encoder.load(task.bundle, **task.options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Encode the part that is a Ray batch of one row; gives its counts, and what was wrong with it if anything.

        What is wrong is said, not raised: Ray would wrap it and log tracebacks of its own.
        """
        part = Shard(**{name: int(values[0]) for name, values in batch.items()})
        problem, kind = "", ""
        counts = dict.fromkeys(("texts", "truncated", "failed", "position"), 0)
        try:
            counts = self._encode(part)
        except MirrorError as error:
            problem, kind = str(error), "input" if isinstance(error, InputError) else "engine"
        return {name: [value] for name, value in {**counts, "problem": problem, "kind": kind}.items()}

    def _encode(self, part: Shard) -> dict[str, int]:
        pa, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
        task, spec = self._task, self._encoder.spec
        embedding = pa.list_(pa.from_numpy_dtype(dtype_of(spec)), width_of(spec))
        schema = pa.schema([("embedding", embedding), ("tokens", pa.int64()), ("truncated", pa.bool_())])
        path = part_path(task.folder, part)
        row, truncated, failed = part.first, 0, 0
        # Ray may run a part twice at once, after a worker that it lost.
        with replace_file(path, shared=True) as beside, parquet.ParquetWriter(beside, schema) as writer:
            for encoded in self._encoder.encode_stream(task.source.texts(part)):
                if encoded.errors and not task.zero_bad:
                    first = min(encoded.errors)
                    raise InputError(
                        f"{task.source.path}, row {row + first + 1}: {encoded.errors[first].reason}. "
                        "Mend it, or give such rows zero vectors with --bad-texts zero"
                    )
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(encoded.vectors.reshape(-1)), width_of(spec))
                columns = [vectors, pa.array(encoded.tokens), pa.array(encoded.truncated)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                row += len(encoded.tokens)
                truncated += int(encoded.truncated.sum())
                failed += len(encoded.errors)
        return {"texts": part.rows, "truncated": truncated, "failed": failed, "position": task.source.share(part)}


def part_path(folder: Path, part: Shard) -> Path:
    """Name a part's file."""
    return folder / f"part-{part.number:06d}.parquet"


def encode_with_ray(
    bundle: Path,
    source: CorpusFile,
    output: Path,
    *,
    workers: int,
    options: Mapping[str, Any] | None = None,
    zero_bad: bool = False,
    part_rows: int = PART_ROWS,
    address: str | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Encode every row of a corpus with a pool of Ray workers.

    An encoder uses every core that it may, so that one worker a machine is the right number.

    Args:
        bundle: the folder that export wrote.
        source: the corpus.
        output: the folder that will appear, with columns embedding, tokens and truncated in its files.
        workers: processes that encode.
        options: further arguments of `Encoder.load`; they must be the same in a run that goes on.
        zero_bad: give rows that cannot be encoded a vector of zeros and count them, instead of stopping.
        part_rows: rows a part.
        address: of a running Ray cluster; None starts one on this machine for this call. Ray listens on the machine's
            address, not on loopback, and asks for the token that it keeps in the user's home.
        report: called after each part. `truncated` and `failed` count this run's parts alone.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: a row cannot be read or encoded; `output` exists; another process writes it; or an unfinished run
            was made from something else.
        EngineError: an engine or a worker failed. Finished parts stay.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    read_manifest(bundle)  # a bundle that is none is said here, not by a worker
    if output.exists():
        raise InputError(f"{output} exists: remove it or choose another output")
    folder = output.with_name(output.name + ".partial")
    stat = source.path.stat()
    identity = {
        "bundle": str(bundle.resolve()),
        "input": str(source.path.resolve()),
        "input_bytes": stat.st_size,
        "input_mtime_ns": stat.st_mtime_ns,
        "column": source.column,
        "part_rows": part_rows,
        "options": {key: str(value) for key, value in sorted((options or {}).items())},
    }
    task = Task(
        bundle=bundle.resolve(), source=source, folder=folder.resolve(), options=options or {}, zero_bad=zero_bad
    )
    with _claimed(folder, identity):
        parts = list(source.parts(part_rows))
        left = [part for part in parts if not part_path(folder, part).exists()]
        finished = [part for part in parts if part not in left]
        done = Progress(
            texts=sum(part.rows for part in finished), position=sum(source.share(part) for part in finished)
        )
        report(done)
        if left:
            for counts in _run(ray, task, left, workers, address):
                done = Progress(**{name: getattr(done, name) + int(n) for name, n in counts.items()})
                report(done)
        for name in ("state.json", "lock"):
            (folder / name).unlink()
        os.rename(folder, output)
    return done


def _run(ray: Any, task: Task, parts: list[Shard], workers: int, address: str | None) -> Iterator[Mapping[str, int]]:
    """Let the pool encode the parts; gives the counts of each as it is finished."""
    ours = not ray.is_initialized()
    if ours:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dealt = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
        pool = ray.data.ActorPoolStrategy(size=workers)
        for counts in dealt.map_batches(Worker, fn_constructor_args=(task,), batch_size=1, compute=pool).iter_rows():
            problem, kind = counts.pop("problem"), counts.pop("kind")
            if problem:
                raise (InputError if kind == "input" else EngineError)(problem)
            yield counts
    except ray.exceptions.RayError as error:
        raise EngineError(f"a Ray worker failed: {error}") from error
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Hold the partial folder for this process, and see that it belongs to the same work."""
    with locked_folder(folder):
        state = folder / "state.json"
        if not state.exists():
            with replace_file(state) as beside:
                beside.write_text(json.dumps(identity), encoding="utf-8")
        elif json.loads(state.read_text(encoding="utf-8")) != identity:
            raise InputError(
                f"{folder.name} holds an unfinished run of something else: finish it with the bundle, input and "
                "settings that state.json in it names, or delete it to start again"
            )
        yield
