"""The serving process's way to the generation process: requests in, responses out, piece by piece.

Invariant: each request gets a response in OpenAI's form, also if the generation process is not there or dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from edge_agent.generation import wire
from edge_agent.generation.api_error import ApiError
from edge_agent.generation.responses import encoded, event_of
from edgefl.errors import ProtocolError

CONNECT_S = 30.0  # the process may be starting again

_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_DIED = "the generation process of this device ended; it starts again, send the request again"


class GenerationProxy:
    """Forwards requests to the process that listens at an address; empty = this device has none."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def forward(self, method: str, path: str, body: bytes, send: _Send, receive: _Receive) -> None:
        """Answer a request; when its client is gone, the generation of its text ends."""
        if not self._address:
            none = (
                "this device generates no texts: roll out a language model (`edgefl offload publish-decoder`), or "
                "start its agent with --generate FOLDER"
            )
            await send_error(send, ApiError(404, none, code="no_generation"))
            return
        if len(body) > wire.MAX_BODY_BYTES:
            error = ApiError(413, f"the request has more than {wire.MAX_BODY_BYTES} bytes", code="too_large")
            await send_error(send, error)
            return
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await _connected(self._address)
        except (OSError, TimeoutError):
            await send_error(send, ApiError(503, _DIED, code="generation_ended"))
            return
        forwarding = asyncio.create_task(self._forward(method, path, body, (reader, writer), send), name="generate")
        gone = asyncio.create_task(_until_gone(receive), name="client")
        try:
            await asyncio.wait((forwarding, gone), return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                forwarding.result()
        finally:
            writer.close()
            for task in (gone, forwarding):
                task.cancel()
            await asyncio.gather(gone, forwarding, return_exceptions=True)

    async def _forward(
        self, method: str, path: str, body: bytes, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        send: _Send,
    ) -> None:  # fmt: skip
        reader, writer = connection
        head: wire.ResponseHead | None = None
        try:
            writer.write(wire.line(wire.ForwardedRequest(method=method, path=path, length=len(body))) + body)
            await writer.drain()
            head = wire.parse_head(await reader.readline())
            if head.type == wire.EVENTS:
                await _start(send, head)
                while data := await wire.read_piece(reader):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
                return
            parts = []
            while data := await wire.read_piece(reader):
                parts.append(data)
        except (OSError, ProtocolError, asyncio.IncompleteReadError):
            error = ApiError(503, _DIED, code="generation_ended")
            if head is not None and head.type == wire.EVENTS:  # its status is sent: the error is the last event
                await send({"type": "http.response.body", "body": event_of(error.as_json())})
            else:
                await send_error(send, error)
            return
        await _start(send, head, sum(map(len, parts)))
        await send({"type": "http.response.body", "body": b"".join(parts)})


async def _connected(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an abstract address, which uvloop's own function would cut at its first character."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)  # noqa: FBT003 - its only parameter has no name
    try:
        await asyncio.get_running_loop().sock_connect(connection, address.encode("latin-1"))
        return await asyncio.open_unix_connection(sock=connection, limit=wire.MAX_LINE_BYTES)
    except BaseException:
        connection.close()
        raise


async def send_error(send: _Send, error: ApiError) -> None:
    """Send an error as a complete response."""
    body = encoded(error.as_json())
    await _start(send, wire.ResponseHead(status=error.status, type=wire.JSON), len(body))
    await send({"type": "http.response.body", "body": body})


async def _start(send: _Send, head: wire.ResponseHead, length: int | None = None) -> None:
    headers = [(b"content-type", head.type.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    else:
        headers.append((b"cache-control", b"no-cache"))
    if head.status in {429, 503}:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": head.status, "headers": headers})


async def _until_gone(receive: _Receive) -> None:
    with contextlib.suppress(OSError):
        while (await receive())["type"] != "http.disconnect":
            pass
