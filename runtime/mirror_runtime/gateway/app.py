"""The routes of the gateway, and the bodies of its answers."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import mirror_runtime
from mirror_runtime.errors import InputError
from mirror_runtime.gateway.backends import ModelCard
from mirror_runtime.gateway.bodies import json_route
from mirror_runtime.gateway.buffers import HeldBytes
from mirror_runtime.gateway.errors import (
    Refusal,
    client_gone,
    printable,
    refusal_of,
    refusal_of_validation,
    unavailable,
)
from mirror_runtime.gateway.metrics import CONTENT_TYPE
from mirror_runtime.gateway.middleware import Middleware, response_of
from mirror_runtime.gateway.paths import UsualPaths
from mirror_runtime.gateway.schema import (
    CohereRerankRequest,
    EmbedAllRequest,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbedRequest,
    ErrorAnswer,
    Health,
    Info,
    Live,
    Model,
    Models,
    Rank,
    RerankAnswer,
    RerankRequest,
    SimilarityRequest,
)
from mirror_runtime.gateway.service import REQUEST_ID, EncodingResult, GatewayService
from mirror_runtime.prompts import choose_prompt
from mirror_runtime.reranker import ranked
from mirror_runtime.vectors import unit_rows

OPEN_ROUTES = ("/", "/health", "/health/live", "/metrics", "/docs", "/openapi.json")
"""Routes without a key: for probes, Prometheus and readers of the documentation."""

HERE = (
    "this gateway has one model, which gives one vector a text: POST /v1/embeddings (OpenAI), POST /embed and "
    "/similarity (TEI), GET /v1/models, /info, /health, /docs. It neither reranks nor classifies"
)
"""What a request for another path is told."""

HERE_RERANKER = (
    "this gateway has a reranker, which scores texts against a query: POST /rerank (TEI), /v1/rerank and /v2/rerank "
    "(Cohere), GET /v1/models, /info, /health, /docs. It has no vectors"
)

HERE_TOKENS = (
    "this gateway has one model, which gives a vector for each token and none for a text: POST /embed_all (TEI), "
    "GET /v1/models, /info, /health, /docs"
)

T = TypeVar("T")

_JSON_BYTES, _BASE64_BYTES = 22, 6
"""Bytes of a component in an answer, rounded up: -0.012345678901234567 and a comma, and 4 bytes in base64."""

_RANK_BYTES = 64
"""Bytes of a score in an answer with its index and names, rounded up. Texts that are returned were counted as read."""

_ROWS_AT_ONCE = 32
"""Vectors serialised before other tasks run: 1 to 2 ms for 384 components."""

_CODES: Mapping[int, str] = {404: "not_found", 405: "method_not_allowed"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
}
_VECTOR_HEADERS = {
    "X-Vector-Space": {
        "description": "The fingerprint: vectors of equal fingerprints can be compared.",
        "schema": {"type": "string"},
    },
    "X-Truncated": {"description": "Number of truncated texts.", "schema": {"type": "integer"}},
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def make_app(service: GatewayService) -> ASGIApp:
    """Build the gateway's ASGI application. It closes the service's backend when it stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.aclose()

    app = FastAPI(
        title="Mirror Runtime gateway",
        version=mirror_runtime.__version__,
        description="Text to vectors or scores, with the APIs of OpenAI, Cohere and Text Embeddings Inference.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    card = service.backend.card
    strings = (2 if card.scores_pairs else 1) * service.settings.max_batch  # a document may be an object with a text
    app.router.route_class = json_route(strings, service.settings.max_body_bytes)
    # Document that a key is required. The middleware has checked it already.
    keyed = [Depends(HTTPBearer(auto_error=False))] if service.settings.keys else []
    add_routes, here = _add_embedding_routes, HERE
    if card.scores_pairs:
        add_routes, here = _add_rerank_routes, HERE_RERANKER
    elif card.per_token:
        add_routes, here = _add_token_routes, HERE_TOKENS
    add_routes(app, service, keyed)
    _add_information_routes(app, service, keyed)
    _add_error_handlers(app, here)
    routes = [path for route in app.routes if (path := getattr(route, "path", None)) is not None]
    inner: ASGIApp = UsualPaths(Middleware(app, service, routes=routes, open_routes=OPEN_ROUTES))
    if not service.settings.cors:
        return inner
    return CORSMiddleware(
        inner,
        allow_origins=service.settings.cors,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-vector-space", "x-truncated", "x-request-id", "retry-after"],
    )


def _add_embedding_routes(app: FastAPI, service: GatewayService, keyed: Sequence[Any]) -> None:
    """Add the routes that encode."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {"headers": _VECTOR_HEADERS},
        **_refusals(400, 401, 404, 413, 422, 429, 500, 503),
    }

    turn = asyncio.Lock()  # one answer is serialised at a time, so that small requests run between its parts

    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingsAnswer,
        responses=responses,
        dependencies=keyed,
        tags=["vectors"],
    )
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Return vectors, as OpenAI's API does."""
        model = _check_model(service, body.model)
        base64 = body.encoding_format == "base64"
        result = await _encode(request, service, body, body.input, _BASE64_BYTES if base64 else _JSON_BYTES)
        return _vectors_response(await _openai_body(result, model, base64, turn), result)

    @app.post(
        "/embed",
        response_model=list[list[float]],
        responses=responses,
        dependencies=keyed,
        tags=["vectors"],
    )
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """Return vectors, as Text Embeddings Inference does."""
        result = await _encode(request, service, body, body.inputs, _JSON_BYTES)
        return _vectors_response(b"[%b]" % b",".join(await _json_rows(result.vectors, turn)), result)

    @app.post("/similarity", response_model=list[float], responses=responses, dependencies=keyed, tags=["vectors"])
    async def similarity(body: SimilarityRequest, request: Request) -> Response:
        """Return the cosine of one text with each of the others, as Text Embeddings Inference does."""
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        result = await _encode(request, service, EmbedRequest.model_validate({"inputs": texts}), texts, _JSON_BYTES)
        source, *others = unit_rows(result.vectors)
        return _vectors_response(orjson.dumps([float(source @ other) for other in others]), result)


def _add_token_routes(app: FastAPI, service: GatewayService, keyed: Sequence[Any]) -> None:
    """Add the route that encodes tokens."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {"headers": _VECTOR_HEADERS},
        **_refusals(400, 401, 404, 413, 422, 429, 500, 503),
    }
    turn = asyncio.Lock()

    @app.post(
        "/embed_all",
        response_model=list[list[list[float]]],
        responses=responses,
        dependencies=keyed,
        tags=["vectors"],
    )
    async def embed_all(body: EmbedAllRequest, request: Request) -> Response:
        """Return each text's vectors of its tokens, special ones too, as Text Embeddings Inference does."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        card = service.backend.card
        prompt = _prompt(card, body.prompt_name, None)
        # A text has hardly more tokens than characters, and where it is cut no more than the limit.
        most = card.most_tokens
        tokens = sum(min(len(prompt) + len(text) + 2, most or len(prompt) + 2 * len(text) + 2) for text in texts)
        caller = _held_for_answer(request, service, tokens, _JSON_BYTES)
        result = await _while_connected(
            request, service, service.encode(texts, caller, truncate=body.truncate, prompt=prompt)
        )
        assert result.counts is not None
        rows = iter(await _json_rows(result.vectors, turn))
        parts = [b"[%b]" % b",".join(islice(rows, count)) for count in result.counts.tolist()]
        return _vectors_response(b"[%b]" % b",".join(parts), result)


def _add_rerank_routes(app: FastAPI, service: GatewayService, keyed: Sequence[Any]) -> None:
    """Add the routes that score texts against a query."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {"headers": _VECTOR_HEADERS},
        **_refusals(400, 401, 404, 413, 422, 429, 500, 503),
    }

    async def score(request: Request, query: str, texts: Sequence[str], truncate: bool | None) -> EncodingResult:
        caller = _held_for_answer(request, service, len(texts), _RANK_BYTES)
        work = service.encode([(query, text) for text in texts], caller, truncate=truncate)
        return await _while_connected(request, service, work)

    @app.post("/rerank", response_model=list[Rank], responses=responses, dependencies=keyed, tags=["scores"])
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Return scores, best first, as Text Embeddings Inference does."""
        result = await score(request, body.query, body.texts, body.truncate)
        ranks = [
            {"index": one.index, "score": one.score} | ({"text": body.texts[one.index]} if body.return_text else {})
            for one in ranked(result.vectors[:, 0], raw_scores=body.raw_scores)
        ]
        return _vectors_response(orjson.dumps(ranks), result)

    @app.post("/v1/rerank", response_model=RerankAnswer, responses=responses, dependencies=keyed, tags=["scores"])
    @app.post("/v2/rerank", response_model=RerankAnswer, responses=responses, dependencies=keyed, tags=["scores"])
    async def cohere(body: CohereRerankRequest, request: Request) -> Response:
        """Return scores, best first, as Cohere's API does."""
        model = _check_model(service, body.model)
        result = await score(request, body.query, body.documents, None)
        results = [
            {"index": one.index, "relevance_score": one.score}
            | ({"document": {"text": body.documents[one.index]}} if body.return_documents else {})
            for one in ranked(result.vectors[:, 0], body.top_n)
        ]
        answer = {
            "id": REQUEST_ID.get(),
            "model": model,
            "results": results,
            "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
            "meta": {"api_version": {"version": request.url.path[2]}, "billed_units": {"search_units": 1}},
        }
        return _vectors_response(orjson.dumps(answer), result)


def _check_model(service: GatewayService, asked: str | None) -> str:
    """Return the model's name; a `Refusal` if a request names another one."""
    model = service.settings.model
    if asked is not None and asked != model and not asked.endswith(f"/{model}"):
        raise Refusal(404, "model_not_found", f"the model here is {model!r}, not {printable(asked)!r}", param="model")
    return model


def _add_information_routes(app: FastAPI, service: GatewayService, keyed: Sequence[Any]) -> None:
    """Add the routes that describe the gateway."""
    created = int(time.time())

    def _model() -> Model:
        card, settings = service.backend.card, service.settings
        return Model(
            id=settings.model,
            created=created,
            fingerprint=card.fingerprint,
            dimensions=list(service.dimensions),
            max_tokens=card.max_tokens,
        )

    @app.get("/v1/models", responses=_refusals(401), dependencies=keyed, tags=["facts"])
    async def models() -> Models:
        """List the one model, as OpenAI's API does."""
        return Models(data=[_model()])

    @app.get("/v1/models/{name:path}", responses=_refusals(401, 404), dependencies=keyed, tags=["facts"])
    async def model(name: str) -> Model:
        """Return the one model, as OpenAI's API does."""
        if name != service.settings.model:
            message = f"the model here is {service.settings.model!r}, not {printable(name)!r}"
            raise Refusal(404, "model_not_found", message, param="model")
        return _model()

    @app.get("/info", responses=_refusals(401), dependencies=keyed, tags=["facts"])
    async def info() -> Info:
        """Return the served model and the limits."""
        card, settings = service.backend.card, service.settings
        return Info(
            model=settings.model,
            fingerprint=card.fingerprint,
            dim=card.dim,
            dimensions=list(service.dimensions),
            max_tokens=card.max_tokens,
            prompts=list(card.prompts or ()),
            speeds=service.speeds,
            normalized=card.normalized,
            long_texts=card.long_texts.value,
            engine=card.engine,
            precision=card.precision,
            backend=card.backend,
            max_batch=settings.max_batch,
            max_in_flight=settings.max_in_flight,
            max_body_bytes=settings.max_body_bytes,
            version=mirror_runtime.__version__,
        )

    page = (Path(__file__).with_name("page.html")).read_bytes()

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def front() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    @app.get("/health", responses=_refusals(503), tags=["facts"])
    async def health() -> Health:
        """Check that inferences succeed: those under way, one within the last second, or a new one."""
        await service.check_health()
        return Health(fingerprint=service.backend.card.fingerprint)

    @app.get("/health/live", tags=["facts"])
    async def live() -> Live:
        """Answer, without an inference: a gateway that does not is to be restarted."""
        return Live()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["facts"],
    )
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.page(service.backend.card), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, here: str) -> None:
    """Answer every error in the same shape."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> Response:
        return response_of(refusal_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        detail = here if error.status_code == 404 else str(error.detail)
        refusal = Refusal(error.status_code, _CODES.get(error.status_code, "bad_request"), detail)
        response = response_of(refusal)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # uvicorn logs it with its traceback
        return response_of(refusal_of(error))


async def _openai_body(result: EncodingResult, model: str, base64: bool, turn: asyncio.Lock) -> bytes:
    """Build the body of /v1/embeddings: vectors as base64 of little-endian float32, or as lists of numbers."""
    if base64:
        rows = [b'"%b"' % b64encode(row) for row in result.vectors]
    else:
        rows = await _json_rows(result.vectors, turn)
    data = (b'{"object":"embedding","index":%d,"embedding":%b}' % pair for pair in enumerate(rows))
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    rest = orjson.dumps({"model": model, "usage": usage, "truncated": result.truncated})
    return b'{"object":"list","data":[%b],%b' % (b",".join(data), rest[1:])


async def _json_rows(vectors: NDArray[np.float32], turn: asyncio.Lock) -> list[bytes]:
    """Serialise vectors as JSON, and let other tasks run meanwhile: 2,048 of 384 components take 80 ms."""
    rows = []
    async with turn:
        for at, row in enumerate(vectors, 1):
            rows.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
            if at % _ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
    return rows


async def _encode(
    request: Request, service: GatewayService, body: EmbeddingsRequest | EmbedRequest, given: str | list[str], size: int
) -> EncodingResult:
    """Encode a request's texts with its parameters; `size` is the bytes of a component in its answer."""
    texts = [given] if isinstance(given, str) else given
    caller = _held_for_answer(request, service, len(texts), size)
    limit = body.truncate_prompt_tokens
    if body.truncate == "START" or (limit is not None and -1 < limit < service.backend.card.max_tokens):
        message = f"texts are cut at their end, at {service.backend.card.max_tokens} tokens: leave this field out"
        param = "truncate" if body.truncate == "START" else "truncate_prompt_tokens"
        raise Refusal(400, "truncation_not_possible", message, param=param)
    prompt = _prompt(service.at(body.speed).card, body.prompt_name, body.input_type)
    work = service.encode(
        texts,
        caller,
        dimensions=body.dimensions,
        normalize=body.normalize,
        truncate={"NONE": False, "END": True}.get(str(body.truncate), body.truncate is not False),
        prompt=prompt,
        speed=body.speed,
    )
    return await _while_connected(request, service, work)


