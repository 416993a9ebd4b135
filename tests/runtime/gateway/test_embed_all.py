"""The gateway's route for vectors of tokens, in TEI's shape."""

import numpy as np
import pytest

from tests.support import gateways

TEXTS = ["remove a directory", "a cat", "delete " * 90, "", *(f"{'word ' * 50}{i}" for i in range(30))]


@pytest.fixture(scope="module")
def gateway(tokens_bundle):
    with gateways.running(tokens_bundle) as gateway:
        yield gateway


@pytest.mark.parametrize("texts", ["one text", TEXTS[:4], TEXTS])
def test_the_answer_has_each_texts_tokens_also_where_a_request_is_sliced(gateway, texts):
    reply = gateway.send("POST", "/embed_all", {"inputs": texts})
    expected = gateway.encoder.encode_tokens([texts] if isinstance(texts, str) else texts)
    assert len(reply.json) == len(expected)
    for found, one in zip(reply.json, expected, strict=True):
        np.testing.assert_allclose(found, one.vectors, atol=1e-7)
    assert reply.headers["x-truncated"] == str(sum(len(one.vectors) == 64 for one in expected))


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/embed_all", {"inputs": []}, 422, "at least one text"),
        ("/embed_all", {"inputs": "a", "normalize": True}, 422, "normalize"),
        ("/embed_all", {"inputs": TEXTS[:3], "truncate": False}, 413, "text 2 has"),
        ("/embed_all", {"inputs": "a", "prompt_name": "query"}, 400, "no prompt 'query'"),
        ("/v1/embeddings", {"input": "a"}, 404, "a vector for each token and none for a text"),
    ],
)
def test_what_cannot_be_is_refused_by_name(gateway, path, body, status, message):
    reply = gateway.send("POST", path, body)
    assert (reply.status, message in reply.error["message"]) == (status, True), reply.body


def test_it_is_healthy_and_tells_its_model(gateway):
    assert gateway.send("GET", "/health").status == 200
    assert gateway.send("GET", "/info").json["dim"] == 8
