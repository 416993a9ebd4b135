"""`mirror verify --endpoint` tells what became of an endpoint: a stand-in changes one thing at a time."""

import json
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirror_runtime.cli.main import main
from tests.support.gateways import running

DIM = 32


def direction(text: str, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(text.encode())]).normal(size=DIM)


def encode(texts: list[str], *, seed: int = 0, limit: int = 100, scale: float = 1.0, noise: float = 0.0) -> np.ndarray:
    """A bag of words in random directions: each text's sum over its first `limit` words."""
    rows = []
    for text in texts:
        words = [
            np.random.default_rng([seed, zlib.crc32(word.encode())]).normal(size=DIM) for word in text.split()[:limit]
        ]
        row = np.sum(words, axis=0)
        row = row / np.linalg.norm(row) + noise * np.random.default_rng([7, zlib.crc32(text.encode())]).normal(size=DIM)
        rows.append(scale * row)
    return np.array(rows)


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """An endpoint with both APIs, whose `change` and `order` a test sets."""
    state = SimpleNamespace(change={}, order=lambda rows: rows, models=["m"])

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({"data": [{"id": name} for name in state.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            texts = body.get("input") or body["inputs"]
            rows = state.order(encode(texts, **state.change).tolist())
            data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
            self._answer({"data": data} if "input" in body else rows)

        def _answer(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        yield state
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/v1", "/embed"])
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "agrees"),
        ({"noise": 1e-4}, "agrees"),
        ({"noise": 0.02}, "drifted"),
        ({"seed": 1}, "another model"),
        ({"limit": 50}, "another limit"),
        ({"limit": 5000}, "another limit"),
        ({"scale": 3.0}, "another length"),
        ({"order": lambda rows: rows[::-1]}, "another order"),
        ({"order": lambda rows: [rows[1], rows[0], *rows[2:]]}, "another order"),
        ({"order": lambda rows: [[0.0] * DIM for _ in rows]}, "broken"),
        ({"order": lambda rows: [row[:16] for row in rows]}, "another model"),
    ],
)
def test_what_changed_is_told_apart(server, tmp_path, capsys, path, change, verdict):
    arguments = ["verify", "--endpoint", server.url + path, "--canaries", str(tmp_path / "kept.json")]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verdict"], report["dim"], report["normalized"], report["cut_before_words"]) == (
        "kept",
        DIM,
        True,
        120,
    )
    server.order = change.get("order", server.order)
    server.change = {name: value for name, value in change.items() if name != "order"}
    assert main(arguments) == (verdict != "agrees")
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == verdict, report
    assert bool(report["problem"]) == (verdict != "agrees")


def zeros_at(*places):
    return lambda rows: [[0.0] * DIM if i in places and len(rows) > 3 else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("later", "verdict"), [(zeros_at(5), "agrees"), (zeros_at(5, 7), "broken"), (zeros_at(), "another model")]
)
def test_zeros_agree_only_where_zeros_were_kept(server, tmp_path, capsys, later, verdict):
    arguments = ["verify", "--endpoint", f"{server.url}/v1", "--canaries", str(tmp_path / "kept.json")]
    server.order = zeros_at(5)
    assert main(arguments) == 0
    server.order = later
    main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == verdict


def test_an_endpoint_that_cannot_be_kept_or_read_is_named(server, tmp_path, capsys):
    path = tmp_path / "kept.json"
    arguments = ["verify", "--endpoint", f"{server.url}/v1", "--canaries", str(path)]
    server.order = lambda rows: rows[::-1]
    assert main(arguments) == 2
    assert "does not return a text's vector alone as among others" in capsys.readouterr().err
    assert not path.exists()
    server.models = ["a", "b"]
    assert main(arguments) == 2
    assert "serves 2 models: name one" in capsys.readouterr().err
    path.write_text('{"texts": [], "vectors": []}')
    assert main(["verify", "--endpoint", f"{server.url}/embed", "--canaries", str(path)]) == 2
    assert "holds no canaries of an endpoint" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert "either a bundle or --endpoint" in capsys.readouterr().err
    assert main(["verify", "--endpoint", server.url, "--fingerprint", "f" * 16]) == 2
    assert "--fingerprint is a bundle's" in capsys.readouterr().err


def test_our_gateway_agrees_with_itself(gateway_bundle, tmp_path, monkeypatch):
    key = "a-key-of-sixteen-letters"
    monkeypatch.setenv("MIRROR_API_KEY", key)
    with running(gateway_bundle, keys=(key,)) as gateway:
        arguments = ["verify", "--endpoint", f"{gateway.url}/v1", "--canaries", str(tmp_path / "kept.json")]
        assert [main(arguments), main(arguments)] == [0, 0]
