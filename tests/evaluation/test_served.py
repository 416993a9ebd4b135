"""What ships gives the same figures as its bundle in process; what it answers wrongly is one clear error."""

import contextlib
import http.client
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from evaluation import served
from evaluation.probes import build_probes, evaluate_probes
from evaluation.served import open_served
from evaluation.statistics import Bootstrap
from mirror_runtime import Encoder
from mirror_runtime.errors import EngineError, InputError, ServerError
from tests.support.endpoints import endpoint, vectors
from tests.support.gateways import running

TEXTS = ["the cat", "a man is playing a guitar", "", "the river"] + [f"dog no. {i}" for i in range(60)]


@pytest.fixture(scope="module")
def encoder(tiny_bundle):
    with Encoder.load(tiny_bundle, precision="fp32") as encoder:
        yield encoder


def opened(name: str, texts: list[str]) -> Any:
    with ExitStack() as around:
        found = open_served(name, around)
        assert found is not None
        return found[0](texts)


def test_a_bundle_and_the_gateway_give_the_vectors_and_figures_of_the_encoder(tiny_bundle, encoder, monkeypatch):
    expected = encoder.encode(TEXTS)
    records = [(f"the cat no. {i} sat on a mat by the river",) for i in range(60)]
    probes = build_probes(records, records)
    figures = evaluate_probes(probes, encoder.encode, Bootstrap(resamples=100))
    with running(tiny_bundle, engine="onnxruntime") as gateway, ExitStack() as around:
        for name in (str(tiny_bundle), f"{tiny_bundle}:fp32", f"{gateway.url}/v1", f"{gateway.url}/v1#mini"):
            np.testing.assert_allclose(opened(name, TEXTS), expected, atol=1e-6)
        found = open_served(f"{gateway.url}/v1", around)
        assert found is not None
        encode, spec = found
        assert evaluate_probes(probes, encode, Bootstrap(resamples=100)) == figures
        assert spec is None
    with pytest.raises(EngineError, match="int8"):
        opened(f"{tiny_bundle}:int8", TEXTS)


def test_a_triton_address_names_host_port_and_model(encoder, monkeypatch):
    calls: list[tuple[str, str]] = []

    class Client(contextlib.nullcontext[Any]):
        def __init__(self, url: str, model: str) -> None:
            calls.append((url, model))
            super().__init__(self)

        def encode(self, texts: list[str]) -> Any:
            return np.packbits(encoder.encode(texts) > 0, axis=-1)

    monkeypatch.setattr(served, "Client", Client)
    bits = opened("triton://host:8001", TEXTS[:2])
    opened("triton://host:1/other", TEXTS[:2])
    assert calls == [("host:8001", "embed"), ("host:1", "other")]
    np.testing.assert_array_equal(bits, np.where(encoder.encode(TEXTS[:2]) > 0, 1, -1))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            lambda path, body: vectors(
                8 if len(body["input"]) == 32 and "the cat" in body["input"] else 7, len(body["input"])
            ),
            ServerError,
            "vectors of 8 components first and of 7 after 32 texts: it must not be replaced",
        ),
        (lambda path, body: (200, {"answers": []}), ServerError, "/embeddings does not answer as OpenAI's API does"),
        (lambda path, body: (200, {"data": [{"index": 0, "embedding": "AACA"}]}), ServerError, "lists of numbers"),
        (lambda path, body: (200, {"data": [{"index": 0, "embedding": [None]}]}), ServerError, "lists of numbers"),
        (lambda path, body: vectors(8, 1), ServerError, "returned 1 vectors for 32 texts"),
        (
            lambda path, body: (503, {"error": "busy"}),
            ServerError,
            'embeddings answered with status 503: {"error": "busy"}',
        ),
    ],
)
def test_a_wrong_answer_is_one_clear_error(answer, error, message):
    with endpoint(answer) as url, pytest.raises(error, match=message):
        opened(f"{url}#some", TEXTS)


def test_an_answer_that_breaks_off_is_one_clear_error(monkeypatch):
    def broken(*_, **__):
        raise http.client.IncompleteRead(b"{", 9)

    monkeypatch.setattr("urllib.request.urlopen", broken)
    with pytest.raises(ServerError, match="/embeddings cannot be asked: IncompleteRead"):
        opened("http://127.0.0.1:1/v1#some", TEXTS)


def test_an_endpoint_of_several_models_or_none_is_one_clear_error():
    two = {"data": [{"id": "a"}, {"id": "b"}]}
    with endpoint(lambda path, body: (200, two)) as url, pytest.raises(InputError, match="serves 2 models: name one"):
        opened(url, TEXTS)
    with pytest.raises(ServerError, match=r"/models cannot be asked: .*refused"):
        opened(url, TEXTS)


def test_a_reranker_has_nothing_to_measure(reranker_bundle):
    with ExitStack() as around, pytest.raises(InputError, match="is a reranker, which scores pairs and has no vectors"):
        open_served(f"{reranker_bundle}:fp32", around)


def test_other_names_are_left_to_the_reference(tmp_path):
    with ExitStack() as around:
        assert open_served(str(tmp_path), around) is None
        assert open_served("someone/some-model", around) is None
