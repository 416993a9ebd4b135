"""A transport for both clients that needs no server: it echoes the lengths of the texts."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.client.protocol import Rejected, Reply
from mirror_runtime.errors import ServerError


class Echo:
    """A transport that returns each text's length as its vector and rejects requests that contain "bad"."""

    def __init__(self, body_bytes: int = 1000, data_type: str = "TYPE_FP32", dtype: Any = "f4", dim: int = 1) -> None:
        self.body_bytes = body_bytes
        self.data_type, self.dtype, self.dim = data_type, dtype, dim
        self.sent: list[list[bytes]] = []
        self.options: list[tuple[dict[str, Any], float]] = []
        self.refusals: list[Exception] = []
        self.fingerprints = ["old"]
        self.in_flight = self.most_in_flight = 0
        self.parameters: dict[str, str] = {}

    def submit(self, texts: NDArray[Any], parameters: dict[str, Any], timeout_s: float) -> Callable[[], Reply]:
        assert texts.ndim == 2
        assert texts.shape[1] == 1
        raw = list(texts[:, 0])
        self.sent.append(raw)
        self.options.append((parameters, timeout_s))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def wait() -> Reply:
            self.in_flight -= 1
            if self.refusals:
                raise self.refusals.pop(0)
            if b"down" in raw:
                raise ServerError("the server is down")
            if b"bad" in raw:
                raise Rejected(f"[request id: 7] text {raw.index(b'bad')}: not acceptable")
            sizes = np.array([[len(text)] for text in raw])
            name = self.fingerprints.pop(0) if len(self.fingerprints) > 1 else self.fingerprints[0]
            vectors, tokens = sizes.repeat(self.dim, axis=1).astype(self.dtype), sizes.astype(np.int32)
            return Reply(vectors=vectors, tokens=tokens, truncated=sizes > 5, fingerprint=name)

        return wait

    def config(self) -> dict[str, Any]:
        output = {"name": "EMBEDDING", "data_type": self.data_type, "dims": [str(self.dim)]}
        parameters = {name: {"string_value": value} for name, value in self.parameters.items()}
        return {"name": "embed", "max_batch_size": 64, "output": [output], "parameters": parameters}

    def statistics(self) -> dict[str, Any]:
        return {"inference_count": "12"}

    def close(self) -> None: ...


class AsyncEcho:
    """`Echo` for asyncio."""

    def __init__(self, echo: Echo) -> None:
        self.echo = echo
        self.body_bytes = echo.body_bytes

    async def submit(self, texts: NDArray[Any], parameters: dict[str, Any], timeout_s: float) -> Reply:
        wait = self.echo.submit(texts, parameters, timeout_s)
        await asyncio.sleep(0.001)
        return wait()

    async def config(self, timeout_s: float) -> dict[str, Any]:
        return self.echo.config()

    async def close(self) -> None: ...
