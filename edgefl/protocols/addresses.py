"""Hosts in URLs, and which are this machine: connections without TLS are allowed on loopback only."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from urllib.parse import urlsplit

PROBE_S = 2.0


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def other_scheme(url: str) -> str:
    """Return a hint if an HTTP server uses another scheme than its URL says; else empty.

    Tries a TLS handshake, which trusts no certificate and sends no secret.
    """
    parts = urlsplit(url)
    speaks_tls = _speaks_tls(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    if parts.scheme == "http" and speaks_tls:
        return f"The server uses TLS: use https://{parts.netloc}"
    if parts.scheme == "https" and speaks_tls is False:
        return f"The server does not use TLS, like a cloud that was started with --insecure: use http://{parts.netloc}"
    return ""


def _speaks_tls(host: str, port: int) -> bool | None:
    """Whether a server answers a TLS handshake; None if unknown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), PROBE_S) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        return False if error.reason == "WRONG_VERSION_NUMBER" else None
    except OSError:
        return None


def bracketed(host: str) -> str:
    """Return a host in the form for URLs and gRPC: an IPv6 address gets brackets."""
    return f"[{host}]" if ":" in host else host


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
