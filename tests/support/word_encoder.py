"""An encoder without a model: a text's vector is the sum of fixed random vectors of its words."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DIM = 48


def encode_words(texts: Sequence[str]) -> NDArray[np.float32]:
    """Encode texts to float32 [n, 48]: texts with the same words, in any order and case, have one direction."""
    return np.stack([_word("") * 0.01 + sum(map(_word, text.lower().split())) for text in texts]).astype(np.float32)


def encode_equal(texts: Sequence[str]) -> NDArray[np.float32]:
    """Encode every text to the same vector."""
    return np.ones((len(texts), DIM), np.float32)


def _word(word: str) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).normal(size=DIM)
