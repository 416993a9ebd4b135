"""An embeddings endpoint that answers as a test says."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def vectors(dim: int, texts: int) -> Any:
    """Answer with a vector for each text."""
    return 200, {"data": [{"index": i, "embedding": [0.5] * dim} for i in range(texts)]}


@contextlib.contextmanager
def endpoint(answer: Callable[[str, Any], tuple[int, Any]]) -> Iterator[str]:
    """Serve JSON answers to path and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            status, body = answer(self.path, json.loads(self.rfile.read(size) or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
