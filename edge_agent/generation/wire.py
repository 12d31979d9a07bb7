"""The protocol between the serving process, which has the port, and the generation process: one connection a request.

    serving:    one line of JSON: method, path, length of the body; the body
    generation: one line of JSON: status, type; pieces of the response, each a uint32 length and its bytes; 0 at the end

A response without its end was cut off: the process died. Closing the connection ends the generation of its text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
from dataclasses import dataclass

from edgefl.errors import ProtocolError

MAX_BODY_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 10
MAX_PIECE_BYTES = 64 << 20
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardedRequest:
    """A request as the serving process got it."""

    method: str
    path: str
    length: int  # of the body


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseHead:
    """How a response begins."""

    status: int
    type: str


def line(message: ForwardedRequest | ResponseHead) -> bytes:
    """Encode a line."""
    return json.dumps(dataclasses.asdict(message)).encode() + b"\n"


def parse_forwarded(text: bytes) -> ForwardedRequest:
    """Decode a request's line; raises ProtocolError."""
    try:
        request = ForwardedRequest(**json.loads(text))
        fits = 0 <= request.length <= MAX_BODY_BYTES
    except (ValueError, TypeError) as cause:
        raise ProtocolError(f"not a request of the serving process: {text[:80]!r}") from cause
    if not fits:
        raise ProtocolError(f"a request of the serving process has a body of {request.length} bytes")
    return request


def parse_head(text: bytes) -> ResponseHead:
    """Decode a response's line; raises ProtocolError."""
    try:
        return ResponseHead(**json.loads(text))
    except (ValueError, TypeError) as cause:
        raise ProtocolError(f"not a response of the generation process: {text[:80]!r}") from cause


def piece(data: bytes) -> bytes:
    """Encode a piece of a response; an empty one is its end."""
    return _LENGTH.pack(len(data)) + data


async def read_piece(reader: asyncio.StreamReader) -> bytes:
    """Return the next piece, empty at the end; raises IncompleteReadError if the process died, ProtocolError."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_PIECE_BYTES:
        raise ProtocolError(f"a response of the generation process has a piece of {length} bytes")
    return await reader.readexactly(length) if length else b""


def listen_privately() -> tuple[socket.socket, str]:
    """Return a listening socket of this machine, and its name in Linux's abstract namespace (unix(7))."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # the kernel chooses a name
    listener.listen(128)
    return listener, listener.getsockname().decode("latin-1")


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this process's user: anyone on the machine may connect."""
    import os

    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in {os.geteuid(), 0}
