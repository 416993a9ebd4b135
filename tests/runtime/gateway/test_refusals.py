"""Bad requests, written and generated, get a status and a reason that names the field; the gateway stays healthy."""

import json
import os
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase

from mirror_runtime.gateway import bodies
from tests.support.gateways import MODEL, running

JSON = {"Content-Type": "application/json"}
V1, TEI = "/v1/embeddings", "/embed"


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, max_batch=4, max_body_bytes=10_000) as gateway:
        yield gateway


def fields(**changes):
    return {"model": MODEL, "input": "a", **changes}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "reason"),
    [
        (V1, b"", 422, None, "must be a JSON object"),
        (V1, b"{", 400, None, "the body is not JSON"),
        (V1, b'{"input": "\xff\xfe"}', 400, None, "the body is not JSON"),
        (V1, b"[" * 9_000, 400, None, ""),
        (V1, [], 422, None, "must be a JSON object"),
        (V1, {}, 422, "input", "Field required"),
        (V1, fields(model=7), 422, "model", "valid string"),
        (V1, fields(model=""), 404, "model", "the model here is 'mini', not ''"),
        (V1, fields(model="x" * 5000), 404, "model", "x" * 100 + "…"),
        (V1, fields(model="\ud800"), 404, "model", "not '?'"),
        (V1, fields(input=None), 422, "input", "NoneType, not str"),
        (V1, fields(truncate="START"), 400, "truncate", "cut at their end, at 64 tokens"),
        (V1, fields(truncate_prompt_tokens=5), 400, "truncate_prompt_tokens", "cut at their end"),
        (V1, fields(truncation_direction="left"), 422, "truncation_direction", "'right'"),
        (V1, fields(prompt_name="query"), 400, "prompt_name", "no prompt 'query': its prompts are none"),
        (V1, fields(input=[]), 422, "input", "at least one text"),
        (V1, fields(input=["a", 7]), 422, "input", "text 1: is int"),
        (V1, fields(input=["a", ["b"]]), 422, "input", "text 1: is list"),
        (V1, fields(input=[[]]), 422, "input", "text 0: is list"),
        (V1, fields(input=True), 422, "input", "is bool, not str"),
        (V1, fields(input=[1, 2, 3]), 422, "input", "token ids"),
        (V1, fields(input=[[1, 2], [3]]), 422, "input", "token ids"),
        (V1, fields(input=["fine", "lone \ud800"]), 422, "input", "text 1: contains a lone surrogate at character 5"),
        (V1, fields(input=["a"] * 5), 413, "input", "5 texts in one request: at most 4"),
        (V1, fields(input="a" * 20_000), 413, None, "more than 10000 bytes"),
        (V1, fields(encoding_format="int8"), 422, "encoding_format", "'float' or 'base64'"),
        (V1, fields(dimensions=0), 422, "dimensions", "greater than or equal to 1"),
        (V1, fields(dimensions="4.5"), 422, "dimensions", "valid integer"),
        (V1, fields(dimensions=4), 400, "dimensions", "may have 8"),
        (V1, fields(dimensions=10**30), 400, "dimensions", "may have 8"),
        (V1, fields(user=[]), 422, "user", "valid string"),
        (V1, fields(stream=True), 422, "stream", "not permitted"),
        (V1, fields(**{"x" * 900: 1}), 422, "x" * 100 + "…", "not permitted"),
        (V1, fields(aa=1, bb=2), 422, "aa", "aa, bb: these fields are not permitted"),
        (V1, {f"x{i}": 1 for i in range(600)}, 422, "x0", "x0, x1, x2 and 597 more: these fields"),
        (TEI, {}, 422, "inputs", "Field required"),
        (TEI, {"input": "a"}, 422, "inputs", "Field required"),
        (TEI, {"inputs": "a", "normalize": "yes"}, 422, "normalize", "valid boolean"),
        (TEI, {"inputs": "a", "normalize": False}, 400, "normalize", "always have length 1"),
        (TEI, {"inputs": "a", "truncate": 1}, 422, "truncate", "valid boolean"),
        (TEI, {"inputs": "word " * 100, "truncate": False}, 413, "inputs", "text 0 has 102 tokens"),
        (TEI, {"inputs": "a", "encoding_format": "float"}, 422, "encoding_format", "not permitted"),
    ],
)
def test_a_bad_request_gets_its_reason_and_affects_no_other(gateway, path, body, status, param, reason):
    reply = gateway.send("POST", path, body, JSON)
    assert reply.status == status, reply.body
    assert reply.error["param"] == param
    assert reason in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"]
    assert len(reply.body) < 1200, "the response repeats what the client sent"
    for leak in ("Traceback", ".py", "/work", "pydantic"):
        assert leak not in reply.body.decode()
    assert gateway.embed("still healthy").status == 200


