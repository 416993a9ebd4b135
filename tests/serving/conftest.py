"""A bundle without weights, and one real tritonserver that serves it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror_runtime.bundle import (
    FORMAT_VERSION,
    TOKENIZER_FILE,
    EncoderSpec,
    Manifest,
    Pooling,
    sha256_file,
    write_json,
)
from mirror_runtime.triton.options import ServingOptions
from mirror_runtime.triton.repository import write_temporary_repository
from mirror_runtime.triton.server import Server


@pytest.fixture(scope="session")
def fake_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer and a manifest without artifacts: what the fake engine needs."""
    folder = tmp_path_factory.mktemp("bundles") / "fake"
    folder.mkdir()
    shutil.copy(minilm / TOKENIZER_FILE, folder)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by="tests",
        encoder=EncoderSpec(
            base_model="fake",
            revision=None,
            family="bert",
            pooling=Pooling.MEAN,
            normalize=True,
            max_tokens=64,
            dim=16,
            pad_to=None,
        ),
        fingerprint="0123456789abcdef",
        files={TOKENIZER_FILE: sha256_file(folder / TOKENIZER_FILE)},
        artifacts=(),
    )
    write_json(manifest, folder / "manifest.json")
    return folder


@pytest.fixture(scope="module")
def server(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server. Where the wheel is missing or does not run, the tests fail: they are not to be skipped."""
    repository = tmp_path_factory.mktemp("repository")
    write_temporary_repository(fake_bundle, repository, ServingOptions(engine="fake"))
    with Server(repository) as running:
        yield running
