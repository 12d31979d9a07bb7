"""The interface between an HTTP server and an application (ASGI), and what is no HTTP in it.

https://asgi.readthedocs.io/en/latest/specs/main.html
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def handle_other_scope(scope: Scope, receive: Receive, send: Send) -> None:
    """Handle ASGI scopes other than HTTP: the server's lifespan, and web sockets, which are closed."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


class HttpError(Exception):
    """Stops the processing of a request; its status and message become the response."""

    def __init__(self, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


def allow(scope: Scope, allowed: bytes, *methods: str, known: bool) -> None:
    """Raise HttpError unless the path is known and the method allowed."""
    if not known:
        raise HttpError(404, "Not Found")
    if scope["method"] not in methods:
        raise HttpError(405, "Method Not Allowed", (b"allow", allowed))
