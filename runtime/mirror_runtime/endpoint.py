"""Any embeddings endpoint: ask it for vectors, keep those of canary texts, and say later what has changed."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.canaries import DIFFERENT_MODEL_BELOW
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.folders import replace_file
from mirror_runtime.strict_json import parse_json
from mirror_runtime.vectors import SMALLEST_NORM, agreement, cosines, unit_rows

T = TypeVar("T")

TEXTS_A_REQUEST = 32
TIMEOUT_S = 120

FLOOR = 0.999
"""Vectors of the same text below this cosine have drifted. bf16 and most int8 encoders stay above it."""

SAME = 0.99
"""Vectors over this cosine belong to the same text; the canaries' own are below it, but for those that were cut."""

LENGTHS = (20, 60, 120, 240, 480, 1000)
"""Words after which a pair of canaries differs: where a pair is equal, texts are cut before."""

_SHORT = (
    "a small boat crosses the lake",
    "yes",
    "The committee postponed its decision on the new railway bridge until the end of next month.",
    "def remove(path): shutil.rmtree(path, ignore_errors=True)",
    "Zwei Häuser stehen am See.",
    "她昨天买了一本关于海洋的书。",
    "How do I reset my password?",
    "12,5 % of 480 = 60",
    "penicillin allergy",
    "the dog did not bite the man",
    "The stock fell sharply after the company cut its forecast for a second time this year.",
    "🙂 great!!!",
)
_WORDS = "when evening train left station many people still waited with bags under a wide roof"


class EndpointVerdict(str, Enum):
    """What became of an endpoint."""

    AGREES = "agrees"
    DRIFTED = "drifted"
    """The same model, less exact: another precision, machine or library."""
    ANOTHER_MODEL = "another model"
    ANOTHER_LIMIT = "another limit"
    """Short texts have the same vectors, and long ones are cut elsewhere."""
    ANOTHER_LENGTH = "another length"
    """The same directions, scaled otherwise: normalised now, or no longer."""
    ANOTHER_ORDER = "another order"
    """The vectors are those of other texts of the request."""
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True)
class EndpointCheck:
    """An endpoint compared with what was kept of it."""

    verdict: EndpointVerdict
    problem: str = ""  # for people
    min_cosine: float | None = None  # the worst text's


@dataclass(frozen=True, kw_only=True)
class EndpointCanaries:
    """The vectors that an endpoint gave for the canary texts."""

    endpoint: str
    model: str | None
    texts: tuple[str, ...]
    vectors: tuple[tuple[float, ...], ...]


