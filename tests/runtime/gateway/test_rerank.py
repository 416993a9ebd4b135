"""The gateway's routes for a reranker, in the shapes of TEI and of Cohere."""

import numpy as np
import pytest

from mirror_runtime.reranker import Reranker
from tests.support import gateways

QUERY, TEXTS = "how do I delete a folder", ["remove a directory", "a cat", "delete " * 90, ""]


@pytest.fixture(scope="module")
def gateway(reranker_bundle):
    with gateways.running(reranker_bundle) as gateway:
        yield gateway


def test_teis_answer_is_sorted_and_has_texts_where_asked(gateway):
    expected = Reranker(gateway.encoder).rank(QUERY, TEXTS)
    reply = gateway.send("POST", "/rerank", {"query": QUERY, "texts": TEXTS})
    assert reply.json == [{"index": one.index, "score": pytest.approx(one.score)} for one in expected]
    assert reply.headers["x-truncated"] == "1"
    raw = gateway.send("POST", "/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    scores = Reranker(gateway.encoder).scores(QUERY, TEXTS, raw=True)
    assert [one["text"] for one in raw.json] == [TEXTS[i] for i in np.argsort(-scores, kind="stable")]
    assert raw.json[0]["score"] == pytest.approx(scores.max())


@pytest.mark.parametrize("version", ["1", "2"])
def test_coheres_answer_has_the_best_documents(gateway, version):
    body = {"model": "mini", "query": QUERY, "documents": [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]}
    reply = gateway.send("POST", f"/v{version}/rerank", {**body, "top_n": 2, "return_documents": True})
    expected = Reranker(gateway.encoder).rank(QUERY, TEXTS, top_n=2)
    assert reply.json["results"] == [
        {"index": one.index, "relevance_score": pytest.approx(one.score), "document": {"text": TEXTS[one.index]}}
        for one in expected
    ]
    assert reply.json["meta"]["api_version"] == {"version": version}
    assert reply.json["id"] == reply.headers["x-request-id"]
    tokens = gateway.encoder.encode_detailed([(QUERY, text) for text in TEXTS]).tokens.sum()
    assert reply.json["usage"]["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/rerank", {"query": QUERY, "texts": []}, 422, "at least one text"),
        ("/rerank", {"query": QUERY, "texts": ["a"], "top_n": 1}, 422, "top_n"),
        ("/rerank", {"texts": ["a"]}, 422, "query"),
        ("/rerank", {"query": QUERY, "texts": TEXTS, "truncate": False}, 413, "text 2 has"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a"], "model": "other"}, 404, "the model here is 'mini'"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a", "\ud800"]}, 400, "text 1: contains a lone surrogate"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a"], "top_n": 0}, 422, "top_n"),
        ("/v1/embeddings", {"input": "a"}, 404, "has a reranker"),
    ],
)
def test_what_cannot_be_is_refused_by_name(gateway, path, body, status, message):
    reply = gateway.send("POST", path, body)
    assert (reply.status, message in reply.error["message"]) == (status, True), reply.body


def test_health_and_facts_work_and_an_encoders_gateway_does_not_rerank(gateway, gateway_bundle):
    assert gateway.send("GET", "/health").status == 200
    assert gateway.send("GET", "/v1/models").json["data"][0]["dimensions"] == [1]
    with gateways.running(gateway_bundle) as other:
        assert "neither reranks" in other.send("POST", "/rerank", {"query": "a", "texts": ["b"]}).error["message"]
