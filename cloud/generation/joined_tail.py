"""A tail whose processes are started elsewhere, by torchrun (`cloud.generation.ranks`): the first one connects.

It says and hears the same as a process of our own (`TailProcess`). One connection at a time; whoever may open the
socket, which is this user, is believed. A step that takes longer than its limit ends the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from cloud.beside.restarted import STOPPED
from cloud.generation import wire
from cloud.generation.tail_process import StepCallbacks, TailProcess, TailSpec
from edgefl.errors import ConfigError, ProtocolError
from edgefl.logs import event

_log = logging.getLogger(__name__)


class JoinedTail(TailProcess):
    """Takes the connection of a tail's first process. Used in the event loop only."""

    def __init__(self, path: Path, spec: TailSpec, callbacks: StepCallbacks) -> None:
        super().__init__(spec, callbacks)
        self._path = path
        self.reason = f"no process has connected to {path} yet"

    async def run(self) -> None:
        """Take connections until cancelled; raises ConfigError if there can be no socket."""
        self._path.unlink(missing_ok=True)
        try:
            server = await asyncio.start_unix_server(self._take, self._path, limit=wire.MAX_HEADER_BYTES)
        except OSError as cause:
            raise ConfigError(f"--join {self._path}: a socket cannot be made there: {cause}") from cause
        self._path.chmod(0o600)
        event(_log, logging.INFO, "tail.waits", socket=self._path)
        try:
            async with server:
                await server.serve_forever()
        finally:
            self._path.unlink(missing_ok=True)
            self._kill(STOPPED)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        if self._writer is not None:
            event(_log, logging.WARNING, "tail.second", socket=self._path,
                  reason="another process has connected; stop one of them")  # fmt: skip
            writer.close()
            return
        self._writer, self._killed_for = writer, ""
        reason = STOPPED
        try:
            await self._read(reader)
            reason = self._killed_for or "its first process has ended or lost the connection"
        except (ProtocolError, OSError) as error:
            reason = self._killed_for or str(error)
        finally:
            writer.close()
            self._writer = None
            self._note_down(reason)

    def _handle(self, message: wire.Message) -> None:
        if isinstance(message, wire.TailUp):
            if message.digest != self._spec.digest:
                raise ProtocolError(
                    f"its processes have the stage {message.digest[:16]}..., this server has "
                    f"{self._spec.digest[:16]}...: give both the same folder"
                )
            self.pid = message.pid
        super()._handle(message)

    def _kill(self, reason: str) -> None:
        self._killed_for = reason
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.transport.abort()
