"""A tail's process as the server sees it: started, given one step at a time, and started again when it ends.

A step that takes longer than its limit ends the process. Invariant: each step that was sent gets one call of `done` or
`lost`, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloud.beside.restarted import STOPPED, RestartedProcess
from cloud.generation import wire
from cloud.generation.connection import TailConnection
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.process.children import SHORT_WAITS, Child

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailSpec:
    """A tail: its folder and what it may use."""

    folder: Path
    digest: str = ""  # of the stage
    engine: str = "auto"  # auto, torch, torch:DEVICE or numpy
    cores: tuple[int, ...] = ()  # numbers of CPU cores; empty = those of the server
    memory_mb: int = 0  # limit; 0 = none
    load_s: float = 120.0  # time limit to start and load
    run_s: float = 60.0  # time limit for one step


class StepCallbacks(Protocol):
    """What hears of the process and its steps."""

    def came_up(self) -> None: ...

    def done(self, result: wire.StepDone) -> None: ...

    def lost(self, reason: str) -> None: ...


class TailProcess(RestartedProcess[None]):
    """Starts and feeds the process. Used in the event loop only."""

    def __init__(self, spec: TailSpec, callbacks: StepCallbacks) -> None:
        super().__init__()
        self._spec, self._callbacks = spec, callbacks
        self._connection: TailConnection | None = None
        self._limit: asyncio.TimerHandle | None = None

    def send(self, step: wire.RunStep, body: bytes) -> None:
        """Have a step computed. The process must be up."""
        if self._connection is None or not self.is_up:
            raise RuntimeError("the tail's process is not up")
        reason = f"a step took longer than {self._spec.run_s:g} s"
        self._limit = asyncio.get_running_loop().call_later(self._spec.run_s, self._kill, reason)
        self._connection.send(step, body)  # one step at a time: the buffer is bounded by its size

    async def _run_child(self) -> None:
        """Run one process to its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = self._start(theirs.fileno())
            except OSError:
                ours.close()
                raise
        self._begin(child)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: TailConnection(self._handle, self._kill), sock=ours)
        self._connection = connection
        self._limit = loop.call_later(
            self._spec.load_s, self._kill, f"the stage was not loaded in {self._spec.load_s:g} s"
        )
        try:
            await self._ended(child)
            await connection.ended  # what it said before it ended
        finally:
            connection.abort()
            self._child = self._connection = None
            self._note_down(self._why_ended(child))

    def _start(self, control: int) -> Child:
        spec = self._spec
        options = (f"--control={control}", f"--folder={spec.folder}", f"--engine={spec.engine}")
        limits = (f"--cores={','.join(map(str, spec.cores))}", f"--memory-mb={spec.memory_mb}")
        return Child(
            "cloud.generation.tail_main", *options, *limits, descriptors=(control,), environment=SHORT_WAITS
        )  # fmt: skip

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.TailUp():
                self._end_limit()
                self.is_up, self.reason = True, ""
                event(_log, logging.INFO, "tail.up", pid=self.pid, cores=list(self._spec.cores) or "-")
                if not self.first_load.done():
                    self.first_load.set_result(None)
                self._callbacks.came_up()
            case wire.TailNotLoaded():
                self._killed_for = f"it cannot be loaded: {message.error}"
            case wire.StepDone():
                self._end_limit()
                self._callbacks.done(message)
            case _:
                raise ProtocolError(f"unexpected message from the tail's process: {message}")

    def _note_down(self, reason: str) -> None:
        self._end_limit()
        self.is_up, self.reason = False, reason
        level = logging.INFO if reason == STOPPED else logging.ERROR
        event(_log, level, "tail.ended", pid=self.pid, reason=reason)
        if not self.first_load.done():
            self.first_load.set_exception(ProtocolError(f"the tail does not start: {reason}"))
        self._callbacks.lost(reason)

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
