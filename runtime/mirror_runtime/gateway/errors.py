"""Refusals: what the gateway says to a client whose request it does not answer, in the shape of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mirror_runtime.client.protocol import Rejected
from mirror_runtime.errors import DeadlineExceededError, InputError, OverloadedError, TextError, UnavailableError

RETRY_AFTER_S = 1
"""What a client is told to wait where nobody knows better: a full queue of short texts is gone after seconds."""

_KINDS: Mapping[int, str] = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class Refusal(Exception):
    """A request that is not answered with vectors.

    Args:
        status: of HTTP.
        code: what programs tell refusals apart by.
        message: what people read: what is wrong, and the cure. No path and no traceback.
        param: the field of the request that is at fault; None where it is none.
        retry_after_s: when another try makes sense; None where it never does.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's word for whose fault it is."""
        if self.status == 503:
            return "service_unavailable"
        return _KINDS.get(self.status, "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside the body."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> bytes:
        """Give the JSON body."""
        param = None if self.param is None else shown(self.param)
        return orjson.dumps({"error": {"message": self.message, "type": self.kind, "param": param, "code": self.code}})


def shown(name: str) -> str:
    """Make a name that a client made up fit for an answer: it may hold anything, in any length."""
    fit = name.encode("utf-8", "replace").decode("utf-8")
    return fit if len(fit) <= _LONGEST else f"{fit[:_LONGEST]}…"


_LONGEST = 100


def overloaded(message: str, retry_after_s: float | None = None) -> Refusal:
    """Refuse because too much waits already."""
    return Refusal(429, "overloaded", message, retry_after_s=retry_after_s or RETRY_AFTER_S)


def unavailable(code: str, message: str) -> Refusal:
    """Refuse because nobody can compute right now."""
    return Refusal(503, code, message, retry_after_s=RETRY_AFTER_S)


def refusal_of(error: Exception) -> Refusal:
    """Say to a client what an exception of ours means for its request.

    A failure's own message stays in the log: it may name a path or an address.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, TextError):
        return Refusal(400, "invalid_text", str(error), param="input")
    if isinstance(error, (InputError, Rejected)):
        return Refusal(400, "invalid_input", str(error), param="input")
    if isinstance(error, OverloadedError):
        return overloaded("the encoder has too much waiting: try again later", error.retry_after_s)
    if isinstance(error, DeadlineExceededError):
        return unavailable("deadline_exceeded", "the model server did not answer in time: try again later")
    if isinstance(error, UnavailableError):
        return unavailable("backend_unavailable", "the model server cannot be reached: try again later")
    return Refusal(500, "internal_error", "encoding failed; the gateway's log says why, under this request's id")


def refusal_of_validation(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """Say what does not fit the schema, from pydantic's list. What the client sent is not repeated."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return Refusal(400, "invalid_json", f"the body is no JSON: {reason}")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return Refusal(
            422, "invalid_body", "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    return Refusal(422, "invalid_field", f"{shown('.'.join(path))}: {first['msg']}", param=path[0])
