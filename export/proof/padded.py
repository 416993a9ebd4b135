"""Run a padded graph on texts: the runtime itself serves packed graphs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.reference import padded_batches
from export.proof.candidate import Candidate
from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec, EngineName, Precision
from mirror_runtime.engines.onnxruntime_engine import open_session
from mirror_runtime.engines.openvino_engine import compile_padded
from mirror_runtime.engines.tensorrt_engine import LoadedPlan
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.host import usable_cores
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer
from mirror_runtime.vectors import components

Vectors = NDArray[np.float32]

Feed = Mapping[str, NDArray[np.int64]]
"""Arrays by the names of a graph's inputs."""

Run = Callable[[Feed], Vectors]
"""Compute text vectors from a padded graph's inputs."""

Encode = Callable[[Sequence[str]], Vectors]
"""Encode texts, in one ragged batch or several, to the components of their vectors, float32 [n, dim]."""


@contextmanager
def padded_run(graph: Path, engine: EngineName, precision: Precision) -> Iterator[Run]:
    """Open a padded graph in the engine that serves it.

    Raises:
        EngineError: the engine does not run padded graphs, or cannot open this one.
    """
    if engine is EngineName.TENSORRT:
        plan = LoadedPlan(graph, streams=1)
        try:
            yield lambda feed: plan.run(feed)["sentence_embedding"]
        finally:
            plan.close()
    elif engine is EngineName.ONNXRUNTIME:
        session = open_session(graph, threads=usable_cores())
        yield lambda feed: session.run(["sentence_embedding"], feed)[0]
    elif engine is EngineName.OPENVINO:
        compiled = compile_padded(graph, precision)
        yield lambda feed: compiled(feed)["sentence_embedding"]
    else:
        raise EngineError(f"padded graphs are not proven on {engine.value}: choose onnxruntime, openvino or tensorrt")


def padded_feed(tokenized: Tokenized, pieces: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Build the inputs of a padded graph for some pieces of tokenised texts, one in each row."""
    starts = np.cumsum(tokenized.lengths) - tokenized.lengths
    lengths = tokenized.lengths[pieces]
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    input_ids = np.zeros(mask.shape, np.int64)
    input_ids[mask] = np.concatenate([tokenized.ids[starts[i] :][: tokenized.lengths[i]] for i in pieces])
    zeros = np.zeros_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "token_type_ids": zeros}


def padded_encode(run: Run, folder: Path, candidate: Candidate, spec: EncoderSpec) -> Encode:
    """Return a function that encodes texts through a padded graph, in batches of similar lengths."""
    # Without `pad_to`: the graph itself pads where the pooling is defined by padding.
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, spec.max_tokens, LongTexts.TRUNCATE, template=spec.template)

    def encode(texts: Sequence[str]) -> Vectors:
        tokenized = tokenizer(texts)
        if tokenized.errors:
            raise InputError(f"a text used for the proof cannot be encoded: {min(tokenized.errors.items())[1]}")
        vectors = np.zeros((tokenized.lengths.size, spec.dim), np.float32)
        for batch in padded_batches(tokenized.lengths):
            feed = padded_feed(tokenized, batch)
            vectors[batch] = components(run({tensor.name: feed[tensor.name] for tensor in candidate.inputs}), spec)
        return vectors[tokenized.part_piece]  # each text is one part: too long ones are truncated

    return encode
