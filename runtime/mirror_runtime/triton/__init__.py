"""Serving with Triton: the model that Triton runs, the repository it reads, a local server, and a client.

Importing this package loads neither tritonclient nor pytriton: each is imported when it is first needed.
"""

from mirror_runtime.triton.client import Client, Statistics
from mirror_runtime.triton.repository import ServingOptions
from mirror_runtime.triton.server import Server, serve

__all__ = ["Client", "Server", "ServingOptions", "Statistics", "serve"]
