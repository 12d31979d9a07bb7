"""Ending a connection at once, whatever became of it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib


def abort(transport: asyncio.WriteTransport) -> None:
    """Close a transport without sending what it still holds; nothing happens to one that is closed.

    asyncio's transport over TLS has forgotten its protocol by then, and raises (before Python 3.11.4).
    """
    with contextlib.suppress(AttributeError):
        transport.abort()
