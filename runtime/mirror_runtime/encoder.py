"""Encode texts with a bundle: tokenise, pack, run, unpack. The next window is prepared while the engine runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import (
    TOKENIZER_FILE,
    Artifact,
    EncoderSpec,
    EngineName,
    Manifest,
    Precision,
    check_files,
    read_manifest,
)
from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.encoded import Encoded as Encoded  # re-exported, as is PendingWindow
from mirror_runtime.encoded import PendingWindow as PendingWindow
from mirror_runtime.encoded import check_text_vectors, joined
from mirror_runtime.engines import Engine, load_engine
from mirror_runtime.engines.base import Lifetime
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.hub import local_bundle
from mirror_runtime.packing import PackedBatch, PackedRows, ShapeSet, pack, pack_shape
from mirror_runtime.pairs import PairTokenizer, tokenizer_of
from mirror_runtime.pieces import collect, locate, result_rows
from mirror_runtime.plan import Decision, DecisionSource, Setting, decide, decide_setting, find_plan
from mirror_runtime.prompts import PROMPTS_FILE, choose_prompt, prompted, read_prompts
from mirror_runtime.selection import AUTO
from mirror_runtime.spans import Spans, check_token_vectors, token_spans
from mirror_runtime.stats import Counters, Stats
from mirror_runtime.tokenizer import SPECIAL_TOKENS_FILE, Item, LongTexts, Tokenized, Tokenizer, iterate
from mirror_runtime.twins import Speed, TwinEncoder, check_speed
from mirror_runtime.vector_cache import CachedVectors, VectorCache
from mirror_runtime.vectors import Vectors

_log = logging.getLogger(__name__)

WINDOW = 2048
"""Texts tokenised and packed together: enough to fill rows to 98 %, few enough for flat memory."""


class Encoder:
    """Encodes texts with one of a bundle's artifacts. Safe to use from several threads.

    Build one with `Encoder.load`. Close it, or use it in a `with` block, to release the engine.

    Attributes:
        manifest: the bundle's manifest.
        engine: the loaded engine; its `name` and `precision` are those requested, or those that "auto" chose.
        decision: why this engine runs, and with which row lengths.
        prompts: the encoder's prompts, by name.
        cached: its part of a vector cache; None without one.
    """

    def __init__(
        self, manifest: Manifest, decision: Decision, engine: Engine, tokenizer: Tokenizer | PairTokenizer,
        shape_set: ShapeSet, prompts: Mapping[str, str] | None = None, twin: TwinEncoder | None = None,
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self.decision = decision
        self.prompts = prompts or {}
        self.engine = engine
        self._tokenizer = tokenizer
        self._shapes = shape_set
        self._bulk_shapes = shape_set.with_intermediate() if engine.dynamic_shapes else shape_set
        self._pool = ThreadPoolExecutor(engine.streams, thread_name_prefix="mirror-engine")
        # Single batches run in their caller's thread: this limits them and the pool together to `streams`.
        self._turns = threading.BoundedSemaphore(engine.streams)
        self._counters = Counters()
        self._lifetime = Lifetime(engine)
        self._twin = twin
        self.cached: CachedVectors | None = None

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
        invariant: bool = False,
        vector_cache: VectorCache | None = None,
    ) -> Encoder:
        """Load a bundle.

        Args:
            bundle: the folder that export wrote, or a published one's name, see `hub.local_bundle`.
            engine: the name of an `EngineName` ("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino",
                "tensorrt", or "fake" for tests), or "auto": the engine that `mirror plan` found best on this host, or
                without a plan the one chosen by `mirror_runtime.selection`. See `decision`.
            precision: the name of a `Precision` ("fp32", "fp16", "bf16", "int8", "fp8"), or "auto". A precision that
                is named runs, or loading fails; "auto" only ever chooses fp32 or bf16 by itself. Names hold for a
                static twin where its bundle has them, see `twin_setting`; its `engine` says what runs.
            streams: batches in flight; None lets the engine choose from this process's cores.
            long_texts: what happens to texts longer than `max_tokens`: "truncate" (counted, marked in
                `Encoded.truncated` and logged), "error", or "chunk", "chunk-weighted" and "chunk-max" (the mean of its
                chunks' vectors, also weighted by their tokens, or the largest of each component).
            plan: a file written by `mirror plan`; "auto" for the one in the cache; None for no plan. Not read if engine
                and precision are both named.
            cache_dir: where converted graphs and plans are kept; "auto" for the user's cache folder, None for nowhere.
            invariant: make a text's vector equal to the bit whatever else is encoded, on ONNX Runtime or OpenVINO on a
                CPU: one text a row, in batches of one shape for its length, which are slower; see `packing`.
            vector_cache: where vectors are kept, so that a text that comes again is not computed again; not used by
                `encode_stream`. Encoders may share one.

        Raises:
            BundleError: the folder is not a bundle, its tokenizer is broken, or its twin is another encoder's.
            EngineError: the engine or precision is unknown, not in the bundle, not installed or not supported here.
            InputError: `long_texts` is unknown, the named plan was made for another host or bundle, or the cache is too
                small for one vector.
        """
        folder = local_bundle(bundle)
        try:
            policy = LongTexts(long_texts)
        except ValueError:
            known = ", ".join(p.value for p in LongTexts)
            raise InputError(f"long_texts is {long_texts!r}: it must be one of {known}") from None
        manifest = read_manifest(folder)
        twin = TwinEncoder.of(
            folder, manifest, cls.load, engine, precision, streams=streams, long_texts=policy,
            plan=None if plan is None else AUTO, cache_dir=cache_dir, invariant=invariant, vector_cache=vector_cache,
        )  # fmt: skip
        cache = cache_folder(cache_dir)
        followed = find_plan(plan, cache, manifest.fingerprint) if AUTO in (engine, precision) else None
        decision = decide(manifest, engine, precision, followed)
        if streams is not None:
            decision = replace(decision, streams=streams)
        cached = None if vector_cache is None else vector_cache.of(manifest, decision, policy, invariant)
        encoder = cls._open(folder, manifest, decision, policy, cache, invariant=invariant, twin=twin)
        encoder.cached = cached
        return encoder

    @classmethod
    def of_graph(cls, folder: Path, manifest: Manifest, engine: EngineName, precision: Precision, path: str) -> Encoder:
        """Load one packed graph with default settings; `path` is relative to the folder.

        Export proves a graph this way before any manifest lists it: with the code that will serve it.

        Raises:
            BundleError: the tokenizer is broken.
            EngineError: the engine is not installed, or cannot run this graph in this precision here.
        """
        decision = Decision(engine=engine, precision=precision)
        return cls._open(folder, manifest, decision, LongTexts.TRUNCATE, None, path=path)

    @classmethod
    def of_setting(cls, bundle: Path, setting: Setting, cache_dir: str | Path | None = AUTO_CACHE) -> Encoder:
        """Load a bundle with exactly one setting, as `mirror plan` does to measure it. Raises like `load`."""
        manifest = read_manifest(bundle)
        names = (setting.engine.value, setting.precision.value)
        twin = TwinEncoder.of(bundle, manifest, cls.load, *names, cache_dir=cache_dir)
        decision = replace(decide_setting(manifest, setting), source=DecisionSource.ASKED)
        return cls._open(bundle, manifest, decision, LongTexts.TRUNCATE, cache_folder(cache_dir), twin=twin)

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
        invariant: bool = False,
        twin: TwinEncoder | None = None,
    ) -> Encoder:
        spec = manifest.encoder
        check_files(folder, manifest, (TOKENIZER_FILE, SPECIAL_TOKENS_FILE, PROMPTS_FILE))
        tokenizer, prompts = tokenizer_of(folder, spec, long_texts), read_prompts(folder, manifest.files)
        artifact = decision.artifact
        kept = None
        if artifact is not None:
            path = artifact.path
            if cache is not None and path in manifest.files:
                # The fingerprint identifies weights stored beside the graph, the hash identifies the graph.
                kept = cache / "graphs" / f"{manifest.fingerprint}-{manifest.files[path][:16]}"
        graph_files = (path, f"{path}_data", path.removesuffix(".xml") + ".bin")  # weights may lie beside it
        engine = load_engine(
            decision.engine, decision.precision, folder / path, streams=decision.streams, spec=spec, cache=kept,
            before_reading=lambda: check_files(folder, manifest, graph_files),
        )  # fmt: skip
        base, budget, multiple = decision.row_tokens, decision.batch_tokens, engine.length_multiple
        longest = spec.pad_to or spec.max_tokens
        shape_set = ShapeSet.up_to(longest, base=base, budget=budget, length_multiple=multiple)
        if invariant and not engine.dynamic_shapes:
            engine.close()
            raise EngineError(f"{engine.name.value} cannot be invariant: choose onnxruntime or openvino")
        shape_set = shape_set.one_a_row() if invariant else shape_set
        return cls(manifest, decision, engine, tokenizer, shape_set, prompts, twin)

    @property
    def artifact(self) -> Artifact | None:
        """Return the artifact that the engine runs; None for the fake engine and for a graph that export is proving."""
        return self.decision.artifact

    @property
    def fingerprint(self) -> str:
        """Return the name of the vector space: vectors with equal fingerprints can be compared."""
        return self.manifest.fingerprint

    @property
    def spec(self) -> EncoderSpec:
        """Return the bundle's `EncoderSpec`: pooling, length limit, dimension."""
        return self.manifest.encoder

    @property
    def rows(self) -> str:
        """Describe the row lengths and the tokens of a full batch, for people."""
        return str(self._bulk_shapes)

    @property
    def stats(self) -> Stats:
        """Return a snapshot of the counters."""
        return self._counters.snapshot()

    @property
    def has_twin(self) -> bool:
        """Return whether the bundle has a static twin, for `at`."""
        return self._twin is not None

    def at(self, speed: Speed | str) -> Encoder:
        """Return the encoder of a speed: this one for "full", its static twin for "fast", opened at the first call.

        Raises:
            InputError: the speed is unknown, or the bundle has no twin.
        """
        if check_speed(speed) is Speed.FULL:
            return self
        if self._twin is None:
            raise InputError("speed is 'fast', and this bundle has no static twin: add one with export/pair.py")
        self._lifetime.check()
        return self._twin.open()

    def encode(
        self, texts: Iterable[Item], *, prompt_name: str | None = None, speed: Speed | str = Speed.FULL
    ) -> Vectors:
        """Encode texts.

        Args:
            texts: any iterable of strings, or for a reranker of pairs; generators are consumed once.
            prompt_name: one of `prompts` to put before every text, such as "query".
            speed: "fast" for the bundle's static twin, see `at`.

        Returns:
            [n, width] in the texts' order: float32 [n, dim], unless the encoder has another vector type, see
            `mirror_runtime.vectors`. An empty string has one too: of the special tokens, or zeros.

        Raises:
            TextError: naming the first text that cannot be encoded. `encode_detailed` encodes the others.
            InputError: `texts` is one string, there is no such prompt or no twin, or the pooling is `tokens`.
            EngineError: the engine failed.
        """
        encoder = self.at(speed)
        check_text_vectors(encoder.spec)
        prompt = choose_prompt(encoder.prompts, encoder.spec.template, name=prompt_name)
        return encoder.encode_detailed(prompted(iterate(texts), prompt)).vectors_or_raise()

    def encode_tokens(self, texts: Iterable[str], *, prompt_name: str | None = None) -> list[Spans]:
        """Encode texts to a vector for each token, with an encoder whose pooling is `tokens`.

        Args:
            texts: any iterable of strings. All of their vectors are held at once: encode a large corpus in parts.
            prompt_name: as for `encode`. Its tokens have vectors too.

        Returns:
            For each text the vectors, float32 [tokens, dim], and the characters of each token; see `Spans`. A text
            split by `long_texts="chunk"` has the tokens of all chunks, each with its special ones.

        Raises:
            TextError, EngineError: as for `encode`.
            InputError: also where the pooling is another one.
        """
        check_token_vectors(self.spec)
        prompt = choose_prompt(self.prompts, self.spec.template, name=prompt_name)
        whole = list(prompted(iterate(texts), prompt))
        return token_spans(self.encode_detailed(whole), self._tokenizer, whole, len(prompt))

    def encode_detailed(self, texts: Iterable[object]) -> Encoded:
        """Encode texts and report on each: tokens, truncation, errors. A bad text does not raise.

        Raises:
            InputError: `texts` is one string.
            EngineError: the engine failed.
        """
        if self.cached is None:
            return self._encode_all(texts)
        looked_up = self.cached.look_up(list(iterate(texts)))
        return looked_up.complete(self._encode_all(looked_up.missing))

    def _encode_all(self, texts: Iterable[object]) -> Encoded:
        return joined(list(self.encode_stream(texts)) or [Encoded.empty(self.spec)])

    def encode_stream(self, texts: Iterable[object], window: int = WINDOW) -> Iterator[Encoded]:
        """Encode an iterable of any length with flat memory.

        The vectors of a window are determined, to the last bit, by its texts and the encoder's settings.

        Args:
            texts: any iterable; bad items appear in the results' `errors`.
            window: texts per result; positions in `errors` count from the window's first text.

        Yields:
            One `Encoded` per window, in order. Meanwhile the next two windows are being computed.

        Raises:
            InputError: `texts` is one string, or `window` is not positive.
            EngineError: the engine failed.
        """
        if window < 1:
            raise InputError(f"window is {window}: it must be at least 1")
        self._lifetime.check()
        return self._stream(iterate(texts), window)

    def begin(
        self,
        texts: Sequence[object],
        *,
        direct: bool = False,
        bulk: bool = False,
        long_texts: Sequence[LongTexts] | None = None,
    ) -> PendingWindow:
        """Tokenise and pack texts, and queue their batches.

        Args:
            texts: a list; `finish` reports its bad items.
            direct: run a single batch immediately in this thread, because changing threads delays a short text.
            bulk: also use the intermediate row lengths. `warm_up` does not run these, so the first batch of each waits
                for its compilation.
            long_texts: the policy for each text that is too long; None for the encoder's own.

        Raises:
            EngineError: `direct`, and the engine failed.
        """
        self._lifetime.check()
        began = time.perf_counter()
        tokenized = self._tokenizer(texts, long_texts)
        tokenized_at = time.perf_counter()
        shape_set = self._bulk_shapes if bulk else self._shapes
        batches = self._pack(tokenized, shape_set)
        packed_at = time.perf_counter()
        if truncated := int(tokenized.truncated.sum()):
            cure = "" if self.spec.scores_pairs else "; long_texts='chunk' keeps all of them"
            _log.warning(
                "%d of %d texts are longer than %d tokens and were truncated%s",
                *(truncated, len(texts), self.spec.max_tokens, cure),
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
            return PendingWindow(tokenized=tokenized, batches=batches, outputs=[done])
        with self._lifetime.until_closed():
            outputs = [self._pool.submit(self._run, batch) for batch in batches]
        return PendingWindow(tokenized=tokenized, batches=batches, outputs=outputs)

    def finish(self, window: PendingWindow) -> Encoded:
        """Wait for the batches that `begin` queued, and collect their vectors.

        Raises:
            EngineError: the engine failed.
        """
        self._lifetime.check_process()
        with self._lifetime.until_closed():
            outputs = [output.result() for output in window.outputs]
        began = time.perf_counter()
        encoded = collect(window.tokenized, window.batches, outputs, self.spec)
        failed = len(encoded.errors) - len(window.tokenized.errors)
        self._counters.add(unpack_s=time.perf_counter() - began, failed=failed)
        return encoded

    def warm_up(self) -> None:
        """Run every shape once except those for `bulk`, so that no later `begin` waits for a compilation.

        Raises:
            EngineError: the engine failed, or its vectors are not finite.
        """
        self._lifetime.check()

        def run(shape: tuple[int, int]) -> None:
            # Every row holds a text, because an engine may compare its streams' vectors. Every encoder has token 0 and
            # three positions.
            positions = np.broadcast_to(np.arange(shape[1]) % 3, shape)
            ones = np.ones(shape, np.int64)
            rows = PackedRows(input_ids=0 * ones, position_ids=positions, segment_ids=ones, token_type_ids=0 * ones)
            vectors = self.engine.run(rows)
            if not np.isfinite(vectors).all():
                raise EngineError(f"the vectors of {self.engine.name.value} hold NaN or infinity: run mirror verify")

        for _ in self._pool.map(run, self._shapes.shapes()):
            pass

    def encode_shapes(self, texts: Sequence[Item]) -> Iterator[tuple[tuple[int, int], NDArray[np.int64], Vectors]]:
        """Run one batch of every shape that `encode` does not fill with the same texts, for a proof of all shapes.

        Each batch holds the longest texts that fit. A shape that `encode` runs only with empty rows is run again.

        Args:
            texts: texts, preferably of all lengths; bad texts and those of several pieces are skipped.

        Yields:
            A shape (rows, row length); int64 [m], the rows of `Encoded.vectors` that it computed; these [m, width].

        Raises:
            EngineError: the engine failed.
        """
        self._lifetime.check()
        tokenized = self._tokenizer(texts)
        per_token = self.spec.per_token
        row_of = result_rows(tokenized, per_token=per_token)

        def run(shape: tuple[int, int]) -> tuple[tuple[int, int], NDArray[np.int64], Vectors]:
            batch = pack_shape(tokenized.ids, tokenized.lengths, shape, unpadded_lengths=tokenized.unpadded_lengths)
            batch = locate(batch, tokenized, per_token=per_token)
            held = row_of[batch.pieces]
            return shape, held[held >= 0], self._run(batch)[held >= 0]

        windows = (self._tokenizer(texts[at : at + WINDOW]) for at in range(0, len(texts), WINDOW))
        batches = (batch.rows for window in windows for batch in self._pack(window, self._bulk_shapes))
        filled = {rows.shape for rows in batches if rows.segment_ids[:, 0].all()}
        yield from self._pool.map(run, [shape for shape in self._bulk_shapes.shapes() if shape not in filled])

    def close(self) -> None:
        """Release the engine. The encoder cannot be used afterwards. Closing twice is allowed."""
        if not self._lifetime.end():
            return
        if self._twin is not None:
            self._twin.close()
        self._pool.shutdown(cancel_futures=True)
        with ExitStack() as turns:  # wait for batches that run in their callers' threads
            for _ in range(self.engine.streams):
                turns.enter_context(self._turns)
            self.engine.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, texts: Iterator[object], window: int) -> Iterator[Encoded]:
        running: deque[PendingWindow] = deque()
        try:
            while window_texts := list(islice(texts, window)):
                # Intermediate lengths need full batches for every stream, so a few texts never use them.
                running.append(self.begin(window_texts, direct=len(window_texts) < window and not running, bulk=True))
                if len(running) > 2:
                    yield self.finish(running.popleft())
            while running:
                yield self.finish(running.popleft())
        finally:  # the caller stopped early or a batch failed: cancel what nobody will collect
            for left in running:
                for output in left.outputs:
                    output.cancel()

    def _pack(self, tokenized: Tokenized, shape_set: ShapeSet) -> list[PackedBatch]:
        ids, lengths, unpadded = tokenized.ids, tokenized.lengths, tokenized.unpadded_lengths
        batches = pack(ids, lengths, shape_set, streams=self.engine.streams, unpadded_lengths=unpadded)
        return [locate(batch, tokenized, per_token=self.spec.per_token) for batch in batches]

    def _run(self, batch: PackedBatch) -> Vectors:
        """Run one batch and return the vectors [m, width] of its pieces or tokens."""
        with self._turns:
            self._lifetime.check()
            began = time.perf_counter()
            out = self.engine.run(batch.rows)
        self._counters.add(infer_s=time.perf_counter() - began)
        return out.reshape(-1, out.shape[-1])[batch.slots]
