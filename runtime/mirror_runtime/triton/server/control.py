"""Load, replace and refuse models of a running server, with the key that its owner alone has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mirror_runtime.errors import ServerError
from mirror_runtime.extras import require

KEY_HEADER = "mirror-key"
OWNERS_APIS = "model-repository,shared-memory,trace,logging"
"""What only the holder of the key may use. Whoever loads models, or registers memory, runs code in the server."""

_CALL_S = 20.0
_CLOSED_MODEL = Path(__file__).with_name("closed.py")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach a running server as its owner.

    Attributes:
        address: host and port of gRPC.
        key: what the server was started with.
        pid: the tritonserver process.
    """

    address: str
    key: str
    pid: int


class ModelControl:
    """Triton's model control over gRPC. A context manager.

    Args:
        access: the server and its key.

    Raises:
        MissingExtra: tritonclient is not installed.
    """

    def __init__(self, access: Access) -> None:
        library = require("tritonclient.grpc", "client")
        self._library = library
        self._client = library.InferenceServerClient(access.address)
        self._headers = {f"triton-grpc-protocol-{KEY_HEADER}": access.key}

    def load(self, model: str, timeout_s: float) -> None:
        """Load a model, or load it again: the old one serves until the new one is ready, and finishes its requests.

        Raises:
            ServerError: it cannot be loaded; one that served before serves on.
        """
        with self._translated(f"{model} cannot be loaded"):
            self._client.load_model(model, headers=self._headers, client_timeout=timeout_s)

    def unload(self, model: str) -> None:
        """Unload a model; its requests under way are answered first.

        Raises:
            ServerError: the server does not do it.
        """
        with self._translated(f"{model} cannot be unloaded"):
            self._client.unload_model(model, headers=self._headers, client_timeout=_CALL_S)

    def refuse(self, model: str) -> None:
        """Put a model that refuses in a model's place. Requests that it had accepted are answered by the old one.

        Triton's own unload would refuse too, but as NOT_FOUND, which no client tries again.

        Raises:
            ServerError: the server does not do it.
        """
        with self._translated(f"{model} cannot be closed"):
            config = self._client.get_model_config(model, as_json=True, client_timeout=_CALL_S)["config"]
            kept = {name: config[name] for name in ("name", "backend", "max_batch_size", "input", "output")}
            kept["instance_group"] = [{"kind": "KIND_CPU", "count": 1}]
            self._client.load_model(
                model,
                headers=self._headers,
                config=json.dumps(kept),
                files={"file:1/model.py": _CLOSED_MODEL.read_bytes()},
                client_timeout=_CALL_S,
            )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> ModelControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._library.InferenceServerException as error:
            raise ServerError(f"{what}: {error.message()}") from error
