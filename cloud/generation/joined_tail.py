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

FIRST_WORDS_S = 10.0  # a process that connects is loaded, and says so at once

_log = logging.getLogger(__name__)


class JoinedTail(TailProcess):
    """Takes the connection of a tail's first process. Used in the event loop only."""

    def __init__(self, path: Path, spec: TailSpec, callbacks: StepCallbacks) -> None:
        super().__init__(spec, callbacks)
        self._path = path
        self._first = wire.TailUp(pid=0)  # the first words of the latest connection
        self.reason = f"no process has connected to {path} yet"

    async def run(self) -> None:
        """Take connections until cancelled; raises ConfigError if there can be no socket."""
        server = await self._listen()
        own = self._path.stat().st_ino
        event(_log, logging.INFO, "tail.waits", socket=self._path)
        try:
            await asyncio.Future()  # until it is cancelled
        finally:
            server.close()
            self._kill(STOPPED)
            if self._path.exists() and self._path.stat().st_ino == own:
                self._path.unlink()

    async def _listen(self) -> asyncio.Server:
        fault = "it is no socket; choose another path"
        try:
            if not self._path.exists() or (self._path.is_socket() and not await _is_served(self._path)):
                self._path.unlink(missing_ok=True)  # of a killed server
                server = await asyncio.start_unix_server(self._take, self._path, limit=wire.MAX_HEADER_BYTES)
                self._path.chmod(0o600)
                return server
            if self._path.is_socket():
                fault = "another server has it; stop that one, or choose another path"
        except OSError as cause:
            raise ConfigError(f"--join {self._path}: a socket cannot be made there: {cause}") from cause
        raise ConfigError(f"--join {self._path}: {fault}")

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end, if its first words are those of this tail."""
        if fault := await self._why_not(reader):
            event(_log, logging.WARNING, "tail.refused", socket=self._path, reason=fault)
            writer.close()
            return
        self._writer, self._killed_for = writer, ""
        self._handle(self._first)
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

    async def _why_not(self, reader: asyncio.StreamReader) -> str:
        """Return why a connection is not served; empty = its process is up (`_first`)."""
        try:
            async with asyncio.timeout(FIRST_WORDS_S):
                message = await self._message(reader)
        except TimeoutError:
            return f"it said nothing for {FIRST_WORDS_S:g} s"
        except (ProtocolError, OSError, asyncio.IncompleteReadError) as error:
            return str(error)
        if not isinstance(message, wire.TailUp):
            return f"it began with {message}"
        if message.digest != self._spec.digest:
            return (
                f"its processes have the stage {message.digest[:16]}..., this server has "
                f"{self._spec.digest[:16]}...: give both the same folder"
            )
        if self._writer is not None:
            return "another process has connected; stop one of them"
        self._first, self.pid = message, message.pid
        return ""

    def _kill(self, reason: str) -> None:
        self._killed_for = reason
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.transport.abort()


async def _is_served(path: Path) -> bool:
    """Whether somebody accepts connections at a socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True
