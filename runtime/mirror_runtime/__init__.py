"""Mirror Runtime: text to vectors you can prove.

`Encoder.load("bundle").encode(texts)` returns float32 vectors. Importing this package does not load an engine;
loading a bundle does.
"""

from typing import TYPE_CHECKING, Any

from mirror_runtime.encoder import Encoded, Encoder
from mirror_runtime.errors import (
    BundleError,
    EngineError,
    InputError,
    MirrorError,
    MissingExtra,
    OverloadedError,
    ParityError,
    ServerError,
    TextError,
)
from mirror_runtime.reranker import Ranked, Reranker
from mirror_runtime.spans import Spans
from mirror_runtime.stats import Stats
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.vector_cache import CacheStats, VectorCache

if TYPE_CHECKING:
    from mirror_runtime.async_encoder import AsyncEncoder, AsyncStats

__version__ = "0.1.0"

__all__ = [
    "AsyncEncoder",
    "AsyncStats",
    "BundleError",
    "CacheStats",
    "Encoded",
    "Encoder",
    "EngineError",
    "InputError",
    "LongTexts",
    "MirrorError",
    "MissingExtra",
    "OverloadedError",
    "ParityError",
    "Ranked",
    "Reranker",
    "ServerError",
    "Spans",
    "Stats",
    "TextError",
    "VectorCache",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import what needs asyncio on first use: importing it takes a tenth of the time to a first vector."""
    if name in ("AsyncEncoder", "AsyncStats"):
        from mirror_runtime import async_encoder

        return getattr(async_encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
