"""Mirror Runtime: text to vectors you can prove.

`Encoder.load("bundle").encode(texts)` gives float32 vectors. Importing this package loads no engine: the one that a
bundle is loaded with is imported then.
"""

from mirror_runtime.encoder import Encoded, Encoder, Stats
from mirror_runtime.errors import (
    BundleError,
    EngineError,
    InputError,
    MirrorError,
    MissingExtra,
    ParityError,
    ServerError,
    TextError,
)
from mirror_runtime.tokens import LongTexts

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "Encoded",
    "Encoder",
    "EngineError",
    "InputError",
    "LongTexts",
    "MirrorError",
    "MissingExtra",
    "ParityError",
    "ServerError",
    "Stats",
    "TextError",
    "__version__",
]
