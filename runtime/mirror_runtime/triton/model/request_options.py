"""What a request may ask for besides its texts, and what a wrong wish is told. Knows nothing of Triton's classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mirror_runtime.bundle import EncoderSpec, VectorType
from mirror_runtime.errors import InputError
from mirror_runtime.tokenizer import LongTexts

KNOWN = ("dimensions", "prompt", "truncate")
LONGEST_PROMPT = 1000
"""Characters: it is tokenised with every text of the request."""

_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What one request asks for.

    Attributes:
        long_texts: what happens to texts over the encoder's `max_tokens`; None for the server's own policy.
        dimensions: leading components to keep (Matryoshka); None for all.
        prompt: what is put in front of every text, literally.
    """

    long_texts: LongTexts | None = None
    dimensions: int | None = None
    prompt: str = ""


NONE = RequestOptions()


def read_wishes(text: str, spec: EncoderSpec) -> RequestOptions:
    """Read a request's parameters, strictly.

    Args:
        text: JSON, as Triton gives it.
        spec: the encoder's.

    Raises:
        InputError: naming the parameter, what is wrong with it, and what would be right.
    """
    try:
        given: dict[str, Any] = json.loads(text) if text else {}
    except ValueError:
        raise InputError("the request's parameters are not valid Unicode") from None
    if not given:
        return NONE
    unknown = sorted(given.keys() - set(KNOWN))
    if unknown:
        raise InputError(f"unknown parameter {_shown(unknown[0])}: known are {', '.join(KNOWN)}")
    return RequestOptions(
        long_texts=_long_texts(given["truncate"]) if "truncate" in given else None,
        dimensions=_dimensions(given["dimensions"], spec) if "dimensions" in given else None,
        prompt=_prompt(given["prompt"], spec) if "prompt" in given else "",
    )


def _long_texts(value: object) -> LongTexts:
    if not isinstance(value, bool):
        raise InputError(f"parameter 'truncate' is {_shown(value)}: it is true (cut long texts) or false (refuse them)")
    return LongTexts.TRUNCATE if value else LongTexts.ERROR


def _dimensions(value: object, spec: EncoderSpec) -> int:
    bits = spec.vector_type is VectorType.BINARY
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= spec.dim or (bits and value % 8):
        multiple = ", a multiple of 8" if bits else ""
        raise InputError(f"parameter 'dimensions' is {_shown(value)}: it is a number from 1 to {spec.dim}{multiple}")
    return value


def _prompt(value: object, spec: EncoderSpec) -> str:
    if not isinstance(value, str):
        raise InputError(f"parameter 'prompt' is {_shown(value)}: it is the text to put in front, such as 'query: '")
    if len(value) > LONGEST_PROMPT:
        raise InputError(f"parameter 'prompt' has {len(value)} characters: it may have {LONGEST_PROMPT}")
    if value and spec.template is not None:
        raise InputError("parameter 'prompt' cannot be used here: this encoder puts every text into its own template")
    return value


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
