"""The routes other than OpenAI's: TEI's, information, metrics and the document."""

import asyncio
import gzip
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

from mirror_runtime import Encoder, __version__
from mirror_runtime.bundle import sha256_file
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.gateway import bodies
from mirror_runtime.gateway.app import make_app
from mirror_runtime.gateway.buffers import HeldBytes
from mirror_runtime.prompts import PROMPTS_FILE
from tests.support.fake_bundles import FINGERPRINT
from tests.support.gateways import MODEL, changed_bundle, running, vectors

POSTS = ("/v1/embeddings", "/embed", "/similarity")
GETS = ("/v1/models", "/v1/models/{name}", "/info", "/health", "/health/live", "/metrics")


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,), max_batch=100) as gateway:
        yield gateway


def test_an_encoder_that_records_what_it_was_trained_for_allows_exactly_that(gateway_bundle, tmp_path):
    with running(changed_bundle(gateway_bundle, tmp_path / "elastic", trained_dims=[2, 4])) as gateway:
        assert gateway.send("GET", "/info").json["dimensions"] == [2, 4, 8]
        assert len(gateway.embed("a", dimensions=2).json["data"][0]["embedding"]) == 2
        assert "may have 2, 4, 8" in gateway.embed("a", dimensions=3).json["error"]["message"]


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
    limits = {"max_batch": 100, "max_in_flight": 4096, "max_body_bytes": 4_000_000, "max_tokens": 64, "prompts": []}
    limits |= {"speeds": {"full": FINGERPRINT}}
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


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_page_needs_nothing_from_elsewhere(gateway, path):
    page = gateway.send("GET", path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(rb"https?://|src=|@import|url\(", page.body)
    assert not re.search(rb"innerHTML|document\.write", page.body)  # texts are texts


@pytest.mark.process
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_calls_the_gateway_that_served_it_under_any_spelling_and_prefix(gateway):
    (base,) = re.findall(r"const base = (.*);", gateway.send("GET", "/docs/").body.decode())
    script = f"for (const p of process.argv.slice(1)) {{ const location = {{ pathname: p }}; console.log({base}); }}"
    spellings = {"/": "/", "/docs": "/", "/docs/": "/", "//docs//": "/", "/at/": "/at/", "/at/docs": "/at/"}
    command = ["node", "-e", script, *spellings]
    bases = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert bases == list(spellings.values())


def test_models_say_which_space_they_are(gateway):
    (model,) = gateway.send("GET", "/v1/models").json["data"]
    assert {"id": MODEL, "fingerprint": FINGERPRINT, "dimensions": [4, 8], "max_tokens": 64}.items() <= model.items()
    assert model["created"] > 1_700_000_000
    assert gateway.send("GET", f"/v1/models/{MODEL}").json == model
    assert gateway.send("GET", "/v1/models/other").error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(("POST", path, {"input": "a"}) for path in ("/v1/embeddings/", "/embeddings", "//v1//embeddings")),
        ("POST", "/openai/deployments/mini/embeddings?api-version=2024-10-21", {"input": "a"}),
        *(("POST", path, {"inputs": "a"}) for path in ("/", "/embed/", "/invocations")),
        *(("GET", path, None) for path in ("/models", "/ping", "/info/")),
        *(("HEAD", path, None) for path in ("/health", "/v1/models")),
    ],
)
def test_other_names_of_routes(gateway, method, path, body):
    reply = gateway.send(method, path, body)
    assert reply.status == 200
    assert bool(reply.body) == (method != "HEAD")


@pytest.mark.parametrize("path", ["/rerank", "/embed_sparse", "/predict", "/v1/chat/completions"])
def test_what_the_model_cannot_do_is_said(gateway, path):
    reply = gateway.send("POST", path, {})
    assert reply.status == 404
    assert "gives one vector a text: POST /v1/embeddings" in reply.error["message"]


def test_similarity_is_the_cosine(gateway):
    texts = ["a cat", "a dog", "word " * 100]
    reply = gateway.send("POST", "/similarity", {"inputs": {"source_sentence": texts[0], "sentences": texts}})
    encoded = gateway.encoder.encode(texts)
    np.testing.assert_allclose(reply.json, encoded @ encoded[0], atol=1e-6)
    assert reply.headers["x-truncated"] == "1"


NULLS = dict.fromkeys(["encoding_format", "dimensions", "user", "truncate", "prompt_name", "normalize", "input_type"])


