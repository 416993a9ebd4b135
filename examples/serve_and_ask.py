"""Serve a bundle with the packaged tritonserver on free ports, and ask it over gRPC.

python examples/serve_and_ask.py bundles/mine "delete a folder" "remove a directory tree"
"""

import sys
import tempfile
from pathlib import Path

from mirror_runtime.triton import Client, Server, ServingOptions
from mirror_runtime.triton.repository.render import write_repository


def main(bundle: str, texts: list[str], engine: str = "auto") -> None:
    """Serve `bundle` and print each text's first components."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_repository(Path(bundle), repository, ServingOptions(engine=engine))
        with Server(repository) as server, Client(f"127.0.0.1:{server.grpc_port}") as client:
            print("vector space", client.fingerprint())
            for text, vector in zip(texts, client.encode(texts), strict=True):
                print(text, vector[:3])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
