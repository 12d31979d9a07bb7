"""Hosts as they stand in URLs, and which of them are this machine: plain connections are for the loopback only."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """Return a host as URLs and gRPC want it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
