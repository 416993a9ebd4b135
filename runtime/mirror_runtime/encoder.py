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

from mirror_runtime.bundle import TOKENIZER_FILE, Artifact, EncoderSpec, Manifest, read_manifest
from mirror_runtime.engines import Engine, load_engine
from mirror_runtime.errors import InputError, TextError
from mirror_runtime.packing import Batch, Ladder, PackedRows, pack
from mirror_runtime.selection import choose
from mirror_runtime.tokens import LongTexts, Tokenized, Tokenizer

_log = logging.getLogger(__name__)

WINDOW = 2048
"""Texts tokenised and packed together: enough to fill rows to 98 %, small enough for flat memory."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result for a sequence of texts.

    Attributes:
        vectors: float32 [n, dim], in the texts' order; a failed text's row is zeros.
        tokens: int64 [n], tokens of the whole text with special tokens, before any policy; 0 for a failed text.
        truncated: bool [n], whether tokens were cut off.
        errors: the failed texts, by position; the others are unharmed.
    """

    vectors: NDArray[np.float32]
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: Mapping[int, TextError]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an encoder has done since it was loaded.

    Attributes:
        texts: texts given.
        failed: texts that got an error.
        truncated: texts that lost tokens.
        tokens: useful tokens executed.
        slots: token places executed, empty ones included; `tokens / slots` is the fill of the rows.
        executions: batches run.
        tokenize_s: seconds spent tokenising.
        pack_s: seconds spent packing.
        infer_s: seconds spent in the engine, summed over its streams.
        unpack_s: seconds spent collecting vectors.
    """

    texts: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    slots: int = 0
    executions: int = 0
    tokenize_s: float = 0.0
    pack_s: float = 0.0
    infer_s: float = 0.0
    unpack_s: float = 0.0


@dataclass(frozen=True)
class _Window:
    """A window whose batches are queued or running."""

    tokenized: Tokenized
    batches: Sequence[Batch]
    outputs: Sequence[Future[NDArray[np.float32]]]


class Encoder:
    """Turns texts into vectors with one of a bundle's artifacts. Safe to use from several threads.

    Made by `Encoder.load`. Close it, or use it in a `with` block, to release the engine.

    Attributes:
        manifest: the bundle's manifest.
        engine: what runs; its `name` and `precision` are what was asked for, or what "auto" chose.
        artifact: the proven artifact behind it; None for the fake engine.
    """

    def __init__(
        self, manifest: Manifest, artifact: Artifact | None, engine: Engine, tokenizer: Tokenizer, ladder: Ladder
    ) -> None:
        self.manifest = manifest
        self.artifact = artifact
        self.engine = engine
        self._tokenizer = tokenizer
        self._ladder = ladder
        self._pool = ThreadPoolExecutor(engine.streams, thread_name_prefix="mirror-engine")
        self._lock = threading.Lock()
        self._stats = Stats()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        engine: str = "auto",
        precision: str = "auto",
        streams: int | None = None,
        long_texts: LongTexts | str = LongTexts.TRUNCATE,
    ) -> Encoder:
        """Load a bundle.

        Args:
            bundle: the folder that export wrote.
            engine: "onnxruntime", "openvino", "fake", or "auto" for the rule in `mirror_runtime.selection`.
            precision: "fp32", "bf16", or "auto". What is named here is what runs, or an error.
            streams: batches in flight; None lets the engine choose from this process's cores.
            long_texts: what happens to texts longer than the encoder takes: "truncate" (counted, marked in
                `Encoded.truncated` and logged), "error", or "chunk" (mean of the chunks' vectors).

        Raises:
            BundleError: the folder is no bundle or its tokenizer is broken.
            EngineError: the engine or precision is unknown, not in the bundle, not installed or not possible here.
            InputError: `long_texts` is no policy.
        """
        folder = Path(bundle)
        try:
            policy = LongTexts(long_texts)
        except ValueError:
            known = ", ".join(p.value for p in LongTexts)
            raise InputError(f"long_texts is {long_texts!r}: choose {known}") from None
        manifest = read_manifest(folder)
        spec = manifest.encoder
        name, runs_in, artifact = choose(manifest, engine, precision)
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, spec.max_tokens, policy)
        graph = folder / artifact.path if artifact is not None else folder
        loaded = load_engine(name, runs_in, graph, streams=streams, dim=spec.dim)
        return cls(manifest, artifact, loaded, tokenizer, Ladder.up_to(spec.max_tokens))

    @property
    def spec(self) -> EncoderSpec:
        """What decides the vectors: pooling, length limit, dimension."""
        return self.manifest.encoder

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return self._stats

    def encode(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Encode texts.

        Args:
            texts: any iterable of strings; generators are consumed once.

        Returns:
            float32 [n, dim], in the texts' order. An empty string has a vector too: that of the special tokens.

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
            vectors=np.concatenate([p.vectors for p in parts] or [np.zeros((0, self.spec.dim), np.float32)]),
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

    def warm_up(self) -> None:
        """Run every shape once, so that no later call waits for a compilation.

        Raises:
            EngineError: the engine failed.
        """
        for shape in self._ladder.shapes():
            empty = np.zeros((3, *shape), np.int64)
            self.engine.run(PackedRows(input_ids=empty[0], position_ids=empty[1], segment_ids=empty[2]))

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
        running: deque[_Window] = deque()
        try:
            while chunk := list(islice(texts, window)):
                running.append(self._start(chunk))
                if len(running) > 2:
                    yield self._finish(running.popleft())
            while running:
                yield self._finish(running.popleft())
        finally:  # the caller stopped early or a batch failed: nothing queued may keep running for nobody
            for left in running:
                for output in left.outputs:
                    output.cancel()

    def _start(self, texts: Sequence[object]) -> _Window:
        began = time.perf_counter()
        tokenized = self._tokenizer(texts)
        tokenized_at = time.perf_counter()
        batches = pack(tokenized.ids, tokenized.lengths, self._ladder, streams=self.engine.streams)
        packed_at = time.perf_counter()
        truncated = int(tokenized.truncated.sum())
        if truncated:
            _log.warning(
                "%d of %d texts are longer than %d tokens and were truncated; long_texts='chunk' keeps all of them",
                truncated,
                len(texts),
                self.spec.max_tokens,
            )
        self._count(
            texts=len(texts),
            failed=len(tokenized.errors),
            truncated=truncated,
            tokens=sum(batch.tokens for batch in batches),
            slots=sum(batch.rows.input_ids.size for batch in batches),
            executions=len(batches),
            tokenize_s=tokenized_at - began,
            pack_s=packed_at - tokenized_at,
        )
        outputs = [self._pool.submit(self._run, batch) for batch in batches]
        return _Window(tokenized=tokenized, batches=batches, outputs=outputs)

    def _run(self, batch: Batch) -> NDArray[np.float32]:
        """Run one batch in a pool thread and keep the vectors [m, dim] of its pieces."""
        began = time.perf_counter()
        out = self.engine.run(batch.rows)
        self._count(infer_s=time.perf_counter() - began)
        return out.reshape(-1, out.shape[-1])[batch.slots]

    def _finish(self, window: _Window) -> Encoded:
        tokenized = window.tokenized
        outputs = [output.result() for output in window.outputs]
        began = time.perf_counter()
        pieces = np.zeros((tokenized.lengths.size, self.spec.dim), np.float32)
        for batch, output in zip(window.batches, outputs, strict=True):
            pieces[batch.pieces] = output
        vectors = self._join(pieces, tokenized.owners, len(tokenized.tokens))
        self._count(unpack_s=time.perf_counter() - began)
        return Encoded(vectors=vectors, tokens=tokenized.tokens, truncated=tokenized.truncated, errors=tokenized.errors)

    def _join(self, pieces: NDArray[np.float32], owners: NDArray[np.int64], texts: int) -> NDArray[np.float32]:
        """Bring pieces [pieces, dim] to texts [texts, dim]: chunks become their mean, normalised if vectors are."""
        counts = np.bincount(owners, minlength=texts)
        if texts == owners.size and counts.max(initial=1) == 1:
            return pieces
        vectors = np.zeros((texts, pieces.shape[1]), np.float32)
        np.add.at(vectors, owners, pieces)
        several = counts > 1
        vectors[several] /= counts[several, None]
        if self.spec.normalize:
            norms = np.linalg.norm(vectors[several], axis=1, keepdims=True)
            vectors[several] /= np.maximum(norms, 1e-12)
        return vectors

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})
