"""Whom a request or connection comes from."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any


def peer_of(client: Sequence[Any] | None) -> str:
    """Return whose part of the gateway a client's socket address takes: its address's, in IPv6 its /64 network's.

    A host has all addresses of its /64 (RFC 4291), so that each of them would be a new caller. "unknown" without one.
    """
    if not client:
        return "unknown"
    try:
        address = ip_address(client[0])
    except ValueError:
        return str(client[0])
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))