def test_wrong_forms_methods_and_routes(gateway):
    form = gateway.send("POST", V1, b"input=a", {"Content-Type": "application/x-www-form-urlencoded"})
    assert form.status == 422
    assert "Content-Type: application/json" in form.error["message"]
    wrong_method = gateway.send("GET", V1)
    assert (wrong_method.status, wrong_method.error["code"]) == (405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"
    nowhere = gateway.send("POST", "/v1/completions", {})
    assert (nowhere.status, nowhere.error["code"]) == (404, "not_found")


CHUNKS = [b'{"model": "mini", "input": "', *([b"a" * 4096] * 20), b'"}']


@pytest.mark.parametrize("body", [iter(CHUNKS), b"x" * 5_000_000], ids=["counted while it is read", "far over it"])
def test_a_body_over_the_limit_gets_a_response(gateway, body):
    reply = gateway.send("POST", V1, body, JSON)
    assert reply.status == 413
    assert "more than 10000 bytes" in reply.error["message"]
    assert gateway.embed("still healthy").status == 200


@pytest.mark.parametrize(
    "body",
    [
        {f"field{i}": 1 for i in range(200_000)},
        {"inputs": [""] * 300_000},
        {"inputs": [[]] * 300_000},
        {"inputs": [{}] * 300_000},
        {"inputs": list(range(500_000))},
        {"inputs": ["\\"] * 300_000},
        {"inputs": "a", "x": [1] * 300_000},
    ],
    ids=["fields", "texts", "lists", "objects", "ids", "escapes", "numbers"],
)
def test_a_large_body_that_cannot_be_a_request_is_refused_unparsed(generated_gateway, monkeypatch, body):
    monkeypatch.setattr(bodies, "_parsed", lambda body: pytest.fail("it was parsed"))
    reply = generated_gateway.send("POST", TEI, body)
    assert (reply.status, reply.error["code"]) == (413, "body_too_complex")
    assert "at most 2048 texts" in reply.error["message"]


def test_no_spelling_of_the_type_and_no_encoding_hides_values(generated_gateway):
    many = json.dumps({"inputs": [[]] * 300_000}).encode()
    reply = generated_gateway.send("POST", TEI, many, {"Content-Type": "application/JSON"})
    assert (reply.status, reply.error["code"]) == (413, "body_too_complex")
    statuses = {"utf-8": 200, "utf-8-sig": 200, "utf-16": 400, "utf-32-le": 400}  # quotes are counted as bytes
    for encoding, status in statuses.items():
        assert generated_gateway.send("POST", TEI, '{"inputs": "a"}'.encode(encoding), JSON).status == status


def test_large_bodies_of_texts_are_read(generated_gateway):
    texts = ['"quoted" \\ [1, {2: 3}], ' * 40 + str(i) for i in range(1000)]
    for body in (texts, texts[0] * 1000):
        plain = json.dumps({"inputs": body}, indent=4).encode()
        assert len(plain) > 1_000_000
        assert generated_gateway.send("POST", TEI, plain, JSON).status == 200
    bad = generated_gateway.send("POST", TEI, {"inputs": ["a" * 100_000, "lone \ud800"]})
    assert (bad.status, bad.error["param"]) == (422, "inputs")
    assert "text 1: contains a lone surrogate" in bad.error["message"]
    assert generated_gateway.send("POST", TEI, b'{"inputs": "' + b"a" * 100_000, JSON).error["code"] == "invalid_json"


def send_checked(case, url, *also):
    """Send a request that schemathesis made; check its response with the document."""
    from schemathesis.specs.openapi import checks

    names = ("status_code", "content_type", "response_headers", "response_schema")
    response = case.call(base_url=url)
    case.validate_response(response, checks=[*(getattr(checks, f"{name}_conformance") for name in names), *also])
    return response


EXAMPLES = int(os.environ.get("MIRROR_FUZZED_REQUESTS", "100")) // 8
OPTIONS: dict[str, Any] = {"max_examples": EXAMPLES, "derandomize": True, "deadline": None, "database": None}
SETTINGS = hypothesis.settings(phases=[Phase.generate], suppress_health_check=list(HealthCheck), **OPTIONS)


@pytest.fixture(scope="module")
def generated_gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def schema(generated_gateway):
    import schemathesis

    return schemathesis.openapi.from_dict(generated_gateway.send("GET", "/openapi.json").json)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("route", ["POST /v1/embeddings", "POST /embed"])
def test_generated_requests(generated_gateway, schema, mode, route):
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import negative_data_rejection

    method, path = route.split()
    statuses = set()

    @SETTINGS
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=GenerationMode(mode)))
    def check(case):
        if mode == "positive" and "model" in case.body:
            case.body["model"] = MODEL
        response = send_checked(case, generated_gateway.url, negative_data_rejection, not_a_server_error)
        statuses.add(response.status_code)

    check()
    assert statuses & ({400, 422} if mode == "negative" else {200})
    assert generated_gateway.send("GET", "/health").status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/info", "/health", "/health/live", "/metrics"])
def test_routes_without_a_body(generated_gateway, schema, path):
    send_checked(schema[path]["GET"].Case(), generated_gateway.url)
