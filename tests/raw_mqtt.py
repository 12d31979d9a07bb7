"""MQTT packets by hand, over TLS: what no client library sends."""

from __future__ import annotations

import contextlib
import socket
import ssl

from edgefl.protocols.tls import client_context

EVERY_UP = "edgefl/v1/up/+/+"


def up(device: str) -> str:
    return f"edgefl/v1/up/{device}/state"


def down(device: str) -> str:
    return f"edgefl/v1/down/{device}/desired"


def raw_connect(client_id: bytes = b"cam-1", *, will_topic: bytes = b"") -> bytes:
    will = b"" if not will_topic else len(will_topic).to_bytes(2) + will_topic + b"\0\4boom"
    body = b"\0\4MQTT\4" + (b"\x26" if will else b"\x02") + b"\0\x0a" + len(client_id).to_bytes(2) + client_id + will
    return bytes([0x10, len(body)]) + body


@contextlib.contextmanager
def raw(broker, ca, identity=None):
    context = client_context(ca, identity)
    plain = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        yield secure


def answer(connection: ssl.SSLSocket) -> bytes:
    """What comes back, if anything does before the connection ends."""
    try:
        return connection.recv(100)
    except TimeoutError:
        raise
    except OSError:
        return b""
