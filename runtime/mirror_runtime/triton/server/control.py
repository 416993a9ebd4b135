"""Load and replace models of a running server, with the key that only its owner has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from mirror_runtime.errors import ServerError
from mirror_runtime.extras import require

KEY_HEADER = "mirror-key"
OWNERS_APIS = "model-repository,shared-memory,trace,logging"
"""APIs that require the key, because loading models or registering memory runs code in the server."""

_CALL_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Access:
    """The address and key of a running server."""

    address: str  # host and port of gRPC
    key: str  # with which the server was started
    pid: int


class ModelControl:
    """Triton's model control over gRPC. A context manager."""

    def __init__(self, access: Access) -> None:
        library = require("tritonclient.grpc", "client")
        self._library = library
        self._client = library.InferenceServerClient(access.address)
        self._headers = {f"triton-grpc-protocol-{KEY_HEADER}": access.key}

    def load(self, model: str, timeout_s: float) -> None:
        """Load a model, or reload it: the old one serves until the new one is ready, and finishes its requests.

        If it cannot be loaded, the old model continues to serve.
        """
        with self._translate_errors(f"{model} cannot be loaded"):
            self._client.load_model(model, headers=self._headers, client_timeout=timeout_s)

    def unload(self, model: str) -> None:
        """Unload a model after it has answered its requests."""
        with self._translate_errors(f"{model} cannot be unloaded"):
            self._client.unload_model(model, headers=self._headers, client_timeout=_CALL_S)

    def busy(self) -> bool:
        """Return whether any model is being loaded or unloaded."""
        with self._translate_errors("the models cannot be listed"):
            index = self._client.get_model_repository_index(self._headers, as_json=True, client_timeout=_CALL_S)
        return any(model.get("state") in ("LOADING", "UNLOADING") for model in index.get("models", []))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> ModelControl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _translate_errors(self, failure: str) -> Iterator[None]:
        try:
            yield
        except self._library.InferenceServerException as error:
            raise ServerError(f"{failure}: {error.message()}") from error
