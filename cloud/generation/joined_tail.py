"""A tail whose processes are started elsewhere, by torchrun (`cloud.generation.ranks`): the first one connects.

It says and hears the same as a process of our own (`TailProcess`). One connection at a time; whoever may open the
socket, which is this user, is believed. A step that takes longer than its limit ends the connection.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from cloud.beside.restarted import STOPPED
from cloud.generation import wire
from cloud.generation.connection import TailConnection
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
                server = await asyncio.get_running_loop().create_unix_server(self._taken, self._path)
                self._path.chmod(0o600)
                return server
            if self._path.is_socket():
                fault = "another server has it; stop that one, or choose another path"
        except OSError as cause:
            raise ConfigError(f"--join {self._path}: a socket cannot be made there: {cause}") from cause
        raise ConfigError(f"--join {self._path}: {fault}")

    def _taken(self) -> TailConnection:
        """Return the protocol of a new connection: it is served if its first words are those of this tail."""
        is_served = False

        def handle(message: wire.Message) -> None:
            nonlocal is_served
            if not is_served:
                self._check(message)
                is_served = True
                first_words.cancel()
                self._begin_with(connection)
            self._handle(message)

        def refuse(reason: str) -> None:
            if is_served:
                self._kill(reason)
            elif not connection.ended.done():
                event(_log, logging.WARNING, "tail.refused", socket=self._path, reason=reason)
                connection.abort()

        connection = TailConnection(handle, refuse)
        first_words = asyncio.get_running_loop().call_later(
            FIRST_WORDS_S, refuse, f"it said nothing for {FIRST_WORDS_S:g} s"
        )
        connection.ended.add_done_callback(lambda _: first_words.cancel())
        return connection

    def _check(self, message: wire.Message) -> None:
        """Raise ProtocolError if a connection that begins with this message is not served."""
        if not isinstance(message, wire.TailUp):
            raise ProtocolError(f"it began with {message}")
        if message.digest != self._spec.digest:
            raise ProtocolError(
                f"its processes have the stage {message.digest[:16]}..., this server has "
                f"{self._spec.digest[:16]}...: give both the same folder"
            )
        if self._connection is not None:
            raise ProtocolError("another process has connected; stop one of them")
        self.pid = message.pid

    def _begin_with(self, connection: TailConnection) -> None:
        self._connection, self._killed_for = connection, ""
        connection.ended.add_done_callback(lambda _: self._note_lost())

    def _note_lost(self) -> None:
        self._connection = None
        self._note_down(self._killed_for or "its first process has ended or lost the connection")

    def _kill(self, reason: str) -> None:
        self._killed_for = reason
        if self._connection is not None:
            self._connection.abort()


async def _is_served(path: Path) -> bool:
    """Whether somebody accepts connections at a socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True
