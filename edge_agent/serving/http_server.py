"""uvicorn over a listening socket of ours, within limits: half a request, or none, costs only its sender.

uvicorn writes an answer's head and body apart, which is two system calls and two packets; here they leave together.
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
    """A transport that keeps an answer's head until the body comes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        """Send, or keep what is a head."""
        if not self._head and data.startswith(_HEAD) and not data.startswith(_CONTINUE):
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        """Send a head that no body follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close, after all that was written."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CorkedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # uvicorn chooses it at run time
    """uvicorn's protocol, httptools' or h11's, with a cork on its transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Hear of the connection."""
        self._cork = Cork(transport)
        super().connection_made(self._cork)

    def on_response_complete(self) -> None:
        """Hear that an answer is whole."""
        self._cork.flush()
        super().on_response_complete()


def make_server(
    app: Any, context: Callable[[], ssl.SSLContext] | None = None, limits: HttpLimits = LIMITS
) -> LimitedServer:
    """Return a server that does not run yet; `context` is asked for the TLS of each connection, None = plain."""
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
    """Serve until cancelled; requests that have begun are answered."""
    task = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
    try:
        await asyncio.shield(task)
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=2 * SHUTDOWN_S)
        server.abort_all()
