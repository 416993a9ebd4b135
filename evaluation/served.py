"""What ships, as `encode` functions: a bundle in this process, an OpenAI-compatible endpoint, a Triton server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.vectors import Encode
from mirror_runtime.bundle import MANIFEST_FILE, EncoderSpec
from mirror_runtime.client import Client
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.vectors import Vectors, components

TRITON, HTTP = "triton://", ("http://", "https://")

T = TypeVar("T")

TEXTS_A_REQUEST = 32
TIMEOUT_S = 120


def is_served(name: str) -> bool:
    """Return whether `open_served` opens this name."""
    return name.startswith((TRITON, *HTTP)) or _bundle(name) is not None


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
        return _Endpoint(name).encode, None
    if (bundle := _bundle(name)) is None:
        return None
    folder, precision = bundle
    encoder = around.enter_context(Encoder.load(folder, precision=precision))
    return partial(_components, encoder), encoder.spec


def _bundle(name: str) -> tuple[str, str] | None:
    """Return a bundle's folder and precision."""
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


def _in_order(answer: Any) -> list[list[float]]:
    rows = [one["embedding"] for one in sorted(answer["data"], key=lambda one: int(one["index"]))]
    if not all(isinstance(row, list) and all(isinstance(value, (int, float)) for value in row) for row in rows):
        raise TypeError("embeddings must be lists of numbers")
    return rows


class _Endpoint:
    """An endpoint that speaks OpenAI's embeddings request."""

    def __init__(self, name: str) -> None:
        self.url, _, self.model = name.rstrip("/").partition("#")
        if not self.model:
            models = self._ask("/models", None, lambda answer: [str(one["id"]) for one in answer["data"]])
            if len(models) != 1:
                raise InputError(f"{self.url} serves {len(models)} models: name one, as in {self.url}#MODEL")
            self.model = models[0]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows: list[list[float]] = []
        for start in range(0, len(texts), TEXTS_A_REQUEST):
            part = list(texts[start : start + TEXTS_A_REQUEST])
            body = {"model": self.model, "input": part, "encoding_format": "float"}
            vectors = self._ask("/embeddings", body, _in_order)
            if len(vectors) != len(part):
                raise ServerError(f"{self.url} returned {len(vectors)} vectors for {len(part)} texts")
            if other := {len(vector) for vector in vectors} - {len((rows or vectors)[0])}:
                raise ServerError(
                    f"{self.url} returned vectors of {len((rows or vectors)[0])} components first and of {other.pop()} "
                    f"after {start} texts: it must not be replaced while it is measured"
                )
            rows += vectors
        return np.array(rows, np.float32)

    def _ask(self, path: str, body: object, read: Callable[[Any], list[T]]) -> list[T]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return read(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answered with status {error.code}: {detail}") from error
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url}{path} does not answer as OpenAI's API does ({error})") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path} cannot be asked: {getattr(error, 'reason', error)}") from error
