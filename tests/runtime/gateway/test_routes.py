"""The routes other than OpenAI's: TEI's, information, metrics and the document."""

import asyncio
import re

import numpy as np
import pytest

from mirror_runtime import __version__
from mirror_runtime.gateway.app import make_app
from tests.support.fake_bundles import FINGERPRINT
from tests.support.gateways import MODEL, changed_bundle, running, vectors

POSTS, GETS = ("/v1/embeddings", "/embed"), ("/v1/models", "/info", "/health", "/health/live", "/metrics")


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,), max_batch=100) as gateway:
        yield gateway


def test_tei_returns_bare_vectors_and_refuses_texts_that_it_must_not_truncate(gateway):
    one = gateway.send("POST", "/embed", {"inputs": "a text"})
    many = gateway.send("POST", "/embed", {"inputs": ["a text", "b"], "normalize": True, "truncate": True})
    np.testing.assert_array_equal(vectors(one.json), gateway.encoder.encode(["a text"]))
    np.testing.assert_array_equal(vectors(many.json), gateway.encoder.encode(["a text", "b"]))
    assert one.headers["x-vector-space"] == FINGERPRINT
    cut = gateway.send("POST", "/embed", {"inputs": "a text", "dimensions": 4}).json
    assert np.linalg.norm(cut[0]) == pytest.approx(1, abs=1e-6)
    assert len(cut[0]) == 4
    texts = ["short", "word " * 100]
    assert gateway.send("POST", "/embed", {"inputs": texts}).headers["x-truncated"] == "1"
    refused = gateway.send("POST", "/embed", {"inputs": texts, "truncate": False})
    assert refused.status == 413
    assert refused.error["message"].startswith("text 1 has 102 tokens, and the encoder's limit is 64")
    assert gateway.send("POST", "/embed", {"inputs": texts[:1], "truncate": False}).status == 200


def test_the_operator_chooses_the_policy_for_long_texts(gateway_bundle):
    with running(gateway_bundle, long_texts="error") as strict:
        refused = strict.embed(["fine", "word " * 100])
        assert refused.status == 400
        assert refused.error["code"] == "invalid_text"
        assert "text 1: has 102 tokens" in refused.error["message"]
        assert strict.send("GET", "/info").json["long_texts"] == "error"
    with running(gateway_bundle, long_texts="chunk") as whole:
        assert whole.send("POST", "/embed", {"inputs": "word " * 100, "truncate": False}).headers["x-truncated"] == "0"


def test_vectors_of_an_unnormalised_encoder_can_be_scaled(gateway_bundle, tmp_path, monkeypatch):
    with running(changed_bundle(gateway_bundle, tmp_path / "raw", normalize=False)) as raw:
        run = raw.encoder.engine.run
        monkeypatch.setattr(raw.encoder.engine, "run", lambda rows: 3 * run(rows))
        for normalize, length in ((None, 3), (False, 3), (True, 1)):
            reply = raw.send("POST", "/embed", {"inputs": "a", "normalize": normalize})
            assert np.linalg.norm(reply.json[0]) == pytest.approx(length, rel=1e-6)


def test_info_describes_the_model_and_the_limits(gateway):
    model = {"model": MODEL, "fingerprint": FINGERPRINT, "dim": 8, "dimensions": [4, 8], "normalized": True}
    served = {"engine": "fake", "precision": "fp32", "backend": "in-process", "version": __version__}
    limits = {"max_batch": 100, "max_in_flight": 4096, "max_body_bytes": 4_000_000, "max_tokens": 64}
    assert gateway.send("GET", "/info").json == {**model, **served, **limits, "long_texts": "truncate"}


def test_metrics_count_requests_texts_and_refusals(gateway):
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
    for line in (
        f'mirror_gateway_info{{engine="fake",fingerprint="{FINGERPRINT}",precision="fp32"}} 1.0',
        'mirror_gateway_request_seconds_bucket{le="0.01",route="/v1/embeddings"}',
    ):
        assert line in page.body.decode()


def test_a_request_is_counted_before_its_last_byte_is_sent(gateway):
    def count() -> float:
        return gateway.metric("mirror_gateway_requests_total", route="other", status="404")

    before, counts = count(), []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        counts.append(count() - before)

    scope = {"type": "http", "method": "GET", "path": "/nowhere", "query_string": b"", "headers": []}

    asyncio.run(make_app(gateway.service)(scope, receive, send))  # type: ignore[arg-type]
    assert counts == [0, 1]


@pytest.mark.parametrize(
    ("request_id", "kept"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), (None, False)],
)
def test_a_request_keeps_its_valid_id_or_gets_one(gateway, request_id, kept):
    reply = gateway.send("GET", "/info", headers={} if request_id is None else {"X-Request-ID": request_id})
    assert re.fullmatch(request_id if kept else "[0-9a-f]{32}", reply.headers["x-request-id"])
    assert gateway.send("GET", "/nowhere").headers["x-request-id"]


def test_the_document_describes_every_response(gateway):
    document = gateway.send("GET", "/openapi.json").json
    assert set(document["paths"]) == {*POSTS, *GETS}
    vectors = document["paths"]["/v1/embeddings"]["post"]["responses"]
    assert set(vectors) == {"200", "400", "401", "404", "413", "422", "429", "500", "503"}
    assert vectors["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert gateway.send("GET", "/docs").body.startswith(b"\n    <!DOCTYPE html>")
