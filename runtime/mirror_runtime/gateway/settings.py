"""The operator's settings of a gateway."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from mirror_runtime.errors import InputError

KEY_VARIABLE = "MIRROR_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Limits and names.

    Attributes:
        model: the name that requests must pass as `model`.
        dimensions: shorter vectors that requests may choose: the first N components. Empty for those that the model
            records that it was trained for.
        keys: API keys, each of which opens the gateway; empty for an open gateway.
        max_batch: maximum texts per request.
        max_in_flight: maximum texts accepted and not yet answered, over all requests of at most one slice (see
            `service`), and as many over all larger ones. A caller is admitted beyond it up to an equal share.
        max_body_bytes: largest request body.
        timeout_s: seconds after which an unanswered request is refused and its waiting texts are dropped.
        drain_s: seconds between the signal to stop and the end of accepting connections: time for load balancers to
            see the failing health check.
        allowed_hosts: names that requests may have in their Host header; empty for any. On loopback, other names are
            those of a web page that reaches the gateway through its reader's browser (DNS rebinding).
        cors: origins whose pages may call this gateway from a browser; "*" for any.
        max_connections: open connections. Beyond it, the one that has been idle or slow for longest is closed.
        max_peer_connections: likewise, of one address. A proxy is one address.
        max_header_bytes: bytes of a request's head. Browsers and proxies send less than 16,384.
        max_headers: headers of a request, trailers included.
        header_s: seconds until a request's head is complete, from its connection or its first byte.
        body_s: seconds until its body is complete: 4 MB at 1 Mbit/s.
        answer_s: seconds until its answer has been read, once it does not fit into the socket's buffer.
        idle_s: seconds until a connection without a request is closed. Longer than load balancers keep idle
            connections, so that they close them and no request meets a closing one.
        max_buffered_bytes: bytes of bodies that were read and answers that were not sent, without the first 65,536 of
            each request; one caller may hold half. It holds 12 requests of 2,048 texts of 384 components.
    """

    model: str
    dimensions: tuple[int, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_batch: int = 2048
    max_in_flight: int = 4096
    max_body_bytes: int = 4_000_000
    timeout_s: float = 30.0
    drain_s: float = 1.0
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_connections: int = 1024
    max_peer_connections: int = 512
    max_header_bytes: int = 32_768
    max_headers: int = 100
    header_s: float = 10.0
    body_s: float = 30.0
    answer_s: float = 30.0
    idle_s: float = 75.0
    max_buffered_bytes: int = 256_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("max_") and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
            if name.endswith("_s") and (value < 0 or (value == 0 and name != "drain_s")):
                raise InputError(f"{name} is {value}: it must be above 0 seconds")
        if self.max_in_flight < self.max_batch:
            raise InputError(
                f"max_in_flight is {self.max_in_flight}, less than the {self.max_batch} texts of the largest request, "
                "which could never be accepted: raise it or lower max_batch"
            )
        if not self.model:
            raise InputError("the model's name is empty: pass --model-name")


def hosts_allowed_at(host: str, named: Sequence[str]) -> tuple[str, ...]:
    """Return the allowed hosts of a gateway that listens on `host`: those named, and on loopback its own names.

    Any host is allowed if "*" is named, or elsewhere than on loopback if none is. IPv6 addresses are in brackets, as in
    Host headers.
    """
    if "*" in named or (not named and not is_loopback(host)):
        return ()
    names = (name.lower() for name in (*named, *LOOPBACK, host))
    return tuple(dict.fromkeys(f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name for name in names))


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"


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
