"""Parse and validate a request's optional parameters. Independent of Triton's own classes."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mirror_runtime.bundle import EncoderSpec, VectorType
from mirror_runtime.errors import InputError
from mirror_runtime.pairs import LONGEST_QUERY
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.twins import Speed
from mirror_runtime.vectors import check_cuts

KNOWN = ("dimensions", "prompt", "query", "speed", "truncate")
LONGEST_PROMPT = 1000
"""In characters. The prompt is tokenised with every text of the request."""

_LONGEST_QUOTE = 60


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of one request."""

    long_texts: LongTexts | None = None  # None for the server's policy
    dimensions: int | None = None  # leading components to keep (Matryoshka); None for all
    prompt: str = ""  # put in front of every text, literally
    query: str | None = None  # what a reranker scores the texts against
    speed: Speed = Speed.FULL


DEFAULTS = RequestOptions()


def parse_options(text: str, spec: EncoderSpec, trained: Collection[int] = (), *, fast: bool = False) -> RequestOptions:
    """Parse a request's JSON parameters, strictly. An `InputError` names the wrong one and the valid values.

    `trained` has the numbers of dimensions, fewer than all, for which the encoder was trained; `fast` says whether a
    static twin runs beside it.
    """
    try:
        parameters: dict[str, Any] = json.loads(text) if text else {}
    except ValueError:
        raise InputError("the request's parameters are not valid Unicode") from None
    if not parameters:
        return DEFAULTS
    unknown = sorted(parameters.keys() - set(KNOWN))
    if unknown:
        raise InputError(f"unknown parameter {_quoted(unknown[0])}: known are {', '.join(KNOWN)}")
    return RequestOptions(
        long_texts=_long_texts(parameters["truncate"]) if "truncate" in parameters else None,
        dimensions=_dimensions(parameters["dimensions"], spec, trained) if "dimensions" in parameters else None,
        prompt=_prompt(parameters["prompt"], spec) if "prompt" in parameters else "",
        query=_query(parameters["query"], spec) if "query" in parameters else None,
        speed=_speed(parameters["speed"], fast) if "speed" in parameters else Speed.FULL,
    )


def _long_texts(value: object) -> LongTexts:
    if not isinstance(value, bool):
        raise InputError(
            f"parameter 'truncate' is {_quoted(value)}: it must be true (cut long texts) or false (reject them)"
        )
    return LongTexts.TRUNCATE if value else LongTexts.ERROR


def _dimensions(value: object, spec: EncoderSpec, trained: Collection[int]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (*trained, spec.dim):
        raise InputError(
            f"parameter 'dimensions' is {_quoted(value)}: this encoder's vectors may have "
            f"{', '.join(map(str, (*trained, spec.dim)))}; name those that it was trained for with --dimensions"
        )
    return value


def check_trained(trained: Collection[int], spec: EncoderSpec) -> None:
    """Check that vectors can be cut to each of these dimensions, see `check_cuts`."""
    check_cuts(trained, spec.dim, spec.trained_dims, multiple=8 if spec.vector_type is VectorType.BINARY else 1)


def _prompt(value: object, spec: EncoderSpec) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"parameter 'prompt' is {_quoted(value)}: it must be the text to put in front, such as 'query: '"
        )
    if len(value) > LONGEST_PROMPT:
        raise InputError(f"parameter 'prompt' has {len(value)} characters: it may have {LONGEST_PROMPT}")
    if value and spec.scores_pairs:
        raise InputError("parameter 'prompt' cannot be used here: put it before the query or the texts")
    if value and spec.template is not None:
        raise InputError("parameter 'prompt' cannot be used here: this encoder puts every text into its own template")
    return value


def _query(value: object, spec: EncoderSpec) -> str:
    if not spec.scores_pairs:
        raise InputError("parameter 'query' is for rerankers: this encoder has vectors, of the query as of any text")
    if not isinstance(value, str) or len(value) > LONGEST_QUERY:
        raise InputError(f"parameter 'query' must be a text of at most {LONGEST_QUERY} characters")
    return value


def _speed(value: object, fast: bool) -> Speed:
    if value not in tuple(Speed):
        raise InputError(f"parameter 'speed' is {_quoted(value)}: it must be full or fast")
    if value == Speed.FAST and not fast:
        raise InputError("parameter 'speed' is 'fast': no static twin runs here; export/pair.py adds one to a bundle")
    return Speed(value)


def _quoted(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"
