"""Which texts are held out from tuning: the same ones in any order of the corpus, in every command."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def text_hash(text: str) -> str:
    """Return what decides whether a text is held out."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def first_by_hash(texts: Iterable[str], count: int) -> list[str]:
    """Return the distinct texts with the smallest hashes: of a larger count, all of a smaller one and more."""
    return sorted(set(texts), key=text_hash)[:count]
