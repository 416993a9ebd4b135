"""What a gateway says besides vectors, and TEI's way to ask for them."""

import asyncio
import json
import re

import numpy as np
import pytest

from mirror_runtime import __version__
from mirror_runtime.gateway.app import make_app
from tests.support.gateways import FINGERPRINT, MODEL, running, vectors


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,), max_batch=100) as gateway:
        yield gateway


def test_tei_gives_bare_vectors(gateway):
    one = gateway.send("POST", "/embed", {"inputs": "a text"})
    many = gateway.send("POST", "/embed", {"inputs": ["a text", "b"], "normalize": True, "truncate": True})
    np.testing.assert_array_equal(vectors(one.json), gateway.encoder.encode(["a text"]))
    np.testing.assert_array_equal(vectors(many.json), gateway.encoder.encode(["a text", "b"]))
    assert one.headers["x-vector-space"] == FINGERPRINT
    cut = gateway.send("POST", "/embed", {"inputs": "a text", "dimensions": 4}).json
    assert np.linalg.norm(cut[0]) == pytest.approx(1, abs=1e-6)
    assert len(cut[0]) == 4


def test_tei_refuses_to_cut_where_it_must_not(gateway):
    texts = ["short", "word " * 100]
    assert gateway.send("POST", "/embed", {"inputs": texts}).headers["x-truncated"] == "1"
    refused = gateway.send("POST", "/embed", {"inputs": texts, "truncate": False})
    assert refused.status == 413
    assert refused.error["message"].startswith("text 1 has 102 tokens, and the encoder's limit is 64")
    assert gateway.send("POST", "/embed", {"inputs": texts[:1], "truncate": False}).status == 200


def test_the_policy_for_long_texts_is_the_operators(gateway_bundle):
    with running(gateway_bundle, long_texts="error") as strict:
        refused = strict.embed(["fine", "word " * 100])
        assert refused.status == 400
        assert refused.error["code"] == "invalid_text"
        assert "text 1: has 102 tokens" in refused.error["message"]
        assert strict.send("GET", "/info").json["long_texts"] == "error"
    with running(gateway_bundle, long_texts="chunk") as whole:
        assert whole.send("POST", "/embed", {"inputs": "word " * 100, "truncate": False}).headers["x-truncated"] == "0"


def test_vectors_that_are_not_scaled_can_be(gateway_bundle, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "raw"
    shutil.copytree(gateway_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["encoder"]["normalize"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with running(folder) as raw:
        run = raw.encoder.engine.run
        monkeypatch.setattr(raw.encoder.engine, "run", lambda rows: 3 * run(rows))
        for normalize, length in ((None, 3), (False, 3), (True, 1)):
            reply = raw.send("POST", "/embed", {"inputs": "a", "normalize": normalize})
            assert np.linalg.norm(reply.json[0]) == pytest.approx(length, rel=1e-6)


def test_info_names_what_is_served_and_the_limits(gateway):
    assert gateway.send("GET", "/info").json == {
        "model": MODEL,
        "fingerprint": FINGERPRINT,
        "dim": 8,
        "dimensions": [4, 8],
        "max_tokens": 64,
        "normalized": True,
        "long_texts": "truncate",
        "engine": "fake",
        "precision": "fp32",
        "backend": "in-process",
        "max_batch": 100,
        "max_in_flight": 4096,
        "max_body_bytes": 4_000_000,
        "version": __version__,
    }


def test_metrics_count_what_happened(gateway):
    before = gateway.metric("mirror_gateway_tokens_total")
    assert gateway.embed(["three words here", "word " * 100]).status == 200
    assert gateway.embed("a", dimensions=3).status == 400
    assert gateway.send("GET", "/somewhere").status == 404
    assert gateway.metric("mirror_gateway_tokens_total") == before + 5 + 102
    assert gateway.metric("mirror_gateway_refusals_total", code="dimensions_not_allowed") == 1
    assert gateway.metric("mirror_gateway_requests_total", route="/v1/embeddings", status="400") == 1
    assert gateway.metric("mirror_gateway_requests_total", route="other", status="404") == 1
    assert gateway.metric("mirror_gateway_texts_in_flight") == 0
    page = gateway.send("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (
        f'mirror_gateway_info{{engine="fake",fingerprint="{FINGERPRINT}",precision="fp32"}} 1.0' in page.body.decode()
    )
    assert 'mirror_gateway_request_seconds_bucket{le="0.01",route="/v1/embeddings"}' in page.body.decode()


def test_whoever_has_an_answer_finds_it_counted(gateway):
    def count() -> float:
        return gateway.metric("mirror_gateway_requests_total", route="other", status="404")

    before, counts = count(), []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        counts.append(count() - before)

    scope = {"type": "http", "method": "GET", "path": "/nowhere", "query_string": b"", "headers": []}

    async def ask():
        await make_app(gateway.service)(scope, receive, send)

    asyncio.run(ask())
    assert counts == [0, 1]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), (None, False)]
)
def test_a_request_keeps_its_id_or_gets_one(gateway, given, kept):
    reply = gateway.send("GET", "/info", headers={} if given is None else {"X-Request-ID": given})
    if kept:
        assert reply.headers["x-request-id"] == given
    else:
        assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert gateway.send("GET", "/nowhere").headers["x-request-id"]


def test_the_document_describes_every_answer(gateway):
    document = gateway.send("GET", "/openapi.json").json
    assert set(document["paths"]) == {"/v1/embeddings", "/embed", "/v1/models", "/info", "/health", "/metrics"}
    vectors = document["paths"]["/v1/embeddings"]["post"]["responses"]
    assert set(vectors) == {"200", "400", "401", "404", "413", "422", "429", "500", "503"}
    assert vectors["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert gateway.send("GET", "/docs").body.startswith(b"\n    <!DOCTYPE html>")
