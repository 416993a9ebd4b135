"""A bundle without weights, and one real tritonserver that serves it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc

from mirror_runtime.triton import Server, ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support.fake_bundles import write_fake_bundle
from tests.support.triton_requests import running


@pytest.fixture(scope="session")
def fake_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the fake engine: a real tokenizer and a manifest without artifacts."""
    return write_fake_bundle(minilm, tmp_path_factory.mktemp("bundles") / "fake", dim=16)


@pytest.fixture(scope="session")
def server(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The running server that all tests of a worker share. Tests that stop or kill a server start their own.

    If the wheel is missing or does not run, the tests fail instead of being skipped.
    """
    repository = tmp_path_factory.mktemp("repository")
    write_temporary_repository(fake_bundle, repository, ServingOptions(engine="fake"))
    with running(repository) as server:
        yield server


@pytest.fixture
def raw(server: Server) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """Triton's own client of the shared server."""
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    yield client
    client.close()
