"""A gateway on a free port of loopback, in a thread of the test, with a client and an engine that can be blocked."""

import contextlib
import http.client
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime import Encoder, VectorCache
from mirror_runtime.gateway.backends import backends_of
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.server import GatewayServer, listen
from mirror_runtime.gateway.service import GatewayService
from mirror_runtime.gateway.settings import GatewaySettings
from tests.support.mirror_serve import wait_until

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = "mini"


@dataclass(frozen=True, kw_only=True)
class HttpReply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Mapping[str, Any]:
        """The error, checked for OpenAI's shape."""
        body = self.json
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]


def send(port: int, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> HttpReply:
    """Send a request: bytes unchanged, iterators of bytes in chunks, anything else as JSON."""
    sent = dict(headers or {})
    if body is not None and not isinstance(body, bytes) and not hasattr(body, "__next__"):
        body = json.dumps(body).encode()
        sent.setdefault("Content-Type", "application/json")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, sent)  # type: ignore[arg-type]
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return HttpReply(status=response.status, headers=found, body=response.read())


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running gateway."""

    port: int
    service: GatewayService
    encoder: Encoder

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, *arguments: Any, **options: Any) -> HttpReply:
        return send(self.port, *arguments, **options)

    def client(self, key: str = "none") -> "OpenAI":
        """Return the `openai` client, which never retries."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def embed(self, texts: object, **fields: object) -> HttpReply:
        return self.send("POST", "/v1/embeddings", {"model": MODEL, "input": texts, **fields})

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def running(
    bundle: Path,
    *,
    long_texts: str = "truncate",
    engine: str = "fake",
    vector_cache: VectorCache | None = None,
    **settings: Any,
) -> Iterator[Gateway]:
    """Run a gateway on a bundle until the block ends."""
    encoder = Encoder.load(bundle, engine=engine, long_texts=long_texts, vector_cache=vector_cache)
    chosen = GatewaySettings(**{"model": MODEL, "drain_s": 0.0, **settings})
    backend, *twins = backends_of(encoder, long_texts=long_texts, max_waiting=4 * chosen.max_in_flight + 1)
    service = GatewayService(backend, chosen, GatewayMetrics(), *twins)
    server = GatewayServer(service)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Gateway(port=port, service=service, encoder=encoder)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the gateway did not stop"


def changed_bundle(bundle: Path, folder: Path, **encoder: object) -> Path:
    """Copy a bundle for the fake engine and change fields of its encoder."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["encoder"] |= encoder
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def vectors(numbers: Any) -> NDArray[np.float32]:
    """Convert the lists of a response, as a client does."""
    return np.asarray(numbers, np.float32)
