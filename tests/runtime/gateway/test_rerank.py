"""The gateway's routes for a reranker, in the shapes of TEI and of Cohere."""

import contextlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from mirror_runtime.gateway import server
from mirror_runtime.repeats import RepeatFilter
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
        ("/rerank", {"query": "a" * 10_001, "texts": ["a"]}, 422, "at most 10000 characters"),
        ("/rerank", {"query": QUERY, "texts": TEXTS, "truncate": False}, 413, "text 2 has"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a"], "model": "other"}, 404, "the model here is 'mini'"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a", "\ud800"]}, 422, "text 1: contains a lone surrogate"),
        ("/v2/rerank", {"query": QUERY, "documents": [*"ab", 5]}, 422, "documents: text 2: is int, not str"),
        ("/v2/rerank", {"query": QUERY, "documents": [{"text": None}]}, 422, "documents: text 0: is NoneType"),
        ("/v2/rerank", {"query": QUERY, "documents": [{"title": "a", "text": "b"}]}, 422, "its text and nothing else"),
        ("/v2/rerank", {"query": QUERY, "documents": "a"}, 422, "documents: Input should be a valid list"),
        ("/v2/rerank", {"query": QUERY, "documents": []}, 422, "documents: this must hold at least one text"),
        ("/v2/rerank", {"query": QUERY, "documents": ["a"], "top_n": 0}, 422, "top_n"),
        ("/v1/embeddings", {"input": "a"}, 404, "has a reranker"),
    ],
)
def test_what_cannot_be_is_refused_by_name(gateway, path, body, status, message):
    reply = gateway.send("POST", path, body)
    assert (reply.status, message in reply.error["message"]) == (status, True), reply.body


def test_as_many_documents_are_objects_as_texts_are_allowed(gateway):
    documents = [{"text": f"a document of more than thirty letters {i}"} for i in range(2048)]
    reply = gateway.send("POST", "/v2/rerank", {"query": QUERY, "documents": documents, "top_n": 1})
    assert reply.status == 200, reply.body


PAGE = """
const [origin, page] = process.argv.slice(1), nodes = {}, ask = fetch;
const made = () => ({ inside: [], append(...x) { this.inside.push(...x); }, replaceChildren(...x) { this.inside = x; },
  addEventListener(_, work) { this.submit = work; }, textContent: "", value: "" });
globalThis.document = { getElementById: (id) => nodes[id] ??= made(), createElement: made };
globalThis.location = { pathname: "/" };
globalThis.fetch = (path, options) => ask(origin + path, options);
(0, eval)(page);
document.getElementById("query").value = "delete a folder";
document.getElementById("lines").value = "remove a directory\\na cat\\n";
const text = (node) => node.textContent + (node.inside ?? []).map(text).join(" ");
const drawn = setInterval(async () => {
  if (!nodes.document?.inside.length) return;
  clearInterval(drawn);
  await nodes.search.submit({ preventDefault() {} });
  console.log(JSON.stringify([nodes.compare.hidden, nodes.found.inside.map(text).join()]));
}, 5);
"""


@pytest.mark.process
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("kind", ["reranker", "encoder"])
def test_the_page_ranks_lines_and_compares_texts_only_where_there_are_vectors(gateway, gateway_bundle, kind):
    with contextlib.ExitStack() as around:
        served = gateway if kind == "reranker" else around.enter_context(gateways.running(gateway_bundle))
        (script,) = re.findall(r"<script>(.*)</script>", served.send("GET", "/").body.decode(), re.DOTALL)
        ran = subprocess.run(["node", "-e", PAGE, served.url, script], capture_output=True, text=True, check=True)
        hidden, found = json.loads(ran.stdout)
    assert hidden == (kind == "reranker")
    assert found.split()[0] == ("score" if hidden else "cosine")
    assert {"remove a directory", "a cat"} <= {line.strip() for line in re.split(r"-?\d\.\d{4}", found)}


def test_the_operator_is_told_the_routes_that_there_are(gateway, gateway_bundle, monkeypatch):
    told: list[str] = []
    with gateways.running(gateway_bundle) as other, monkeypatch.context() as patched:
        patched.setattr(server, "limit_repeats", RepeatFilter)
        patched.setattr(server.GatewayServer, "run", lambda self, _: self._on_started())
        for served in (gateway, other):
            with server.listen("127.0.0.1", 0) as listener:
                server.run(served.service.backend, served.service.settings, listener, on_progress=told.append)
    paths = [path for line in told for path in re.findall(r"^(?!more).* http://127.0.0.1:\d+(/.*)", line)]
    assert paths == ["/v2/rerank", "/rerank", "/v1", "/embed"]


def test_health_and_facts_work_and_an_encoders_gateway_does_not_rerank(gateway, gateway_bundle):
    assert gateway.send("GET", "/health").status == 200
    assert gateway.send("GET", "/v1/models").json["data"][0]["dimensions"] == [1]
    with gateways.running(gateway_bundle) as other:
        assert "neither reranks" in other.send("POST", "/rerank", {"query": "a", "texts": ["b"]}).error["message"]
