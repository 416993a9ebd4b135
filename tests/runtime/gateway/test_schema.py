"""Generated requests that fit the OpenAPI document get its responses, and generated ones that do not get its errors."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.support.gateways import MODEL, running

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    schemathesis.checks.not_a_server_error,
]


SETTINGS = hypothesis.settings(
    **{"max_examples": 25, "derandomize": True, "deadline": None, "database": None},
    **{"phases": [Phase.generate], "suppress_health_check": list(HealthCheck)},
)


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def schema(gateway):
    return schemathesis.openapi.from_dict(gateway.send("GET", "/openapi.json").json)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("route", ["POST /v1/embeddings", "POST /embed"])
def test_generated_requests(gateway, schema, mode, route):
    method, path = route.split()
    statuses = set()

    @SETTINGS
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case):
        if mode is GenerationMode.POSITIVE and "model" in case.body:
            case.body["model"] = MODEL
        response = case.call(base_url=gateway.url)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    check()
    assert statuses & ({400, 422} if mode is GenerationMode.NEGATIVE else {200})
    assert gateway.send("GET", "/health").status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/info", "/health", "/metrics"])
def test_routes_without_a_body(gateway, schema, path):
    case = schema[path]["GET"].Case()
    case.validate_response(case.call(base_url=gateway.url), checks=CHECKS[:4])
