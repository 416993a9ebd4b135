"""Bundle to vectors: tokenise, pack, run, unpack, with the next window prepared while the engine works."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import (
    Artifact,
    EncoderSpec,
    EngineName,
    Manifest,
    Precision,
    read_manifest,
)
from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.engines import Engine, load_engine
from mirror_runtime.errors import InputError, TextError
from mirror_runtime.packing import BLOCK, Batch, PackedRows, ShapeSet, pack, pack_shape
from mirror_runtime.plan import Decision, Setting, decide, find_plan
from mirror_runtime.selection import AUTO, choose
from mirror_runtime.stats import Counters, Stats
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer
from mirror_runtime.vectors import Vectors, components, dtype_of, round_vectors, unit_rows, width_of

_log = logging.getLogger(__name__)

WINDOW = 2048
"""Texts tokenised and packed together: enough to fill rows to 98 %, small enough for flat memory."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result for a sequence of texts.

    Attributes:
        vectors: [n, width] of the encoder's vector type (float32 [n, dim] where it has no other, see
            `mirror_runtime.vectors`), in the texts' order; a failed text's row is zeros.
        tokens: int64 [n], tokens of the whole text with special tokens, before any policy; 0 for a failed text.
        truncated: bool [n], whether tokens were cut off.
        errors: the failed texts, by position; the others are unharmed.
    """

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: Mapping[int, TextError]


@dataclass(frozen=True)
class Window:
    """Texts whose batches are queued, running or done: what `Encoder.begin` gives and `Encoder.finish` takes."""

    tokenized: Tokenized
    batches: Sequence[Batch]
    outputs: Sequence[Future[Vectors]]


class Encoder:
    """Turns texts into vectors with one of a bundle's artifacts. Safe to use from several threads.

    Made by `Encoder.load`. Close it, or use it in a `with` block, to release the engine.

    Attributes:
        manifest: the bundle's manifest.
        engine: what runs; its `name` and `precision` are what was asked for, or what "auto" chose.
        decision: why that runs, and in which rows.
    """

    def __init__(
        self, manifest: Manifest, decision: Decision, engine: Engine, tokenizer: Tokenizer, ladder: ShapeSet
    ) -> None:
        self.manifest = manifest
        self.decision = decision
        self.engine = engine
        self._tokenizer = tokenizer
        self._ladder = ladder
        self._bulk = ladder if engine.row_step is None else ladder.for_bulk()
        self._pool = ThreadPoolExecutor(engine.streams, thread_name_prefix="mirror-engine")
        # Calls of one batch run in their caller's thread: this keeps them and the pool together at `streams`.
        self._turns = threading.BoundedSemaphore(engine.streams)
        self._counters = Counters()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        engine: str = "auto",
        precision: str = "auto",
        streams: int | None = None,
        long_texts: LongTexts | str = LongTexts.TRUNCATE,
        plan: str | Path | None = AUTO,
        cache_dir: str | Path | None = AUTO_CACHE,
    ) -> Encoder:
        """Load a bundle.

        Args:
            bundle: the folder that export wrote.
            engine: "onnxruntime", "openvino", "fake", or "auto" for what `mirror plan` measured here, and without
                a plan for the rule in `mirror_runtime.selection`. `decision` says which it was.
            precision: "fp32", "bf16", or "auto". What is named here is what runs, or an error.
            streams: batches in flight; None lets the engine choose from this process's cores.
            long_texts: what happens to texts longer than the encoder takes: "truncate" (counted, marked in
                `Encoded.truncated` and logged), "error", or "chunk" (mean of the chunks' vectors).
            plan: a file that `mirror plan` wrote, "auto" for the one in the cache, None for the rule.
            cache_dir: where converted graphs and plans are kept; "auto" for the user's cache folder, None for nowhere.

        Raises:
            BundleError: the folder is no bundle or its tokenizer is broken.
            EngineError: the engine or precision is unknown, not in the bundle, not installed or not possible here.
            InputError: `long_texts` is no policy, or the plan that was named does not hold here.
        """
        folder = Path(bundle)
        try:
            policy = LongTexts(long_texts)
        except ValueError:
            known = ", ".join(p.value for p in LongTexts)
            raise InputError(f"long_texts is {long_texts!r}: choose {known}") from None
        manifest = read_manifest(folder)
        cache = cache_folder(cache_dir)
        followed = find_plan(plan, cache, manifest.fingerprint) if AUTO in (engine, precision) else None
        decision = decide(manifest, engine, precision, followed)
        if streams is not None:
            decision = replace(decision, streams=streams)
        return cls._open(folder, manifest, decision, policy, cache)

    @classmethod
    def of_graph(cls, folder: Path, manifest: Manifest, engine: EngineName, precision: Precision, path: str) -> Encoder:
        """Load one packed graph with everything at its defaults, whether the manifest has it or not.

        This is how export proves a graph before it is in any manifest: by the very thing that will serve it.

        Args:
            folder: holds the tokenizer and the graph.
            manifest: says what decides the vectors.
            engine: what runs the graph.
            precision: what it runs in.
            path: the graph, relative to the folder.

        Raises:
            BundleError: the tokenizer is broken.
            EngineError: the engine is not installed, or cannot run this graph in this precision here.
        """
        decision = Decision(engine=engine, precision=precision)
        return cls._open(folder, manifest, decision, LongTexts.TRUNCATE, None, path=path)

    @classmethod
    def of_setting(cls, bundle: Path, setting: Setting, cache_dir: str | Path | None = AUTO_CACHE) -> Encoder:
        """Load a bundle to run in exactly one way, which is how `mirror plan` measures ways.

        Raises:
            BundleError: the folder is no bundle or its tokenizer is broken.
            EngineError: the setting is not in the bundle, not installed or not possible here.
        """
        manifest = read_manifest(bundle)
        name, runs_in, artifact = choose(manifest, setting.engine.value, setting.precision.value)
        decision = Decision(
            engine=name,
            precision=runs_in,
            artifact=artifact,
            streams=setting.streams,
            row_tokens=setting.row_tokens,
            batch_tokens=setting.batch_tokens,
        )
        return cls._open(bundle, manifest, decision, LongTexts.TRUNCATE, cache_folder(cache_dir))

    @classmethod
    def _open(
        cls,
        folder: Path,
        manifest: Manifest,
        decision: Decision,
        long_texts: LongTexts,
        cache: Path | None,
        *,
        path: str = "",
    ) -> Encoder:
        spec = manifest.encoder
        tokenizer = Tokenizer.of(folder, spec, long_texts)
        artifact = decision.artifact
        kept = None
        if artifact is not None:
            path = artifact.path
            if cache is not None and path in manifest.files:
                # The fingerprint stands for weights that lie beside the graph, the hash for the graph.
                kept = cache / "graphs" / f"{manifest.fingerprint}-{manifest.files[path][:16]}"
        engine = load_engine(
            decision.engine, decision.precision, folder / path, streams=decision.streams, spec=spec, cache=kept
        )
        ladder = ShapeSet.up_to(
            spec.pad_to or spec.max_tokens,
            base=decision.row_tokens,
            budget=decision.batch_tokens,
            step=engine.row_step or BLOCK,
        )
        return cls(manifest, decision, engine, tokenizer, ladder)

    @property
    def artifact(self) -> Artifact | None:
        """The proven artifact behind the engine; None for the fake engine, and for a graph that export is proving."""
        return self.decision.artifact

    @property
    def fingerprint(self) -> str:
        """The name of the vector space: vectors of encoders with equal fingerprints can be compared."""
        return self.manifest.fingerprint

    @property
    def spec(self) -> EncoderSpec:
        """What decides the vectors: pooling, length limit, dimension."""
        return self.manifest.encoder

    @property
    def rows(self) -> str:
        """The row lengths that texts are packed into and the tokens of a full batch, in words."""
        between = ", ".join(map(str, self._bulk.between))
        in_bulk = f" (many of a kind: {between})" if between else ""
        return f"{', '.join(map(str, self._ladder.lengths))} tokens{in_bulk}, batches of {self._ladder.budget}"

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return self._counters.snapshot()

    def encode(self, texts: Iterable[str]) -> Vectors:
        """Encode texts.

        Args:
            texts: any iterable of strings; generators are consumed once.

        Returns:
            float32 [n, dim], or what the encoder's vector type says, see `mirror_runtime.vectors`; in the texts'
            order. An empty string has a vector too: that of the special tokens.

        Raises:
            TextError: naming the first text that cannot be encoded. `encode_detailed` encodes the rest.
            EngineError: the engine failed.
        """
        encoded = self.encode_detailed(texts)
        if encoded.errors:
            raise encoded.errors[min(encoded.errors)]
        return encoded.vectors

    def encode_detailed(self, texts: Iterable[object]) -> Encoded:
        """Encode texts and say what happened to each. A bad text never raises: it is named in `errors`.

        Raises:
            EngineError: the engine failed.
        """
        parts: list[Encoded] = []
        errors: dict[int, TextError] = {}
        at = 0
        for part in self.encode_stream(texts):
            errors.update({at + i: TextError(at + i, error.reason) for i, error in part.errors.items()})
            parts.append(part)
            at += len(part.vectors)
        if len(parts) == 1:
            return parts[0]
        return Encoded(
            vectors=np.concatenate(
                [p.vectors for p in parts] or [np.zeros((0, width_of(self.spec)), dtype_of(self.spec))]
            ),
            tokens=np.concatenate([p.tokens for p in parts] or [np.zeros(0, np.int64)]),
            truncated=np.concatenate([p.truncated for p in parts] or [np.zeros(0, np.bool_)]),
            errors=errors,
        )

    def encode_stream(self, texts: Iterable[object], window: int = WINDOW) -> Iterator[Encoded]:
        """Encode an iterable of any length with flat memory.

        A window's vectors depend, to the last bit, on the window's texts and the encoder's settings alone.

        Args:
            texts: any iterable; bad items are named in the results' `errors`.
            window: texts a result; positions in `errors` count from the window's first text.

        Yields:
            One `Encoded` a window, in order. While the caller holds it, the next two are already being computed.

        Raises:
            InputError: `texts` is one string, or `window` is not positive.
            EngineError: the engine failed.
        """
        if isinstance(texts, (str, bytes)):
            raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
        if window < 1:
            raise InputError(f"window is {window}: it must be at least 1")
        return self._stream(iter(texts), window)

    def begin(
        self,
        texts: Sequence[object],
        *,
        direct: bool = False,
        bulk: bool = False,
        long_texts: Sequence[LongTexts] | None = None,
    ) -> Window:
        """Tokenise and pack some texts and hand their batches to the engine.

        Args:
            texts: a list, whose bad items are named by `finish`.
            direct: run what is a single batch at once, in this thread: no hop to another one, which a short text feels.
            bulk: also use the row lengths that are for many texts. `warm_up` leaves them out: the first batches of each
                wait until it is compiled.
            long_texts: the policy of each text that is too long; None for the encoder's own.

        Raises:
            EngineError: `direct`, and the engine failed.
        """
        began = time.perf_counter()
        tokenized = self._tokenizer(texts, long_texts)
        tokenized_at = time.perf_counter()
        ladder = self._bulk if bulk else self._ladder
        batches = self._pack(tokenized, ladder)
        packed_at = time.perf_counter()
        truncated = int(tokenized.truncated.sum())
        if truncated:
            _log.warning(
                "%d of %d texts are longer than %d tokens and were truncated; long_texts='chunk' keeps all of them",
                truncated,
                len(texts),
                self.spec.max_tokens,
            )
        self._counters.add(
            texts=len(texts),
            failed=len(tokenized.errors),
            truncated=truncated,
            tokens=sum(batch.tokens for batch in batches),
            slots=sum(batch.rows.input_ids.size for batch in batches),
            executions=len(batches),
            tokenize_s=tokenized_at - began,
            pack_s=packed_at - tokenized_at,
        )
        if direct and len(batches) == 1:
            done: Future[Vectors] = Future()
            done.set_result(self._run(batches[0]))
            return Window(tokenized=tokenized, batches=batches, outputs=[done])
        outputs = [self._pool.submit(self._run, batch) for batch in batches]
        return Window(tokenized=tokenized, batches=batches, outputs=outputs)

    def finish(self, window: Window) -> Encoded:
        """Wait for what `begin` started and collect it.

        Raises:
            EngineError: the engine failed.
        """
        tokenized = window.tokenized
        outputs = [output.result() for output in window.outputs]
        began = time.perf_counter()
        pieces = np.zeros((tokenized.lengths.size, width_of(self.spec)), dtype_of(self.spec))
        for batch, output in zip(window.batches, outputs, strict=True):
            pieces[batch.pieces] = output
        vectors = self._join(pieces[tokenized.parts], tokenized.owners, len(tokenized.tokens))
        self._counters.add(unpack_s=time.perf_counter() - began)
        return Encoded(vectors=vectors, tokens=tokenized.tokens, truncated=tokenized.truncated, errors=tokenized.errors)

    def warm_up(self) -> None:
        """Run every shape once but those for bulk, so that no later `begin` waits for a compilation.

        Raises:
            EngineError: the engine failed.
        """

        def run(shape: tuple[int, int]) -> None:
            # A text in every row, as an engine may compare what its streams make of them. The first token and three
            # positions are what every encoder has.
            positions = np.broadcast_to(np.arange(shape[1]) % 3, shape)
            ones = np.ones(shape, np.int64)
            self.engine.run(PackedRows(input_ids=0 * ones, position_ids=positions, segment_ids=ones))

        for _ in self._pool.map(run, self._ladder.shapes()):
            pass

    def encode_shapes(self, texts: Sequence[str]) -> Iterator[tuple[tuple[int, int], NDArray[np.int64], Vectors]]:
        """Run one batch of every shape, those for bulk too, that `encode` of the same texts leaves out: for a proof.

        It is filled with the longest texts that fit. What `encode` runs with empty rows alone counts as left out.

        Args:
            texts: best of all lengths; bad ones and those of several pieces are left out.

        Yields:
            A shape (rows, row length); int64 [m], the positions of the texts that were in it; their vectors [m, width].

        Raises:
            EngineError: the engine failed.
        """
        tokenized = self._tokenizer(texts)
        owners, parts = tokenized.owners, tokenized.parts
        whole = np.bincount(owners, minlength=len(texts))[owners] == 1
        text_of = np.full(tokenized.lengths.size, -1)
        text_of[parts[whole]] = owners[whole]

        def run(shape: tuple[int, int]) -> tuple[tuple[int, int], NDArray[np.int64], Vectors]:
            batch = pack_shape(tokenized.ids, tokenized.lengths, shape, own=tokenized.own)
            held = text_of[batch.pieces]
            return shape, held[held >= 0], self._run(batch)[held >= 0]

        windows = (self._tokenizer(texts[at : at + WINDOW]) for at in range(0, len(texts), WINDOW))
        batches = (batch.rows for window in windows for batch in self._pack(window, self._bulk))
        filled = {rows.shape for rows in batches if rows.segment_ids[:, 0].all()}
        yield from self._pool.map(run, [shape for shape in self._bulk.shapes() if shape not in filled])

    def close(self) -> None:
        """Release the engine. The encoder cannot be used afterwards."""
        self._pool.shutdown(cancel_futures=True)
        self.engine.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, texts: Iterator[object], window: int) -> Iterator[Encoded]:
        running: deque[Window] = deque()
        try:
            while chunk := list(islice(texts, window)):
                running.append(self.begin(chunk, direct=len(chunk) < window and not running, bulk=True))
                if len(running) > 2:
                    yield self.finish(running.popleft())
            while running:
                yield self.finish(running.popleft())
        finally:  # the caller stopped early or a batch failed: nothing queued may keep running for nobody
            for left in running:
                for output in left.outputs:
                    output.cancel()

    def _pack(self, tokenized: Tokenized, ladder: ShapeSet) -> list[Batch]:
        return pack(tokenized.ids, tokenized.lengths, ladder, streams=self.engine.streams, own=tokenized.own)

    def _run(self, batch: Batch) -> Vectors:
        """Run one batch and keep the vectors [m, width] of its pieces."""
        with self._turns:
            began = time.perf_counter()
            out = self.engine.run(batch.rows)
        self._counters.add(infer_s=time.perf_counter() - began)
        return out.reshape(-1, out.shape[-1])[batch.slots]

    def _join(self, pieces: Vectors, owners: NDArray[np.int64], texts: int) -> Vectors:
        """Bring the vectors [parts, width] of texts' parts to texts [texts, width].

        Chunks become the mean of what they stand for, normalised if vectors are, in the encoder's vector type.
        """
        counts = np.bincount(owners, minlength=texts)
        if texts == owners.size and counts.max(initial=1) == 1:
            return pieces
        vectors = np.zeros((texts, pieces.shape[1]), pieces.dtype)
        single = counts[owners] == 1
        vectors[owners[single]] = pieces[single]
        several = np.flatnonzero(counts > 1)
        if several.size:
            sums = np.zeros((texts, self.spec.dim), np.float32)
            np.add.at(sums, owners[~single], components(pieces[~single], self.spec))
            means = sums[several] / counts[several, None]
            if self.spec.normalize:
                means = unit_rows(means)
            vectors[several] = round_vectors(means, self.spec)
        return vectors