def _prompt(card: ModelCard, name: str | None, input_type: str | None) -> str:
    """Return what to put before a request's texts; a `Refusal` if it asks for what the encoder has not."""
    try:
        return choose_prompt(card.prompts, card.template, name=name, input_type=input_type)
    except InputError as error:
        param = "prompt_name" if name is not None else "input_type"
        raise Refusal(400, "prompt_not_possible", printable(str(error)), param=param) from None


def _held_for_answer(request: Request, service: GatewayService, vectors: int, component_bytes: int) -> str:
    """Count the bytes of an answer before it is computed, and return who asks for it."""
    held: HeldBytes = request.state.held
    held.add(vectors * service.backend.card.dim * component_bytes)
    return held.caller


def _vectors_response(content: bytes, result: EncodingResult) -> Response:
    headers = {"x-vector-space": result.fingerprint, "x-truncated": str(len(result.truncated))}
    return Response(content, headers=headers, media_type="application/json")


async def _while_connected(request: Request, service: GatewayService, work: Coroutine[Any, Any, T]) -> T:
    """Wait for a result until it is there, its client disconnects, or the operator's timeout passes.

    In the last two cases the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    timeout_s = service.settings.timeout_s
    try:
        await asyncio.wait((task, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise client_gone()
        raise unavailable("deadline_exceeded", f"not answered within {timeout_s:g} s: try again later")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client closes its connection. The body has been read, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
