"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import mirror_runtime
from mirror_runtime.gateway.errors import Refusal, refusal_of, refusal_of_validation, shown, unavailable
from mirror_runtime.gateway.metrics import CONTENT_TYPE
from mirror_runtime.gateway.middleware import CLIENT_GONE, Middleware, response_of
from mirror_runtime.gateway.responses import openai_body, tei_body
from mirror_runtime.gateway.schema import (
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbedRequest,
    ErrorAnswer,
    Health,
    Info,
    Model,
    Models,
)
from mirror_runtime.gateway.service import Answer, Service

OPEN_ROUTES = ("/health", "/metrics", "/docs", "/openapi.json")
"""Probes and Prometheus carry no key."""

T = TypeVar("T")

_CODES: Mapping[int, str] = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_VECTOR_HEADERS = {
    "X-Vector-Space": {
        "description": "The fingerprint: vectors of equal fingerprints can be compared.",
        "schema": {"type": "string"},
    },
    "X-Truncated": {"description": "How many of the texts were cut.", "schema": {"type": "integer"}},
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def make_app(service: Service) -> ASGIApp:
    """Make the gateway's ASGI application.

    Args:
        service: what is behind the routes; its backend is closed when the application stops.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.backend.aclose()

    app = FastAPI(
        title="Mirror Runtime gateway",
        version=mirror_runtime.__version__,
        description="Text to vectors, in the dialects of OpenAI and of Text Embeddings Inference.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_vectors(app, service)
    _add_facts(app, service)
    _add_refusals(app)
    routes = [path for route in app.routes if (path := getattr(route, "path", None)) is not None]
    return Middleware(app, service, routes=routes, open_routes=OPEN_ROUTES)


def _locks(service: Service) -> list[Any]:
    """Show in the document that a key is wanted; the gate has seen it already."""
    return [Depends(HTTPBearer(auto_error=False))] if service.settings.keys else []


def _add_vectors(app: FastAPI, service: Service) -> None:
    """Add what encodes."""
    answers: dict[int | str, dict[str, Any]] = {
        200: {"headers": _VECTOR_HEADERS},
        **_refusals(400, 401, 404, 413, 422, 429, 500, 503),
    }

    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingsAnswer,
        responses=answers,
        dependencies=_locks(service),
        tags=["vectors"],
    )
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Vectors, as OpenAI's API gives them."""
        model = service.settings.model
        if body.model != model:
            raise Refusal(
                404, "model_not_found", f"the model here is {model!r}, not {shown(body.model)!r}", param="model"
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        answer = await _while_wanted(request, service, service.encode(texts, dimensions=body.dimensions))
        content = openai_body(
            answer.vectors,
            model=model,
            tokens=answer.tokens,
            truncated=answer.truncated,
            base64=body.encoding_format == "base64",
        )
        return _vectors(content, answer)

    @app.post(
        "/embed", response_model=list[list[float]], responses=answers, dependencies=_locks(service), tags=["vectors"]
    )
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """Vectors, as Text Embeddings Inference gives them."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        work = service.encode(texts, dimensions=body.dimensions, normalize=body.normalize, truncate=body.truncate)
        answer = await _while_wanted(request, service, work)
        return _vectors(tei_body(answer.vectors), answer)


def _add_facts(app: FastAPI, service: Service) -> None:
    """Add what tells of the gateway."""

    @app.get("/v1/models", responses=_refusals(401), dependencies=_locks(service), tags=["facts"])
    async def models() -> Models:
        """The one model, as OpenAI's API lists it."""
        return Models(data=[Model(id=service.settings.model)])

    @app.get("/info", responses=_refusals(401), dependencies=_locks(service), tags=["facts"])
    async def info() -> Info:
        """What is served, and the limits."""
        card, settings = service.backend.card, service.settings
        return Info(
            model=settings.model,
            fingerprint=card.fingerprint,
            dim=card.dim,
            dimensions=[*settings.dimensions, card.dim],
            max_tokens=card.max_tokens,
            normalized=card.normalized,
            long_texts=card.long_texts,
            engine=card.engine,
            precision=card.precision,
            backend=card.backend,
            max_batch=settings.max_batch,
            max_in_flight=settings.max_in_flight,
            max_body_bytes=settings.max_body_bytes,
            version=mirror_runtime.__version__,
        )

    @app.get("/health", responses=_refusals(503), tags=["facts"])
    async def health() -> Health:
        """Whether inferences succeed: one has within the last second, or is made now."""
        await service.check_health()
        return Health(fingerprint=service.backend.card.fingerprint)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["facts"],
    )
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.page(service.backend.card), media_type=CONTENT_TYPE)


def _add_refusals(app: FastAPI) -> None:
    """Answer whatever is wrong in one shape."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> Response:
        return response_of(refusal_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, _CODES.get(error.status_code, "bad_request"), str(error.detail))
        response = response_of(refusal)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # the server logs it with its traceback
        return response_of(refusal_of(error))


def _vectors(content: bytes, answer: Answer) -> Response:
    headers = {"x-vector-space": answer.fingerprint, "x-truncated": str(len(answer.truncated))}
    return Response(content, headers=headers, media_type="application/json")


async def _while_wanted(request: Request, service: Service, work: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer as long as its client does, and no longer than the operator allows.

    Raises:
        Refusal: nobody waits any more, or it takes too long. The work is cancelled.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(request))
    timeout_s = service.settings.timeout_s
    try:
        await asyncio.wait((task, left), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise Refusal(CLIENT_GONE, "client_gone", "the client did not wait")
        raise unavailable("deadline_exceeded", f"not answered within {timeout_s:g} s: try again later")
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    """Return when the client has closed its connection. The body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
