"""uvicorn in the cloud's own event loop, over TLS 1.3, within the limits of `edgefl.protocols.ports.http_limits`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.types import ASGIApp

from edgefl.protocols.ports.http_limits import HttpLimits, LimitedServer
from edgefl.protocols.ports.listener import listen

STOP_GRACE_S = 1
STOP_S = 10.0


def _ignore(_ended: BaseException) -> None:
    pass


@contextlib.asynccontextmanager
async def serve_http(
    app: ASGIApp, host: str, port: int, context: ssl.SSLContext | None, limits: HttpLimits | None = None,
    on_end: Callable[[BaseException], None] = _ignore,
) -> AsyncIterator[int]:  # fmt: skip
    """Serve while the block runs, and give its port; port 0 takes a free one. `on_end`: it has ended before that.

    Raises ConfigError for an address that cannot be had.
    """
    listener = listen(host, port, "--http-port")
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # take a client's address from its connection, not from its headers
        timeout_graceful_shutdown=STOP_GRACE_S,
    )
    server = LimitedServer(config, limits or HttpLimits(), "https", (lambda: context) if context else None)
    number: int = listener.getsockname()[1]
    serving = asyncio.create_task(server.serve([listener]), name="https")

    def ended(task: asyncio.Task[None]) -> None:
        if not server.should_exit and not task.cancelled():
            on_end(task.exception() or RuntimeError("the HTTPS server stopped by itself"))

    serving.add_done_callback(ended)
    try:
        yield number
    finally:
        server.should_exit = True
        try:
            async with asyncio.timeout(STOP_S):
                await serving
        finally:
            server.abort_all()  # streams that were cut off
            await asyncio.sleep(0)  # lets them close before the loop may end
            listener.close()
