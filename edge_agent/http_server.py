"""uvicorn over a listening socket of ours, within limits: half a request, or none, costs only its sender."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import uvicorn

from edgefl.protocols.http_limits import HttpLimits, LimitedServer

SHUTDOWN_S = 5
LIMITS = HttpLimits(max_connections=1000, max_waiting=256)


async def serve(
    app: Any, listener: socket.socket, context: ssl.SSLContext | None = None, limits: HttpLimits = LIMITS
) -> None:
    """Serve until cancelled; requests that have begun are answered."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        ssl_context_factory=(lambda _config, _default: context) if context else None,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = LimitedServer(config, limits, "predictions")
    task = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
    try:
        await asyncio.shield(task)
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=2 * SHUTDOWN_S)
        server.abort_all()
