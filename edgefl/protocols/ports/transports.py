"""Close a connection at once, whatever its state."""

from __future__ import annotations

import asyncio
import contextlib


def abort(transport: asyncio.WriteTransport) -> None:
    """Close a transport without sending its buffer; does nothing if it is already closed.

    A closed asyncio transport over TLS has no protocol any more, and would raise (before Python 3.11.4).
    """
    with contextlib.suppress(AttributeError):
        transport.abort()
