"""uvicorn inside the cloud's own event loop, over TLS 1.3, within the limits of `edgefl.protocols.http_limits`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import uvicorn
from starlette.types import ASGIApp

from edgefl.errors import ConfigError, HomeError
from edgefl.protocols.http_limits import HttpLimits, LimitedServer
from edgefl.protocols.listener import listen

STOP_GRACE_S = 1
STOP_S = 10.0


@contextlib.asynccontextmanager
async def serve_http(
    app: ASGIApp, host: str, port: int, context: ssl.SSLContext | None, limits: HttpLimits | None = None
) -> AsyncIterator[int]:
    """Serve while the block runs, and give its port; port 0 takes a free one.

    Raises HomeError for an address that cannot be had.
    """
    try:
        listener = listen(host, port, "--http-port")
    except ConfigError as cause:
        raise HomeError(str(cause)) from cause
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        log_level="warning",
        server_header=False,
        ssl_context_factory=(lambda _config, _default: context) if context else None,
        timeout_graceful_shutdown=STOP_GRACE_S,
    )
    server = LimitedServer(config, limits or HttpLimits(), "https")
    number: int = listener.getsockname()[1]
    serving = asyncio.create_task(server.serve([listener]), name="https")
    try:
        yield number
    finally:
        server.should_exit = True
        async with asyncio.timeout(STOP_S):
            await serving
        server.abort_all()  # streams that were cut off
        await asyncio.sleep(0)  # lets them close before the loop may end
        listener.close()
