"""The real `openai` client works with a gateway as with OpenAI."""

import base64

import numpy as np
import pytest

from tests.support.fake_bundles import FINGERPRINT
from tests.support.gateways import MODEL, running, vectors

TEXTS = ["", "a", "Zwei Häuser am See 🏠", "one\x00two", *(" ".join(["word"] * n) for n in range(1, 60, 7))]


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway):
    with gateway.client() as client:
        yield client


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_vectors_equal_the_encoders_to_the_bit(client, gateway, encoding):
    chosen = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model=MODEL, input=TEXTS, **chosen)
    expected = gateway.encoder.encode_detailed(TEXTS)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    found = [item.embedding for item in answer.data]
    if encoding == "base64":  # the client decodes it only when it chose base64 itself
        found = [np.frombuffer(base64.b64decode(text), "<f4") for text in found]
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected.vectors)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == expected.tokens.sum()
    assert answer.model == MODEL


def test_one_text_is_a_list_of_one_and_fewer_dimensions_are_cut_and_normalised_again(client, gateway):
    answer = client.embeddings.create(model=MODEL, input=TEXTS, dimensions=4, encoding_format="float")
    cut = gateway.encoder.encode(TEXTS)[:, :4]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_array_equal(vectors([item.embedding for item in answer.data]), expected)
    full = client.embeddings.create(model=MODEL, input="a", dimensions=8, user="someone")
    np.testing.assert_array_equal(vectors([item.embedding for item in full.data]), gateway.encoder.encode(["a"]))


def test_truncation_and_the_vector_space_are_reported(client):
    raw = client.embeddings.with_raw_response.create(model=MODEL, input=["short", "word " * 100, "short"])
    assert raw.headers["x-truncated"] == "1"
    assert raw.headers["x-vector-space"] == FINGERPRINT
    assert raw.parse().model_extra["truncated"] == [1]


def test_the_client_raises_its_usual_exceptions(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="the model here is 'mini', not 'other'"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="may have 4, 8") as wrong:
        client.embeddings.create(model=MODEL, input="a", dimensions=5)
    assert (wrong.value.param, wrong.value.code) == ("dimensions", "dimensions_not_allowed")
    with pytest.raises(openai.UnprocessableEntityError, match="token ids"):
        client.embeddings.create(model=MODEL, input=[1, 2, 3])
    assert [model.id for model in client.models.list()] == [MODEL]


def test_only_valid_keys_open_a_locked_gateway(gateway_bundle):
    keys = ("first-key-of-sixteen", "second-key-of-sixteen")
    with running(gateway_bundle, keys=keys) as locked:
        for key in keys:
            with locked.client(key) as client:
                assert client.embeddings.create(model=MODEL, input="a").data
        for key in ("", keys[0][:-1], f"{keys[0]}x", " ".join(keys)):
            headers = {"Authorization": f"Bearer {key}"}
            reply = locked.send("POST", "/v1/embeddings", {"model": MODEL, "input": "a"}, headers)
            assert reply.status == 401
            assert reply.error["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        basic = locked.send("GET", "/info", headers={"Authorization": f"Basic {keys[0]}"})
        unread = locked.send("POST", "/embed", b"{no json")  # refused before its body is read
        nowhere = locked.send("GET", "/what/is/here")
        assert [basic.status, unread.status, nowhere.status] == [401, 401, 401]
        for path in ("/health", "/metrics", "/docs", "/openapi.json"):
            assert locked.send("GET", path).status == 200
        schemes = locked.send("GET", "/openapi.json").json["components"]["securitySchemes"]
        assert schemes == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
