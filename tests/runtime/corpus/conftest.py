from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundle(gateway_bundle: Path) -> Path:
    """A bundle for the fake engine; read it only."""
    return gateway_bundle
