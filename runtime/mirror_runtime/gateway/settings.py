"""The operator's settings of a gateway."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mirror_runtime.errors import InputError

KEY_VARIABLE = "MIRROR_API_KEY"
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Limits and names.

    Attributes:
        model: the name that requests must pass as `model`.
        dimensions: shorter vectors that requests may choose: the first N components. Only for encoders that
            were tuned for it.
        keys: API keys, each of which opens the gateway; empty for an open gateway.
        max_batch: maximum texts per request.
        max_in_flight: maximum texts accepted and not yet answered, over all requests.
        max_body_bytes: largest request body.
        timeout_s: seconds after which an unanswered request is refused and its waiting texts are dropped.
        drain_s: seconds between the signal to stop and the end of accepting connections: time for load balancers to
            see the failing health check.
    """

    model: str
    dimensions: tuple[int, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_batch: int = 2048
    max_in_flight: int = 4096
    max_body_bytes: int = 4_000_000
    timeout_s: float = 30.0
    drain_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_in_flight", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_in_flight < self.max_batch:
            raise InputError(
                f"max_in_flight is {self.max_in_flight}, less than the {self.max_batch} texts of the largest request, "
                "which could never be accepted: raise it or lower max_batch"
            )
        if self.timeout_s <= 0 or self.drain_s < 0:
            raise InputError(
                f"timeout_s is {self.timeout_s} and drain_s is {self.drain_s}: the timeout must be above 0, the drain "
                "time at least 0"
            )
        if not self.model:
            raise InputError("the model's name is empty: pass --model-name")

    def check_dimensions(self, dim: int) -> None:
        """Check that the shorter vectors are shorter than the encoder's."""
        wrong = [cut for cut in self.dimensions if not 0 < cut < dim]
        if wrong:
            raise InputError(f"--dimensions {wrong[0]}: this encoder's vectors have {dim}; choose 1 to {dim - 1}")


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Read the API keys: one per line of a file, or the one in the variable `MIRROR_API_KEY`.

    Several keys let clients change over one by one.

    Raises:
        InputError: both are set, the file cannot be read, or a key is empty, short, or has characters that an HTTP
            header cannot carry. The message never contains a key.
    """
    variable = environment.get(KEY_VARIABLE)
    if path is None:
        if variable is None:
            return ()
        where, keys = KEY_VARIABLE, [variable]
    else:
        if variable is not None:
            raise InputError(f"both {KEY_VARIABLE} and --api-key-file are set: use one of them")
        try:
            where, keys = str(path), path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    if not keys or any(len(key) < _MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError(
            f"{where} must hold keys of at least {_MIN_KEY_LENGTH} printable ASCII characters, "
            "such as those of: openssl rand -hex 32"
        )
    return tuple(keys)
