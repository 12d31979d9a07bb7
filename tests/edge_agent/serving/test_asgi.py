"""Scopes that are not HTTP."""

from __future__ import annotations

import asyncio

from edge_agent.serving.asgi import handle_other_scope


def test_web_sockets_are_closed_and_the_lifespan_is_answered() -> None:
    async def run():
        sent, received = [], [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive():
            return received.pop(0)

        async def send(message):
            sent.append(message["type"])

        await handle_other_scope({"type": "websocket"}, receive, send)
        await handle_other_scope({"type": "lifespan"}, receive, send)
        assert sent == ["websocket.close", "lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(run())
