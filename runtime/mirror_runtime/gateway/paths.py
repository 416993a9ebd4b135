"""The paths by which clients call the routes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Receive, Scope, Send

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "/embeddings": "/v1/embeddings",
        "/models": "/v1/models",
        "/ping": "/health",
        "/invocations": "/embed",
    }
)
"""Other names of routes: without OpenAI's /v1, and those of SageMaker."""

_AZURE = re.compile(r"/openai/deployments/[^/]+/embeddings")


class UsualPaths:
    """An ASGI application that calls another one with each request's usual path.

    Doubled and final slashes count for nothing. `POST /` is TEI's /embed, HEAD is GET without a body, which the server
    leaves out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or pass another event on."""
        if scope["type"] == "http":
            path = "/" + "/".join(filter(None, scope["path"].split("/")))
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            if method == "POST" and path == "/":
                path = "/embed"
            path = "/v1/embeddings" if _AZURE.fullmatch(path) else ALIASES.get(path, path)
            scope = {**scope, "path": path, "method": method}
        await self._app(scope, receive, send)
