"""A corpus of lines of all lengths, and a bundle for the fake engine."""

from pathlib import Path

import pytest

ROWS = 9000
"""More than two windows of the encoder, so that a run can be killed between them."""


@pytest.fixture(scope="session")
def bundle(gateway_bundle: Path) -> Path:
    """A bundle for the fake engine; read it only."""
    return gateway_bundle


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"row {i} {'word ' * (i % 17)}\n" for i in range(ROWS)))
    return path
