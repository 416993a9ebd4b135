"""A cache of vectors: a text that comes again is not computed again. Off unless asked for.

An entry belongs to all that decides a vector (`VectorCache.of`) and to one text. It is bytes, so nobody can change it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, Manifest
from mirror_runtime.encoded import Encoded
from mirror_runtime.errors import InputError
from mirror_runtime.plan import Decision
from mirror_runtime.vectors import dtype_of, width_of

KEY_BYTES = 24
"""Of a text's digest: two texts with equal ones would take 2^96 tries to find."""

ENTRY_BYTES = 320
"""What an entry takes besides its vector: the objects of Python, and its share of the table."""


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """The counters of a `VectorCache`.

    Attributes:
        hits: texts that it had.
        misses: texts that it had not.
        entries: vectors in it now.
        bytes: what they take.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


class VectorCache:
    """Holds the vectors asked for last, for one encoder or several, in at most `max_bytes` of memory.

    Safe to use from several threads.

    Raises:
        InputError: `max_bytes` is not positive.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}: it must be at least 1")
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._records: OrderedDict[bytes, bytes] = OrderedDict()  # the one used last is the last
        self._bytes = self._hits = self._misses = 0

    @property
    def stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        with self._lock:
            entries = len(self._records)
            return CacheStats(hits=self._hits, misses=self._misses, entries=entries, bytes=self._bytes)

    def of(self, manifest: Manifest, decision: Decision, *options: object) -> CachedVectors:
        """Return the part for one encoder's vectors: of its fingerprint, as it is decided, with options by `repr`.

        Raises:
            InputError: one of its vectors is larger than the cache, or its texts have no vector of their own.
        """
        if manifest.encoder.per_token:
            raise InputError("a vector cache holds one vector of a text, and pooling tokens has one of each token")
        graph = None if decision.artifact is None else manifest.files.get(decision.artifact.path)
        ran = (decision.engine, decision.precision, decision.row_tokens, decision.batch_tokens)
        part = CachedVectors(self, (manifest.fingerprint, graph, *ran, *options), manifest.encoder)
        if part.entry_bytes > self.max_bytes:
            raise InputError(
                f"a vector cache of {self.max_bytes:,} bytes holds not one vector of this encoder: an entry takes "
                f"{part.entry_bytes:,}"
            )
        return part

    def find(self, keys: Sequence[bytes | None]) -> list[bytes | None]:
        """Return the records of keys, and None for those that it has not. A key that is None is not counted."""
        with self._lock:
            records = [self._records.get(key) if key is not None else None for key in keys]
            for key, record in zip(keys, records, strict=True):
                if key is not None and record is not None:
                    self._records.move_to_end(key)
                    self._hits += 1
                elif key is not None:
                    self._misses += 1
        return records

    def keep(self, records: Mapping[bytes, bytes]) -> None:
        """Add records, and drop those not used for longest. A key keeps the record that it has."""
        with self._lock:
            for key, record in records.items():
                if key not in self._records:
                    self._records[key] = record
                    self._bytes += len(record) + ENTRY_BYTES
                    while self._bytes > self.max_bytes:
                        self._bytes -= len(self._records.popitem(last=False)[1]) + ENTRY_BYTES


class CachedVectors:
    """One encoder's part of a `VectorCache`."""

    def __init__(self, cache: VectorCache, space: tuple[object, ...], spec: EncoderSpec) -> None:
        self.cache = cache
        self._prefix = blake2b(repr(space).encode() + b"\0", digest_size=KEY_BYTES)  # repr has no NUL
        fields = [("vectors", dtype_of(spec), (width_of(spec),)), ("tokens", np.int64), ("truncated", np.bool_)]
        self._record = np.dtype(fields)
        self._pairs = spec.scores_pairs
        self.entry_bytes = self._record.itemsize + ENTRY_BYTES

    def look_up(self, texts: Sequence[object]) -> LookUp:
        """Look up texts, or for a reranker pairs. What is neither is missing, and gets its error when it is encoded."""
        keys = [self._key(text) for text in texts]
        records = self.cache.find(keys)
        hits = [i for i, record in enumerate(records) if record is not None]
        missing = [i for i, record in enumerate(records) if record is None]
        found = np.frombuffer(b"".join(record for record in records if record is not None), self._record)
        to_encode = [text for text, record in zip(texts, records, strict=True) if record is None]
        return LookUp(self.cache, keys, hits, found, missing, to_encode)

    def _key(self, item: object) -> bytes | None:
        """Return the digest of the space and a text or pair; None if it is neither."""
        pair = isinstance(item, (tuple, list))
        parts: Any = item if pair else (item,)
        if pair != self._pairs or len(parts) != 1 + pair or not all(isinstance(part, str) for part in parts):
            return None
        digest = self._prefix.copy()
        try:
            if self._pairs:  # no other pair becomes the same bytes
                digest.update(b"%d," % len(parts[0]))
            digest.update("".join(parts).encode())
        except UnicodeEncodeError:  # a lone surrogate
            return None
        return digest.digest()


@dataclass(frozen=True)
class LookUp:
    """What a cache has of some texts, and the texts to encode."""

    _cache: VectorCache
    _keys: Sequence[bytes | None]
    _hits: Sequence[int]
    _found: NDArray[Any]
    _missing: Sequence[int]
    missing: Sequence[Any]

    def complete(self, encoded: Encoded) -> Encoded:
        """Keep the missing texts' results, and return those of all in their order; the arrays are the caller's."""
        new = np.empty(len(self.missing), self._found.dtype)
        new["vectors"], new["tokens"], new["truncated"] = encoded.vectors, encoded.tokens, encoded.truncated
        data, size, records = new.tobytes(), new.itemsize, {}
        for at, i in enumerate(self._missing):
            if (key := self._keys[i]) is not None and at not in encoded.errors:
                records[key] = data[at * size : (at + 1) * size]
        self._cache.keep(records)
        every = np.empty(len(self._keys), new.dtype)
        every[self._hits], every[self._missing] = self._found, new
        return Encoded(
            vectors=np.ascontiguousarray(every["vectors"]),
            tokens=every["tokens"].copy(),
            truncated=every["truncated"].copy(),
            errors={(i := self._missing[at]): type(error)(i, error.reason) for at, error in encoded.errors.items()},
        )
