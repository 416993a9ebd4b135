"""Fixtures of the tests of exports."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(traces_from_cache: None) -> None:
    """Use the cache of traces in all tests of exports."""


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def texts_file(tmp_path: Path) -> str:
    """A file with two short texts to prove on."""
    path = tmp_path / "texts.txt"
    path.write_text("the cat\na man is playing a guitar\n", encoding="utf-8")
    return str(path)