@pytest.mark.parametrize(
    "fields",
    [
        {"model": None, **NULLS},
        {"model": f"openai/{MODEL}", "user": 7, "dimensions": "8"},
        {"dimensions": 8.0, "truncate": "END", "truncate_prompt_tokens": -1, "input_type": "search_query"},
        {"truncate_prompt_tokens": 512, "truncation_direction": "right", "normalize": True},
    ],
)
def test_fields_that_mean_what_the_gateway_does_are_accepted(gateway, fields):
    reply = gateway.send("POST", "/v1/embeddings", {"input": "a", **fields})
    assert reply.status == 200, reply.body
    np.testing.assert_array_equal(vectors(reply.json["data"][0]["embedding"]), gateway.encoder.encode(["a"])[0])


def test_a_compressed_body_is_read_within_the_limit(gateway):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(b'{"input": "a"}')
    assert gateway.send("POST", "/v1/embeddings", body, headers).status == 200
    for content, status in ((body[:-4], 400), (b"no", 400), (gzip.compress(b" " * 4_100_000), 413)):
        assert gateway.send("POST", "/v1/embeddings", content, headers).status == status
    assert gateway.send("POST", "/v1/embeddings", body, {**headers, "Content-Encoding": "br"}).status == 415


def test_a_compressed_body_counts_as_what_it_becomes_and_is_decompressed_beside_the_loop(gateway, monkeypatch):
    counted, threads = [], []
    add, decompressed = HeldBytes.add, bodies._decompressed
    monkeypatch.setattr(HeldBytes, "add", lambda held, more: (counted.append(more), add(held, more))[1])
    monkeypatch.setattr(
        bodies,
        "_decompressed",
        lambda *given: (threads.append(threading.current_thread().name), decompressed(*given))[1],
    )
    body = b" " * 1_000_000 + b'{"input": "a"}'
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert gateway.send("POST", "/v1/embeddings", gzip.compress(body), headers).status == 200
    assert len(body) in counted
    assert threads[0].startswith("asyncio")


def test_only_named_origins_may_call_from_a_browser(gateway, gateway_bundle):
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert gateway.send("OPTIONS", "/v1/embeddings", headers=headers).status == 405
    with running(gateway_bundle, cors=("https://page.example",), keys=("a-key-of-sixteen-letters",)) as opened:
        preflight = opened.send("OPTIONS", "/v1/embeddings", headers=headers)
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, headers["Origin"])
        assert opened.send("OPTIONS", "/embed", headers={**headers, "Origin": "https://evil.example"}).status == 400


def test_prompts_by_name_and_by_what_a_text_is(gateway_bundle, tmp_path):
    bundle = shutil.copytree(gateway_bundle, tmp_path / "bundle")
    prompts = {"query": "find: ", "passage": "text: ", "search_document": "own: "}
    (bundle / PROMPTS_FILE).write_text(json.dumps({"prompts": prompts}))
    with Encoder.load(bundle, engine="fake") as encoder:
        assert encoder.prompts == {}, "the manifest has no hash of this file"
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][PROMPTS_FILE] = sha256_file(bundle / PROMPTS_FILE)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with running(bundle) as gateway:
        for fields, prompt in (
            ({"prompt_name": "query"}, "find: "),
            ({"input_type": "search_query"}, "find: "),
            ({"input_type": "document"}, "text: "),
            ({"input_type": "search_document"}, "own: "),
            ({"input_type": "classification"}, ""),
            ({}, ""),
        ):
            expected = gateway.encoder.encode([f"{prompt}a"])
            openai = gateway.send("POST", "/v1/embeddings", {"input": "a", **fields}).json["data"][0]["embedding"]
            tei = gateway.send("POST", "/embed", {"inputs": "a", **fields}).json[0]
            np.testing.assert_array_equal(vectors([openai, tei]), [expected[0], expected[0]])
        expected = gateway.encoder.encode(["find: a"])
        np.testing.assert_array_equal(gateway.encoder.encode(["a"], prompt_name="query"), expected)
        with pytest.raises(InputError, match="no prompt 'other': its prompts are 'query', 'passage', "):
            gateway.encoder.encode(["a"], prompt_name="other")
        refused = gateway.send("POST", "/embed", {"inputs": "a", "prompt_name": "other"})
        assert (refused.status, refused.error["param"]) == (400, "prompt_name")
        assert gateway.send("GET", "/info").json["prompts"] == list(prompts)
    (bundle / PROMPTS_FILE).write_text(json.dumps({"prompts": {"query": "ignore this: "}}))
    with pytest.raises(BundleError, match=f"corrupted: {PROMPTS_FILE} differ"):
        Encoder.load(bundle, engine="fake")