class Endpoint:
    """An endpoint that speaks OpenAI's embeddings request, or TEI's where its address ends in /embed.

    Args:
        address: such as `http://HOST:PORT/v1`, with `#MODEL` if it serves several.
        key: sent as a bearer token.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self.url, _, name = address.rstrip("/").partition("#")
        self.url = self.url.removesuffix("/embeddings")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.model: str | None = name or None
        self._tei = self.url.endswith("/embed")
        if not self._tei and self.model is None:
            models = self._ask("/models", None, lambda answer: [str(one["id"]) for one in answer["data"]])
            if len(models) != 1:
                raise InputError(f"{self.url} serves {len(models)} models: name one, as in {self.url}#MODEL")
            self.model = models[0]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors [n, dim] of texts.

        Raises:
            ServerError: it cannot be reached, refuses, or answers something else.
        """
        rows: list[list[float]] = []
        for start in range(0, len(texts), TEXTS_A_REQUEST):
            part = list(texts[start : start + TEXTS_A_REQUEST])
            if self._tei:
                vectors = self._ask("", {"inputs": part, "truncate": True}, _numbers)
            else:
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
        try:
            request = urllib.request.Request(self.url + path, data, self._headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return read(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode("utf-8", "replace")
            raise ServerError(f"{self.url}{path} answered with status {error.code}: {detail}") from error
        except (KeyError, TypeError) as error:
            api = "TEI" if self._tei else "OpenAI's API"
            raise ServerError(f"{self.url}{path} does not answer as {api} does ({error})") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path} cannot be asked: {getattr(error, 'reason', error)}") from error


def take_canaries(endpoint: Endpoint) -> EndpointCanaries:
    """Ask an endpoint for the canaries' vectors.

    Raises:
        ServerError: it does not answer, or a text alone has another vector than among others.
    """
    texts = (*_SHORT, *_long_texts())
    vectors = endpoint.encode(texts)
    alone = np.concatenate([endpoint.encode([text]) for text in texts[:3]])
    check = _compare(vectors[:3], alone, texts[:3])
    if check.verdict is not EndpointVerdict.AGREES:
        raise ServerError(
            f"{endpoint.url} does not return a text's vector alone as among others: {check.problem}. Nothing was kept"
        )
    rows = tuple(tuple(map(float, row)) for row in vectors)
    return EndpointCanaries(endpoint=endpoint.url, model=endpoint.model, texts=texts, vectors=rows)


def check_endpoint(endpoint: Endpoint, kept: EndpointCanaries) -> EndpointCheck:
    """Ask an endpoint for the canaries' vectors again, and compare."""
    return _compare(np.array(kept.vectors, np.float32), endpoint.encode(kept.texts), kept.texts)


def cut_before(vectors: NDArray[np.floating[Any]]) -> int | None:
    """Return a number of words that texts are cut before, from the canaries' vectors; None if none was cut."""
    pairs = vectors[len(_SHORT) :].reshape(len(LENGTHS), 2, -1)
    equal = cosines(pairs[:, 0], pairs[:, 1]) > FLOOR
    return next((count for count, same in zip(LENGTHS, equal, strict=True) if same), None)


def write_endpoint_canaries(kept: EndpointCanaries, path: Path) -> None:
    """Write canaries as JSON."""
    with replace_file(path) as beside:
        beside.write_text(json.dumps(asdict(kept), ensure_ascii=False) + "\n", encoding="utf-8")


def read_endpoint_canaries(path: Path) -> EndpointCanaries:
    """Read what `write_endpoint_canaries` wrote.

    Raises:
        InputError: it is something else.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        vectors = np.array(data["vectors"], np.float32)
        if vectors.ndim != 2 or data["texts"] != [*_SHORT, *_long_texts()] or len(vectors) != len(data["texts"]):
            raise ValueError("other texts")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no canaries of an endpoint ({error}): delete it to keep new ones") from error
    fields: Mapping[str, Any] = {**data, "texts": tuple(data["texts"]), "vectors": tuple(map(tuple, data["vectors"]))}
    return EndpointCanaries(**{name: fields[name] for name in ("endpoint", "model", "texts", "vectors")})


def _compare(kept: NDArray[np.float32], found: NDArray[np.float32], texts: Sequence[str]) -> EndpointCheck:
    if kept.shape != found.shape:
        problem = f"vectors have {found.shape[-1]} components, and had {kept.shape[-1]}"
        return EndpointCheck(verdict=EndpointVerdict.ANOTHER_MODEL, problem=problem)
    nothing = ~kept.any(axis=1)  # static encoders return zeros for a text of unknown tokens only
    if not np.isfinite(found).all() or not found.any() or not (found.any(axis=1) | nothing).all():
        return EndpointCheck(verdict=EndpointVerdict.BROKEN, problem="vectors are zero or not finite")
    short = slice(len(_SHORT))
    all_cosines = agreement(found, kept)
    worst, worst_short = float(all_cosines.min()), float(all_cosines[short].min())
    matches = unit_rows(found) @ unit_rows(kept).T
    matches[np.ix_(~found.any(axis=1), nothing)] = 1.0
    norms, before = (np.maximum(np.linalg.norm(vectors, axis=1), SMALLEST_NORM) for vectors in (found, kept))
    lengths = norms / before
    whole = len(texts) > len(_SHORT)
    cuts = (cut_before(kept), cut_before(found)) if whole else (None, None)
    moved = np.flatnonzero(all_cosines < DIFFERENT_MODEL_BELOW)
    only_moved = min(matches.max(axis=0).min(), matches.max(axis=1).min()) > SAME
    verdict, problem = EndpointVerdict.AGREES, ""
    if moved.size and only_moved:
        at = int(moved[0])
        verdict = EndpointVerdict.ANOTHER_ORDER
        problem = f"text {at} ({texts[at][:40]!r}) has the vector of text {matches[at].argmax()}"
    elif worst_short < DIFFERENT_MODEL_BELOW:
        verdict, problem = EndpointVerdict.ANOTHER_MODEL, f"cosine {worst_short:.4f} for a short text"
    elif worst_short < FLOOR:
        verdict, problem = EndpointVerdict.DRIFTED, f"cosine {worst_short:.6f} for a short text"
    elif np.abs(lengths - 1).max() > 1 - FLOOR:
        verdict = EndpointVerdict.ANOTHER_LENGTH
        problem = f"vectors are {lengths.min():.3f} to {lengths.max():.3f} times as long"
    elif cuts[0] != cuts[1] or worst < FLOOR:
        verdict = EndpointVerdict.ANOTHER_LIMIT
        before, now = (f"before {cut} words" if cut else "nowhere" for cut in cuts)
        problem = f"long texts were cut {before} and are cut {now}; cosine {worst:.6f} for a long text"
    return EndpointCheck(verdict=verdict, problem=problem, min_cosine=worst)


def _long_texts() -> list[str]:
    """Return two texts for each of `LENGTHS`, of so many words in common and as many different ones after them."""
    texts = []
    for count in LENGTHS:
        common = " ".join(islice(cycle(_WORDS.split()), count))
        texts += [f"{common} {' '.join([word] * count)}" for word in ("river", "machine")]
    return texts


def _in_order(answer: Any) -> list[list[float]]:
    return _numbers([one["embedding"] for one in sorted(answer["data"], key=lambda one: int(one["index"]))])


def _numbers(rows: Any) -> list[list[float]]:
    if not all(isinstance(row, list) and all(isinstance(value, (int, float)) for value in row) for row in rows):
        raise TypeError("embeddings must be lists of numbers")
    return list(rows)
