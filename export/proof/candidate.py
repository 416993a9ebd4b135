"""A graph with the engine and precision that are to be proven together: its run on texts, its entry in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.reference import padded_batches
from export.graph.trace import Graph, graph_files
from mirror_runtime.bundle import TOKENIZER_FILE, Artifact, EncoderSpec, EngineName, Parity, Precision
from mirror_runtime.engines.onnxruntime_engine import open_session
from mirror_runtime.engines.openvino_engine import compile_padded
from mirror_runtime.engines.tensorrt_engine import LoadedPlan
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores
from mirror_runtime.pairs import PairTokenizer
from mirror_runtime.pieces import tokens_of
from mirror_runtime.selection import PROVEN_ON
from mirror_runtime.tokenizer import Item, LongTexts, Tokenized, Tokenizer
from mirror_runtime.vectors import components

Vectors = NDArray[np.float32]

Run = Callable[[Mapping[str, NDArray[np.int64]]], Vectors]
"""Compute text vectors from a padded graph's inputs, by name."""

Encode = Callable[[Sequence[Item]], Vectors]
"""Encode texts or pairs, in one ragged batch or several, to the components of their vectors, float32 [n, dim]; for
pooling `tokens` of all tokens, text after text."""


@dataclass(frozen=True)
class Candidate:
    """A graph, an engine and a precision that are to be proven together."""

    graph: Graph
    engine: EngineName
    precision: Precision

    def certified(
        self,
        bundle: Path,
        parity: Parity,
        *,
        path: str | None = None,
        engine_module: str | None = None,
        gpu: str | None = None,
    ) -> Artifact:
        """Return the manifest's entry.

        Args:
            bundle: the finished or unfinished folder.
            parity: the result of the proof.
            path: the graph's path in the finished bundle, where it differs.
            engine_module: record the version that this module states, instead of the version of the engine's package:
                containers bring TensorRT without package metadata.
            gpu: what proved it, where that is a GPU: "auto" takes the artifact on such machines only.
        """
        toolchain = {name: version(name) for name in ("torch", "transformers", "onnx")}
        if self.engine is EngineName.ONNXRUNTIME:  # its package may also be onnxruntime-gpu
            engine_module = "onnxruntime"
        if engine_module is None:
            toolchain[self.engine.value] = version(self.engine.value)
        else:
            toolchain[engine_module] = str(require(engine_module, engine_module).__version__)
        if gpu is not None:
            toolchain[PROVEN_ON] = gpu
        return Artifact(
            path=path or self.graph.path.absolute().relative_to(bundle.absolute()).as_posix(),
            engine=self.engine,
            precision=self.precision,
            layout=self.graph.layout,
            inputs=self.graph.inputs,
            outputs=self.graph.outputs,
            size=sum(file.stat().st_size for file in graph_files(self.graph.path)),
            parity=parity,
            toolchain=toolchain,
        )

    def __str__(self) -> str:
        return f"{self.engine.value} {self.precision.value} {self.graph.layout.value}"

    @contextmanager
    def padded_encode(self, bundle: Path, spec: EncoderSpec) -> Iterator[Encode]:
        """Open a padded graph, which the runtime does not serve, and encode texts in batches of similar lengths.

        Raises:
            EngineError: the engine does not run padded graphs, or cannot open this one.
        """
        # Without `pad_to`: the graph itself pads where the pooling is defined by padding.
        file, limit = bundle / TOKENIZER_FILE, spec.max_tokens
        tokenizer = (
            PairTokenizer(file, limit, LongTexts.TRUNCATE)
            if spec.scores_pairs
            else Tokenizer(file, limit, LongTexts.TRUNCATE, template=spec.template)
        )
        with self._padded_run() as run:

            def encode(texts: Sequence[Item]) -> Vectors:
                tokenized = tokenizer(texts)
                if tokenized.errors:
                    raise InputError(f"a text used for the proof cannot be encoded: {min(tokenized.errors.items())[1]}")
                of = partial(tokens_of, tokenized) if spec.per_token else np.asarray
                size = tokenized.ids.size if spec.per_token else tokenized.lengths.size
                vectors = np.zeros((size, spec.dim), np.float32)
                for batch in padded_batches(tokenized.lengths):
                    feed = padded_feed(tokenized, batch)
                    found = run({item.name: feed[item.name] for item in self.graph.inputs})
                    found = found[feed["attention_mask"].astype(bool)] if spec.per_token else found
                    vectors[of(batch)] = components(found, spec)
                return vectors[of(tokenized.part_piece)]  # each text is one part: too long ones are truncated

            yield encode

    @contextmanager
    def _padded_run(self) -> Iterator[Run]:
        path, output = self.graph.path, self.graph.outputs[-1].name
        if self.engine is EngineName.TENSORRT:
            plan = LoadedPlan(path, streams=1)
            try:
                yield lambda feed: plan.run(feed)[output]
            finally:
                plan.close()
        elif self.engine is EngineName.ONNXRUNTIME:
            session = open_session(path, threads=usable_cores())
            yield lambda feed: session.run([output], feed)[0]
        elif self.engine is EngineName.OPENVINO:
            compiled = compile_padded(path, self.precision)
            yield lambda feed: compiled(feed)[output]
        else:
            raise EngineError(
                f"padded graphs are not proven on {self.engine.value}: choose onnxruntime, openvino or tensorrt"
            )


def padded_feed(tokenized: Tokenized, pieces: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Build the inputs of a padded graph for some pieces of tokenised texts, one in each row."""
    starts = np.cumsum(tokenized.lengths) - tokenized.lengths
    lengths = tokenized.lengths[pieces]
    places = np.arange(lengths.max())[None, :] < lengths[:, None]
    input_ids = np.zeros(places.shape, np.int64)
    input_ids[places] = np.concatenate([tokenized.ids[starts[i] :][: tokenized.lengths[i]] for i in pieces])
    own = lengths if tokenized.unpadded_lengths is None else tokenized.unpadded_lengths[pieces]
    mask = np.arange(lengths.max())[None, :] < own[:, None]
    types = np.zeros_like(input_ids)
    if tokenized.first_lengths is not None:
        types[np.arange(lengths.max())[None, :] >= tokenized.first_lengths[pieces][:, None]] = 1
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "token_type_ids": types * mask}
