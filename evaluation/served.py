"""What ships, as `encode` functions: a bundle in this process, an OpenAI-compatible endpoint, a Triton server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.vectors import Encode
from mirror_runtime.bundle import MANIFEST_FILE, EncoderSpec, read_manifest
from mirror_runtime.client import Client
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.encoder import Encoder
from mirror_runtime.endpoint import Endpoint
from mirror_runtime.pairs import check_has_vectors
from mirror_runtime.vectors import Vectors, components

TRITON, HTTP = "triton://", ("http://", "https://")


def is_served(name: str) -> bool:
    """Return whether `open_served` opens this name."""
    return is_remote(name) or bundle_of(name) is not None


def is_remote(name: str) -> bool:
    """Return whether a server behind this name computes the vectors."""
    return name.startswith((TRITON, *HTTP))


def open_served(name: str, around: ExitStack) -> tuple[Encode, EncoderSpec | None] | None:
    """Open an encoder that is not a PyTorch one, and close it with `around`.

    Args:
        name: a bundle's folder, `BUNDLE:PRECISION`, `triton://HOST:PORT`, with `/MODEL` if it is not `embed`, or an
            address such as `http://HOST:PORT/v1`, with `#MODEL` if it serves several.
        around: closes it.

    Returns:
        The function and, where it is known, its spec; None for any other name.

    Raises:
        MirrorError: it cannot be loaded or reached.
    """
    if name.startswith(TRITON):
        url, _, model = name.removeprefix(TRITON).partition("/")
        client = around.enter_context(Client(url, model=model or MODEL_NAME))
        return lambda texts: _floats(client.encode(texts)), None
    if name.startswith(HTTP):
        return Endpoint(name).encode, None
    if (bundle := bundle_of(name)) is None:
        return None
    folder, precision = bundle
    check_has_vectors(read_manifest(Path(folder)).encoder)
    encoder = around.enter_context(Encoder.load(folder, precision=precision))
    return partial(_components, encoder), encoder.spec


def bundle_of(name: str) -> tuple[str, str] | None:
    """Return the folder and precision of a bundle that a name names."""
    for folder, precision in ((name, "auto"), name.rpartition(":")[::2]):
        if folder and (Path(folder) / MANIFEST_FILE).is_file():
            return folder, precision
    return None


def _components(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.float32]:
    return components(encoder.encode(texts), encoder.spec)


def _floats(vectors: Vectors) -> NDArray[np.float32]:
    """Convert a server's vectors, whose int8 scale no cosine depends on."""
    return (
        np.unpackbits(vectors, axis=-1) * np.float32(2) - 1 if vectors.dtype == np.uint8 else vectors.astype(np.float32)
    )
