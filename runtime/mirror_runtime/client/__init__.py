"""Clients of a Triton server that serves the model `embed`. They need the extra `client` alone.

Importing this package does not load tritonclient.
"""

from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.client import Client, Statistics
from mirror_runtime.client.exchange import Served

__all__ = ["AsyncClient", "Client", "Served", "Statistics"]
