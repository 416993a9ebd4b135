"""A bundle without weights, and one real tritonserver that serves it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.server import Server
from tests.support.fake_bundles import write_fake_bundle


@pytest.fixture(scope="session")
def fake_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer and a manifest without artifacts: what the fake engine needs."""
    return write_fake_bundle(minilm, tmp_path_factory.mktemp("bundles") / "fake", 64, 16, ())


@pytest.fixture(scope="module")
def server(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server. Where the wheel is missing or does not run, the tests fail: they are not to be skipped."""
    repository = tmp_path_factory.mktemp("repository")
    write_temporary_repository(fake_bundle, repository, ServingOptions(engine="fake"))
    with Server(repository) as running:
        yield running
