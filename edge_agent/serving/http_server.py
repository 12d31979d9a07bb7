"""uvicorn on our listening socket, with limits: a slow or incomplete request affects only its own sender.

uvicorn writes the head and the body of a response separately, in two system calls and packets; here they are sent
together.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from edgefl.protocols.ports.http_limits import HttpLimits, LimitedServer

SHUTDOWN_S = 5
LIMITS = HttpLimits(max_connections=2000, max_waiting=1000)
_HEAD, _CONTINUE = b"HTTP/1.1 ", b"HTTP/1.1 100"


class Cork:
    """A transport that holds back the head of a response until its body is written (compare TCP_CORK)."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        """Send data, but hold back a head."""
        if not self._head and data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        """Send a head without a body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close, after everything written is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CorkedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # uvicorn chooses it at run time
    """uvicorn's protocol (httptools or h11) on a corked transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wrap the new connection's transport."""
        self._cork = Cork(transport)
        super().connection_made(self._cork)

    def on_response_complete(self) -> None:
        """Send the head of a response that has no body."""
        self._cork.flush()
        super().on_response_complete()


def make_server(
    app: Any, context: Callable[[], ssl.SSLContext] | None = None, limits: HttpLimits = LIMITS
) -> LimitedServer:
    """Return a server, not started; `context` returns the TLS context of each new connection, None = no TLS."""
    config = uvicorn.Config(
        app,
        http=CorkedProtocol,
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return LimitedServer(config, limits, "predictions", context)


async def serve(server: LimitedServer, listener: socket.socket) -> None:
    """Serve until cancelled; requests in progress are answered first."""
    task = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
    try:
        await asyncio.shield(task)
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=2 * SHUTDOWN_S)
        server.abort_all()
