"""Refusals: the error responses of the gateway, in the shape of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mirror_runtime.client.protocol import NotServed, Rejected
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    NotFiniteError,
    OverloadedError,
    TextError,
    UnavailableError,
)

RETRY_AFTER_S = 1
"""The retry-after of refusals without a measured one: a backend that cannot be reached may be back any second."""

CLIENT_GONE = 499
"""The status that a request is counted under when its client did not wait for the answer."""

_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
_MAX_NAME_LENGTH = 100


class Refusal(Exception):
    """An error response to a request.

    Args:
        status: the HTTP status.
        code: the error's name, for programs.
        message: what is wrong and the cure, for people. It contains neither paths nor tracebacks.
        param: the field of the request that is wrong; None if it is not one field.
        retry_after_s: when a retry makes sense; None if it never does.
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
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> bytes:
        """Return the JSON body."""
        param = None if self.param is None else printable(self.param)
        kind = _KINDS.get(self.status, "invalid_request_error")
        return orjson.dumps({"error": {"message": self.message, "type": kind, "param": param, "code": self.code}})


def printable(name: str) -> str:
    """Replace lone surrogates in a name that a client sent, and shorten it, so that it fits into a response."""
    valid = name.encode("utf-8", "replace").decode("utf-8")
    return valid if len(valid) <= _MAX_NAME_LENGTH else f"{valid[:_MAX_NAME_LENGTH]}…"


def overloaded(message: str, retry_after_s: float | None) -> Refusal:
    """Build the refusal of a request over the limit; None takes `RETRY_AFTER_S`."""
    return Refusal(429, "overloaded", message, retry_after_s=retry_after_s or RETRY_AFTER_S)


def unavailable(code: str, message: str) -> Refusal:
    """Build the refusal for a gateway or backend that cannot answer for now."""
    return Refusal(503, code, message, retry_after_s=RETRY_AFTER_S)


def client_gone() -> Refusal:
    """Build the refusal that nobody receives."""
    return Refusal(CLIENT_GONE, "client_gone", "the client closed its connection")


def refusal_of(error: Exception) -> Refusal:
    """Translate an exception into the response to its request.

    The message of a failure stays in the log, as it may name a path or an address.
    """
    if isinstance(error, Refusal):
        return error
    failed = Refusal(500, "internal_error", "encoding failed; the gateway's log has the reason")
    if isinstance(error, NotFiniteError):  # a TextError, and not the text's fault
        return failed
    if isinstance(error, TextError):
        return Refusal(400, "invalid_text", str(error), param="input")
    if isinstance(error, (InputError, Rejected)):
        return Refusal(400, "invalid_input", str(error), param="input")
    if isinstance(error, OverloadedError):
        return overloaded("the encoder's queue is full: try again later", error.retry_after_s)
    if isinstance(error, DeadlineExceededError):
        return unavailable("deadline_exceeded", "the model server did not answer in time: try again later")
    if isinstance(error, (UnavailableError, NotServed)):  # the model was served: its configuration has been read
        return unavailable("backend_unavailable", "the model server cannot be reached, or loads the model: try later")
    return failed


def refusal_of_validation(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """Translate pydantic's list of validation errors. The response never repeats the client's values."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return Refusal(
            422, "invalid_body", "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    return Refusal(422, "invalid_field", f"{printable('.'.join(path))}: {first['msg']}", param=path[0])
