"""A reranker behind a real Triton server, asked by our client and through the gateway."""

import asyncio

import numpy as np
import pytest

from mirror_runtime.client import Client
from mirror_runtime.client.protocol import ClientOptions
from mirror_runtime.errors import InputError
from mirror_runtime.gateway.backends import TritonBackend, fetch_card
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.service import GatewayService
from mirror_runtime.gateway.settings import GatewaySettings
from mirror_runtime.reranker import Reranker
from mirror_runtime.triton import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support.triton_requests import running

QUERY, TEXTS = "où est le dossier 📁", ["remove a directory", "a cat", "delete " * 90, ""]


@pytest.mark.process
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_triton_and_the_gateway_return_the_scores_in_process(reranker_bundle, tmp_path, protocol):
    with Reranker.load(reranker_bundle, engine="fake") as reranker:
        expected = reranker.scores(QUERY, TEXTS, raw=True)
    write_temporary_repository(reranker_bundle, tmp_path, ServingOptions(engine="fake"))
    with running(tmp_path) as server:
        url = f"127.0.0.1:{server.grpc_port if protocol == 'grpc' else server.http_port}"
        with Client(url, protocol=protocol) as client:
            assert client.ready()
            assert np.array_equal(client.encode(TEXTS, query=QUERY)[:, 0], expected)
            with pytest.raises(InputError, match="parameter 'query' is missing"):
                client.encode(TEXTS)
        options = ClientOptions(url=url, protocol=protocol)

        async def score() -> None:
            backend = TritonBackend(options, fetch_card(options))
            service = GatewayService(backend, GatewaySettings(model="mini"), GatewayMetrics())
            await service.check_health()
            found = await service.encode([(QUERY, text) for text in TEXTS])
            await backend.aclose()
            assert np.array_equal(found.vectors[:, 0], expected)

        asyncio.run(score())
