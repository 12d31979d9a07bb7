"""The server's end of the connection to a tail's process: whole messages, handed on as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloud.generation import wire
from edgefl.errors import ProtocolError


class TailConnection(asyncio.Protocol):
    """Hands each message to `handle`, and the reason to `refuse` if that raises ProtocolError or it is no message.

    Neither a stream nor a task is between socket and `handle`: they would delay every token. `ended` is set when the
    connection is over; after `abort` or a refusal nothing is handed on. Used in the event loop only.
    """

    def __init__(self, handle: Callable[[wire.Message], None], refuse: Callable[[str], None]) -> None:
        self._handle, self._refuse = handle, refuse
        self._transport: asyncio.WriteTransport | None = None
        self._kept = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.WriteTransport):
            raise TypeError(f"{transport} cannot send")
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._kept += data
        try:
            while (message := self._next()) is not None:
                self._handle(message)
        except ProtocolError as error:
            self._refuse(str(error))
            self.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self.abort()

    def send(self, message: wire.Message, body: bytes = b"") -> None:
        """Send a message; what cannot be sent at once is kept."""
        if self._transport is not None:
            self._transport.write(wire.packed(message, body))

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        if not self.ended.done():
            self.ended.set_result(None)

    def _next(self) -> wire.Message | None:
        """Take the next message, if all of it is here."""
        if len(self._kept) < wire.HEAD.size or self.ended.done():
            return None
        header, body = wire.sizes_of(bytes(self._kept[: wire.HEAD.size]))
        if body:
            raise ProtocolError(f"a message of a tail's process has {body} bytes behind its header, expected none")
        end = wire.HEAD.size + header
        if len(self._kept) < end:
            return None
        message = wire.parse_header(bytes(self._kept[wire.HEAD.size : end]))
        del self._kept[:end]
        return message
