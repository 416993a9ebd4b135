"""Several vectors of a text, each with the characters that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.encoded import Encoded
from mirror_runtime.errors import InputError
from mirror_runtime.pairs import PairTokenizer
from mirror_runtime.tokenizer import Tokenizer
from mirror_runtime.vectors import Vectors


@dataclass(frozen=True)
class Spans:
    """The vectors of a text's spans.

    Attributes:
        vectors: [spans, width]: float32 [tokens, dim] where the spans are tokens.
        offsets: int64 [spans, 2], half-open ranges of the text's characters; 0, 0 for special tokens, which stand for
            no characters, and for a prompt's.
    """

    vectors: Vectors
    offsets: NDArray[np.int64]


def check_token_vectors(spec: EncoderSpec) -> None:
    """Raise an `InputError` for an encoder whose tokens have no vectors of their own."""
    if not spec.per_token:
        raise InputError(
            f"this encoder's pooling is {spec.pooling.value}, which leaves no vectors of tokens: export it with "
            "--pooling tokens"
        )


def token_spans(
    encoded: Encoded, tokenizer: Tokenizer | PairTokenizer, texts: Sequence[object], skip: int
) -> list[Spans]:
    """Join the vectors of tokens with their characters after `skip`; raise for the first bad text."""
    encoded.vectors_or_raise()
    assert isinstance(tokenizer, Tokenizer)  # pairs have no vectors of tokens
    offsets = map(np.concatenate, tokenizer.offsets([str(text) for text in texts], skip))
    return [Spans(*pair) for pair in zip(encoded.by_text(), offsets, strict=True)]
