"""The benchmark's callers of `mirror gateway`, against a real one with the fake engine."""

import numpy as np
import pytest

from benchmarks.gateway import Gateway, GatewayCaller, _without_keys
from benchmarks.load import closed_loop
from mirror_runtime.errors import ServerError
from tests.support.gateways import running


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, max_batch=4) as found:
        yield found


def test_a_caller_gets_the_encoders_vectors_over_one_connection(gateway):
    texts = ["one", "zwei Häuser 🏠"]
    with Gateway(port=gateway.port, pid=0).connect() as caller:
        first = caller.encode(texts, batch_size=2)
        connection = caller._connection.sock
        again = caller.encode(texts, batch_size=2)
        assert caller._connection.sock is connection is not None
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, gateway.encoder.encode(texts), atol=1e-6)
    np.testing.assert_array_equal(first, again)
    assert connection.fileno() == -1  # closed: the gateway need not wait for it


def test_a_closed_loop_goes_through_the_gateway(gateway):
    before = gateway.metric("mirror_gateway_requests_total", route="/embed", status="200")
    load = closed_loop(Gateway(port=gateway.port, pid=0).connect, [["a"], ["b"]], concurrency=2, seconds=0.2)
    assert load.errors == 0
    answered = gateway.metric("mirror_gateway_requests_total", route="/embed", status="200") - before
    assert answered == len(load.samples_ms) + 2  # each caller warmed up with one


def test_a_refusal_is_named_and_spoils_nothing(gateway):
    caller = GatewayCaller(gateway.port)
    with pytest.raises(ServerError, match=r"/embed with HTTP 413: .*at most 4"):
        caller.encode(["a"] * 5, batch_size=5)
    assert caller.encode(["a"], batch_size=1).shape == (1, 8)
    caller.close()


def test_a_gateway_that_is_gone_is_an_error(gateway_bundle):
    with running(gateway_bundle) as gone:
        caller = GatewayCaller(gone.port, timeout_s=5)
        caller.encode(["a"], batch_size=1)
        caller.close()
    with pytest.raises(ServerError, match="did not answer /embed"):
        caller.encode(["a"], batch_size=1)


def test_its_version_is_what_it_says(gateway):
    assert Gateway(port=gateway.port, pid=0).version().startswith("mirror gateway 0.")


def test_the_users_key_does_not_lock_our_callers_out():
    assert _without_keys({"MIRROR_API_KEY": "secret", "PATH": "/bin"}) == {"PATH": "/bin"}
