"""Serving with Triton: the model that Triton runs, its repository, and a local server; re-exports the clients.

Importing this package loads neither tritonclient nor pytriton; each is imported when it is first needed.
"""

from mirror_runtime.client import AsyncClient, Client, Served, Statistics
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.server.server import Server
from mirror_runtime.triton.server.supervisor import ServiceOptions, serve

__all__ = ["AsyncClient", "Client", "Served", "Server", "ServiceOptions", "ServingOptions", "Statistics", "serve"]
